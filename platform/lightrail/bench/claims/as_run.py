"""A problem as a run of ``train``, for what works on whole runs: callbacks and batchings."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightrail.bench.claims.problem import Problem
from lightrail.catalogue import load

__all__ = ["MARKS", "Draws", "ProblemTask", "overrides_of"]

MARKS = 20


class ProblemTask(LightningModule):
    """Trains on a problem, and logs its merit as ``val_merit``.

    Args:
        problem: The name of a plugin of the kind ``problem``.
    """

    monitor = ("val_merit", "min")

    def __init__(self, problem: str) -> None:
        super().__init__()
        self.problem: Problem = load("problem", problem)()
        # Its own parameters, so that callbacks find them where they look.
        self.held = nn.ParameterList([p for _, p in self.problem.named_parameters()])

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        return {"loss": self.problem.loss(self.global_step)}

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_merit", self.problem.merit())


class Draws(LightningDataModule):
    """As many steps as a problem has passes; the problem draws its own batches.

    Args:
        steps: How many.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.zeros(self.steps, 1), batch_size=1)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.zeros(1, 1), batch_size=1)  # type: ignore[arg-type]


def overrides_of(problem: str) -> list[str]:
    """The command line that trains on a problem, at a constant rate."""
    passes = load("problem", problem).passes
    return [
        f"task={__name__}.ProblemTask",
        f"task.problem={problem}",
        f"data={__name__}.Draws",
        f"data.steps={passes}",
        "model=null",
        "schedule=null",
        "trainer.max_epochs=1",
        f"+trainer.val_check_interval={max(1, passes // MARKS)}",
    ]
