"""A method under Lightning and the same method in a loop written by hand end at the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightrail.run.loops import install_loops
from lightrail.step.transform import TransformedOptimizer
from lightrail.testing.problems import NormalisedClassifier, Problem
from lightrail.testing.quiet_trainer import quiet_trainer
from lightrail.testing.runs import require_equal

__all__ = ["require_same_under_lightning"]

Make = Callable[[Problem], Optimizer]
BATCHES = 6


class _Task(LightningModule):
    """A problem as a task."""

    def __init__(self, problem: Problem, make: Make) -> None:
        super().__init__()
        self.module = problem.module
        self._problem = problem
        self._make = make

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._problem.loss(batch)

    def sampled_loss(self, batch: Any, generator: torch.Generator) -> Tensor:
        return self._problem.sampled_loss(batch, generator)

    def clusters(self, batch: Any) -> Tensor:
        return self._problem.clusters(batch)

    def objectives(self, batch: Any) -> list[Tensor]:
        return self._problem.objectives(batch)

    def sample_losses(self, batch: Any) -> Tensor:
        return self._problem.sample_losses(batch)

    def outputs(self, batch: Any) -> Tensor:
        return self._problem.outputs(batch)

    def output_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return self._problem.output_loss(outputs, batch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:  # by now the loader has drawn what it draws
            torch.manual_seed(3)

    def configure_optimizers(self) -> Optimizer:
        return self._make(self._problem)


def require_same_under_lightning(make: Make, evaluates_again: bool) -> None:
    """With dropout and BatchNorm, for windows of one and of two micro-batches.

    Args:
        make: The optimizer of a problem.
        evaluates_again: Whether it needs the accumulation window.
    """
    for window in (1, 2):
        expected, found = _by_hand(make, window), _under_lightning(make, window, evaluates_again)
        require_equal(found, expected, f"with {window} micro-batches a step, Lightning and a loop by hand part")


def _by_hand(make: Make, window: int) -> list[Tensor]:
    problem = NormalisedClassifier()
    optimizer = make(problem)
    torch.manual_seed(3)
    for first in range(0, BATCHES, window):
        closure = problem.closure(*(problem.batch(first + i) for i in range(window)))
        optimizer.step(closure)  # type: ignore[arg-type]
    return [*problem.snapshot(), *problem.module.buffers()]


def _under_lightning(make: Make, window: int, evaluates_again: bool) -> list[Tensor]:
    problem = NormalisedClassifier()
    batches = [problem.batch(step) for step in range(BATCHES)]
    task = _Task(problem, (lambda given: _with_window(make(given))) if evaluates_again else make)
    with quiet_trainer(max_epochs=1, accumulate_grad_batches=window) as trainer:
        install_loops(trainer, window=evaluates_again, skips_non_finite=False)
        trainer.fit(task, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return [*problem.snapshot(), *problem.module.buffers()]


def _with_window(optimizer: Optimizer) -> TransformedOptimizer:
    return optimizer if isinstance(optimizer, TransformedOptimizer) else TransformedOptimizer(optimizer)
