"""The one callback of the platform: it tracks, shows, checks and saves.

One, because Lightning asks every callback at every hook of every step, and a step of a small model is short.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightrail import __version__
from lightrail.errors import Interrupted
from lightrail.files import copy_file
from lightrail.run.folder import RunFolder
from lightrail.run.interruption import Interruption
from lightrail.run.logged_state import load_logged_state, logged_state
from lightrail.run.loops import EpochLoop, progress_of
from lightrail.run.progress import Progress
from lightrail.run.sharded_state import load_weights
from lightrail.run.tracking import TrainingMetrics, non_finite_loss
from lightrail.step.transform import has_evaluation_point

if TYPE_CHECKING:
    from lightrail.privacy.engine import PrivacyEngine

__all__ = ["Observation"]


class Observation(Callback):
    """Tracks the training metrics, shows progress, stops on a loss that is not finite, and saves at the boundary.

    Args:
        folder: Where checkpoints go.
        lock: What the run is made of; stands in every checkpoint.
        interruption: Where signals arrive.
        every: Optimizer steps between checkpoints; ``None`` for one after every validation.
        skips_non_finite: Whether a loss that is not finite is passed over rather than an error.
        shows_progress: Whether to show progress.
    """

    def __init__(
        self,
        folder: RunFolder,
        lock: Mapping[str, Any],
        interruption: Interruption,
        *,
        every: int | None,
        skips_non_finite: bool,
        shows_progress: bool,
    ) -> None:
        self.folder = folder
        self.best: dict[str, Any] | None = None
        self.evaluated: dict[str, float] = {}
        self.on_setup: Callable[[], None] | None = None
        # Whatever of the run may have figures of its own to log, by the name that its columns begin with.
        self.speakers: dict[str, Any] = {}
        # Is told what was decided for the user while the run goes on.
        self.note: Callable[[str], None] = lambda _text: None
        self.steps = 0
        self._lock = lock
        self._interruption = interruption
        self._every = every
        self._skips_non_finite = skips_non_finite
        self._shows_progress = shows_progress
        self._is_due = self._is_best = self._is_saved_for_good = False
        self._bad: tuple[int, float] | None = None
        self._epoch_is_open = True
        self._saved_step = -1
        self._carried: dict[str, Any] | None = None

    def attach(self, trainer: Trainer, loop: EpochLoop, privacy: PrivacyEngine | None = None) -> None:
        """Connects to a trainer before it runs."""
        self._privacy = privacy
        if privacy is not None:
            # One record must not be able to stop a run: its gradient is left out instead.
            self._skips_non_finite = True
        self._trainer = trainer
        self._loop = loop
        self._is_alone = trainer.world_size == 1
        self._windows = loop.windows
        self._log_every: int = trainer.log_every_n_steps or 50  # type: ignore[attr-defined]
        on_cpu = trainer.strategy.root_device.type == "cpu"
        accumulate = 1 if loop.windows is not None else trainer.accumulate_grad_batches
        self.training = TrainingMetrics(checks_each=on_cpu, accumulate=accumulate)
        loop.at_boundary = self.at_boundary
        loop.at_horizon = self.at_horizon

    # The hot path. Lightning passes over hooks that are no function; each of these would cost microseconds a step.

    on_train_batch_start = None  # type: ignore[assignment]
    on_before_zero_grad = None  # type: ignore[assignment]
    on_before_backward = None  # type: ignore[assignment]
    on_after_backward = None  # type: ignore[assignment]
    on_before_optimizer_step = None  # type: ignore[assignment]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop = self._loop
        steps = loop.global_step
        if self._windows is not None and outputs:
            outputs = {**outputs, "loss": outputs["loss"] * self._windows.count}
        if self._privacy is not None and not self._privacy.method.public_metrics:
            outputs = None
        bad = self.training.add(outputs, steps)
        if bad is not None and not self._skips_non_finite:
            self._bad = self._bad or (steps, bad)
            if self._is_alone:
                self._stop_if_not_finite()
        if self._carried is not None:
            self._carried = load_logged_state(trainer, self._carried)
        if steps != self.steps:
            self.steps = steps
            self._progress.to_step(steps if self._windows is None else self._windows.samples)
            if steps % self._log_every == 0:
                self._log(trainer)

    # Epochs and validation.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.on_setup is not None:
            self.on_setup()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.steps = trainer.global_step
        if self._carried is not None:
            # A metric's own state is there from the start; what `self.log` gathers appears with its first call.
            self._carried = load_logged_state(trainer, self._carried)
        self._move_to_training_point(trainer)
        self._progress = Progress(
            total=self._total(trainer),
            first=self.steps if self._windows is None else self._windows.samples,
            unit=getattr(pl_module, "step_unit", "steps") if self._windows is None else "samples",
            epochs=trainer.max_epochs if trainer.max_epochs and trainer.max_steps == -1 else None,
            enabled=self._shows_progress and trainer.is_global_zero,
        )
        self._progress.begin_epoch(trainer.current_epoch)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._progress.begin_epoch(trainer.current_epoch)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._log(trainer)
        self.move_to_evaluation_point(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._move_to_training_point(trainer)
        if trainer.state.fn != "fit":
            return
        self._is_due = self._is_due or self._every is None
        name, mode = self.monitor(pl_module)
        value = trainer.callback_metrics.get(name)
        if value is not None and math.isfinite(value := float(value)):
            better = self.best is None or (value > self.best["value"] if mode == "max" else value < self.best["value"])
            if better:
                self.best = {"name": name, "mode": mode, "value": value, "step": trainer.global_step}
                self._is_best = self._is_due = True
        self.evaluated = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val")}
        self._progress.show(self.evaluated)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer)
        self._is_due = self._is_due or self._every is None
        self._progress.end_epoch(trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_saved_for_good:
            self._epoch_is_open = False
            self.save()
        self._progress.close()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.move_to_evaluation_point(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if hasattr(self, "_progress"):
            self._progress.close()

    def monitor(self, module: LightningModule) -> tuple[str, str]:
        """Which metric decides what the best checkpoint is: the task's own word, or the validation loss."""
        name, mode = getattr(module, "monitor", None) or ("val_loss", "min")
        return name, mode

    # Saving, at the boundary only.

    def at_boundary(self) -> None:
        """Before the next batch is fetched: everything of the past is done."""
        signal_number = self._interruption.signal_number
        if not self._is_alone:
            signal_number = self._agreed(signal_number or 0)
            self._stop_if_not_finite()
        if not self._loop.window_is_closed:
            return  # gradients of half a window are not saved: the step ends first
        steps = self.steps
        if signal_number:
            self.save()
            raise Interrupted(signal_number, steps, str(self.folder.path))
        if self._is_due or (self._every and steps % self._every == 0 and steps != self._saved_step and steps):
            self.save()

    def at_horizon(self) -> None:
        """The last step fell in the middle of an epoch; a longer run goes on from here."""
        self.save()
        self._is_saved_for_good = True

    def save(self) -> None:
        """Writes ``last.ckpt``, and ``best.ckpt`` where this is the best so far. All ranks take part."""
        self._look_for_non_finite()
        if not self._is_alone:
            self._stop_if_not_finite()
        self._saved_step = self.steps
        self._is_due = False
        self._trainer.save_checkpoint(self.folder.last)
        if self._is_best and self._trainer.is_global_zero:
            copy_file(self.folder.last, self.folder.best)
        self._is_best = False
        if not self._is_alone:
            self._trainer.strategy.barrier()  # the others may read the best one next
        self._interruption.last_checkpoint = f"{self.folder.last} (step {self.steps})"

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        position = self._loop.position(epoch_is_open=self._epoch_is_open)
        privacy = None if self._privacy is None else self._privacy.state_dict()
        checkpoint["lightrail"] = {
            "core": __version__,
            "lock": self._lock,
            "positions": _gather(trainer, position),
            "training": self.training.state_dict(),
            "best": self.best,
            "logged": logged_state(trainer, pl_module),
            "loggers": [
                logger.state_dict() if hasattr(logger, "state_dict") else None  # type: ignore[attr-defined]
                for logger in trainer.loggers
            ],
            "steps": self.steps,
            "privacy": privacy,
        }
        optimizer = _point_mover(trainer)
        if optimizer is not None:
            # What a checkpoint holds under the usual name is what is to be evaluated; training goes on elsewhere.
            checkpoint["current_model_state"] = {k: v.clone() for k, v in checkpoint["state_dict"].items()}
            optimizer.eval()
            checkpoint["state_dict"] = {k: v.clone() for k, v in pl_module.state_dict().items()}
            optimizer.train()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        if "current_model_state" in checkpoint:
            load_weights(pl_module, checkpoint["current_model_state"])
        ours = checkpoint["lightrail"]
        self._loop.set_position(ours["positions"], self.note)
        self.training.load_state_dict(ours["training"])
        self.best = ours["best"]
        self.steps = self._saved_step = ours["steps"]
        self._carried = ours["logged"]
        if self._privacy is not None:
            self._privacy.load_state_dict(ours.get("privacy") or {})
        for logger, state in zip(trainer.loggers, ours["loggers"], strict=False):
            if state is not None and hasattr(logger, "load_state_dict"):
                logger.load_state_dict(state)  # type: ignore[attr-defined]
        self._interruption.last_checkpoint = f"{self.folder.last} (step {self.steps})"
        self.evaluated = {k: float(v) for k, v in ours["logged"]["seen"].items() if k.startswith("val")}

    # The parts.

    def _total(self, trainer: Trainer) -> int | None:
        """Where progress ends, in steps, or in samples where steps differ in size."""
        whole = math.inf if self._windows is not None and self._windows.counts_steps else progress_of(trainer)[1]
        return None if math.isinf(whole) else int(whole)

    def _figures(self) -> dict[str, float]:
        """What the methods, the schedule, the batching and the callbacks say of themselves."""
        figures: dict[str, float] = {}
        if self._windows is not None:
            figures = {"batch_size": self._windows.batch_size, "samples": self._windows.samples}
        for name, speaker in self.speakers.items():
            if hasattr(speaker, "logged"):
                figures.update({f"{name}/{figure}": value for figure, value in speaker.logged().items()})
        return figures

    def _log(self, trainer: Trainer) -> None:
        self._look_for_non_finite()
        metrics = self.training.flush(trainer)
        spent = None if self._privacy is None else self._privacy.spent()
        if spent is not None:
            metrics = {**metrics, "epsilon": spent}
        if not metrics:
            return
        self._progress.show(metrics if spent is not None else {**metrics, "epsilon": None})
        # On all ranks: a figure of what is sharded is one that they find together.
        figures = self._figures() if trainer.is_global_zero or not self._is_alone else {}
        if trainer.is_global_zero:
            metrics = {**metrics, "epoch": trainer.current_epoch, **_learning_rates(trainer), **figures}
            step = self._loop._batches_that_stepped
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step)

    def _look_for_non_finite(self) -> None:
        if not self._skips_non_finite:
            self._bad = self._bad or self.training.first_non_finite()
            if self._is_alone:
                self._stop_if_not_finite()

    def _stop_if_not_finite(self) -> None:
        """Ends the run where a loss was not finite: on all ranks at once, or those that go on would wait for ever."""
        step = self._agreed(self._bad[0] if self._bad else 0)
        if step:
            value = self._bad[1] if self._bad else math.nan
            raise non_finite_loss(step, value, self._interruption.last_checkpoint)

    def _agreed(self, mine: int) -> int:
        """The greatest of what the ranks say; every rank asks at the same point."""
        if self._is_alone:
            return mine
        flag = torch.tensor([mine], device=self._trainer.strategy.root_device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return int(flag)

    def move_to_evaluation_point(self, trainer: Trainer) -> None:
        """Puts the parameters where the method wants them evaluated, if that is elsewhere."""
        if (optimizer := _point_mover(trainer)) is not None:
            optimizer.eval()

    def _move_to_training_point(self, trainer: Trainer) -> None:
        if (optimizer := _point_mover(trainer)) is not None:
            optimizer.train()


def _point_mover(trainer: Trainer) -> Any:
    """The optimizer, where it trains at one point and is evaluated at another."""
    return next(filter(has_evaluation_point, trainer.optimizers or ()), None)


def _learning_rates(trainer: Trainer) -> dict[str, float]:
    if not trainer.optimizers:
        return {}
    groups = trainer.optimizers[0].param_groups
    rates = {f"lr_{i}" if i else "lr": float(group["lr"]) for i, group in enumerate(groups) if "lr" in group}
    # Groups that share one rate share one curve.
    return rates if len(set(rates.values())) > 1 else dict(list(rates.items())[:1])


def _gather(trainer: Trainer, value: Any) -> list[Any]:
    if trainer.world_size == 1:
        return [value]
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def checkpoint_path(folder: RunFolder) -> Path | None:
    """The checkpoint to evaluate: the best one, or the last where no metric decided."""
    for path in (folder.best, folder.last):
        if path.is_file():
            return path
    return None
