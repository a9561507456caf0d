"""A trainer and a run put together: our loops, the step, the optimizer with what acts around it.

The whole run is put together so, and so is every visit of a federated run to a client.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from torch.optim import Optimizer

from lightrail.errors import CompositionError
from lightrail.run.clock import Clock
from lightrail.run.loops import EpochLoop, FitLoop, install_loops
from lightrail.run.own_optimizer import wrap_own_optimizer
from lightrail.run.run import Run
from lightrail.run.windows import Windows
from lightrail.step.batching import Batching
from lightrail.step.transform import TransformedOptimizer
from lightrail.step.update_size import scales_with_gradient
from lightrail.step.window import WindowClosure

__all__ = ["attach_optimizer", "attach_step", "name_of"]


def attach_step(run: Run, trainer: Trainer) -> EpochLoop:
    """Gives a trainer the loops that the run's methods need.

    Args:
        run: What is to be carried out.
        trainer: That has not run yet.
    """
    max_samples = run.trainer.get("max_samples")
    windows, make_window = _windows(run, max_samples)
    loop = install_loops(
        trainer,
        window=_needs_window(run, trainer),
        skips_non_finite=run.composition.config.run.on_nan == "skip",
        game=run.game,
        windows=windows,
        max_samples=max_samples,
        make_window=make_window,
    )
    if run.privacy is not None:
        run.privacy.attach(trainer)
    return loop


def _windows(run: Run, max_samples: int | None) -> tuple[Windows | None, Callable[..., WindowClosure] | None]:
    """Who cuts the data, and what a window of the step is, where either is more than the plain one."""
    if run.privacy is None:
        return None if run.batching is None else Windows(run.batching, max_samples), None
    from lightrail.privacy.private_window import PrivateWindow
    from lightrail.privacy.sampling import PrivateWindows

    return PrivateWindows(run.privacy, max_samples), partial(PrivateWindow, engine=run.privacy)


def _needs_window(run: Run, trainer: Trainer) -> bool:
    """Whether the step needs more than Lightning's automatic path, which plain methods keep untouched."""
    if run.privacy is not None:
        return True
    if trainer.precision == "16-mixed" or (run.optimizer is None and not run.transforms):
        return False
    asks = any(traits.evaluates_again or traits.watches_gradient for traits in run.method_traits)
    has_own_step = bool(run.transforms) or run.game is not None or run.batching is not None
    return asks or has_own_step or run.composition.config.run.on_nan == "skip"


def attach_optimizer(run: Run, trainer: Trainer, speakers: dict[str, Any], note: Callable[[str], None]) -> None:
    """Takes over ``configure_optimizers``, on any LightningModule.

    Args:
        run: What is to be carried out.
        trainer: With the loops of :func:`attach_step`.
        speakers: Gets whatever has figures of its own, by the name that its columns begin with.
        note: Is told what was decided on the way.
    """
    speakers |= {name_of(run, each): each for each in run.callbacks}
    make_optimizer = run.optimizer
    windows = trainer.fit_loop.windows if isinstance(trainer.fit_loop, FitLoop) else None
    if make_optimizer is None:
        if run.privacy is not None or run.transforms:
            wrap_own_optimizer(run.task, trainer, run.transforms)
        return
    wraps = _needs_window(run, trainer) or bool(run.transforms)

    def configure_optimizers() -> Any:
        optimizer = make_optimizer(run.task)
        speakers[name_of(run, "optimizer")] = optimizer
        if run.privacy is not None:
            speakers[name_of(run, "privacy")] = run.privacy
        if wraps:
            optimizer = TransformedOptimizer(optimizer, run.transforms)
        for each in (*run.transforms, *([run.batching] if run.batching else [])):
            speakers[name_of(run, each)] = each
        if run.schedule is None and windows is None:
            return optimizer
        clock = _clock(run, trainer, optimizer, windows, note)
        speakers[name_of(run, "schedule")] = clock
        if wraps:
            watchers = (clock.scheduler, run.batching)
            optimizer.observers += [each.observe for each in watchers if _watches(each)]  # type: ignore[union-attr]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": clock, "interval": "step"}}

    run.task.configure_optimizers = configure_optimizers  # type: ignore[method-assign]


def _clock(
    run: Run, trainer: Trainer, optimizer: Optimizer, windows: Windows | None, note: Callable[[str], None]
) -> Clock:
    loop = trainer.fit_loop
    assert isinstance(loop, FitLoop)
    horizon = loop.horizon(scales_with_gradient(optimizer) if windows is not None else False)
    if horizon is None:
        raise CompositionError(
            "the schedule has no horizon",
            found=f"trainer.max_epochs={trainer.max_epochs} trainer.max_steps={trainer.max_steps}",
            allowed="a number of steps, samples or epochs",
            remedy="Set trainer.max_steps, trainer.max_samples or trainer.max_epochs, or use schedule=null.",
        )
    make_schedule = run.schedule
    known = {"folder": trainer.default_root_dir, "batch_size": horizon.batch_size}
    make = None if make_schedule is None else partial(make_schedule, optimizer, **known)
    return Clock(make, optimizer, horizon, windows, note)


def _watches(method: Any) -> bool:
    return callable(getattr(method, "observe", None)) and type(method).observe is not Batching.observe


def name_of(run: Run, plugin: Any) -> str:
    """Under which name a plugin logs; of a kind of which there is one, whatever was chosen."""
    if isinstance(plugin, str):
        return next((each.name for each in run.composition.chosen if each.kind == plugin), plugin).rpartition(".")[2]
    return run.names.get(type(plugin)) or type(plugin).__name__.lower()
