"""A task's own ``configure_optimizers``, where its step must pass through ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lightrail.errors import CompositionError
from lightrail.run.loops import FitLoop
from lightrail.step.transform import Transform, TransformedOptimizer

__all__ = ["wrap_own_optimizer"]


def wrap_own_optimizer(task: LightningModule, trainer: Trainer, transforms: Sequence[Transform] = ()) -> None:
    """Puts the one optimizer that a task configures for itself behind the step's closure.

    Args:
        task: A task with a ``configure_optimizers`` of its own.
        trainer: That is to fit it.
        transforms: What acts between its gradient and its update.
    """
    own = task.configure_optimizers

    def configure_optimizers() -> Any:
        loop = trainer.fit_loop
        assert isinstance(loop, FitLoop)
        loop.horizon(False)
        return _wrapped(own(), transforms)

    task.configure_optimizers = configure_optimizers  # type: ignore[method-assign]


def _wrapped(configured: Any, transforms: Sequence[Transform]) -> Any:
    """In whichever of Lightning's forms it was returned."""
    if isinstance(configured, Optimizer):
        return TransformedOptimizer(configured, transforms)
    if isinstance(configured, dict) and isinstance(configured.get("optimizer"), Optimizer):
        wrapped = TransformedOptimizer(configured["optimizer"], transforms)
        found = {**configured, "optimizer": wrapped}
        if "lr_scheduler" in configured:
            found["lr_scheduler"] = _reattached(configured["lr_scheduler"], wrapped)
        return found
    if isinstance(configured, tuple | list) and len(configured) == 1:
        return _wrapped(configured[0], transforms)
    is_pair = isinstance(configured, tuple | list) and len(configured) == 2 and isinstance(configured[0], list | tuple)
    if is_pair and len(configured[0]) == 1:
        wrapped = TransformedOptimizer(configured[0][0], transforms)
        return [wrapped], [_reattached(each, wrapped) for each in configured[1]]
    raise CompositionError(
        "the task configures several optimizers, or none",
        found=f"configure_optimizers returned {_described(configured)}",
        allowed="one optimizer, with schedulers or without",
        remedy="Let the task return one optimizer, or choose one with +optimizer=NAME.",
    )


def _reattached(scheduler: Any, optimizer: TransformedOptimizer) -> Any:
    """A scheduler that Lightning finds attached to the optimizer that was returned."""
    inner = scheduler["scheduler"] if isinstance(scheduler, dict) else scheduler
    inner.optimizer = optimizer
    return scheduler


def _described(configured: Any) -> str:
    if isinstance(configured, tuple | list):
        return f"{len(configured)} values: " + ", ".join(type(each).__name__ for each in configured)
    return type(configured).__name__
