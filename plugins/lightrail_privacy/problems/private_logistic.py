"""A nonconvex logistic regression of many full-batch rounds, judged by the gradient that is left."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightrail.bench.claims.problem import RunProblem
from lightrail.traits import Traits

__all__ = ["NonconvexLogistic", "PrivateLogistic", "SignedRecords"]

RECORDS, FEATURES, ROUNDS = 2000, 50, 800


class NonconvexLogistic(LightningModule):
    """ℓ(w; x, y) = log(1 + exp(-y ⟨w, x⟩)) + 0.1 Σ_j w_j² / (1 + w_j²).

    It logs ‖∇f(w)‖² over all records as ``val_gradient``.
    """

    monitor = ("val_gradient", "min")

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def _loss(self, batch: Any) -> Tensor:
        x, y = batch
        w = self.linear.weight
        penalty = (w.square() / (1 + w.square())).sum()
        return F.softplus(-y * self.linear(x)[:, 0]).mean() + 0.1 * penalty

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return {"loss": self._loss(batch)}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        with torch.enable_grad(), torch.inference_mode(False):
            again = [each.clone() for each in batch]
            (gradient,) = torch.autograd.grad(self._loss(again), [self.linear.weight])
        self.log("val_gradient", gradient.square().sum())


class SignedRecords(LightningDataModule):
    """2000 records of 50 features on the unit sphere, with the signs of a noisy linear rule.

    Args:
        batch_size: Records a step.
    """

    def __init__(self, batch_size: int = RECORDS) -> None:
        super().__init__()
        self.batch_size = batch_size
        generator = torch.Generator().manual_seed(0)
        x = F.normalize(torch.randn(RECORDS, FEATURES, generator=generator), dim=1)
        noise = 0.1 * torch.randn(RECORDS, generator=generator)
        y = (x @ torch.randn(FEATURES, generator=generator) / FEATURES**0.5 + noise).sign()
        self._records = TensorDataset(x, y)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self._records, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self._records, batch_size=RECORDS)


class PrivateLogistic(RunProblem):
    """Many rounds over all records with little budget: where noise, not the number of rounds, decides.

    Example:
        >>> PrivateLogistic.passes
        800
    """

    traits = Traits(
        rule="log(1 + exp(-y⟨w, x⟩)) + 0.1 Σ w²/(1 + w²), 2000 records of 50 features, all of them in each of 800 steps"
    )
    passes = ROUNDS
    metric = "val_gradient"
    merit_name = "‖∇f‖² at the end"
    overrides = (
        f"task={__name__}.NonconvexLogistic",
        f"data={__name__}.SignedRecords",
        "model=null",
        "optimizer=sgd",
        "schedule=null",
        f"trainer.max_steps={ROUNDS}",
        "trainer.max_epochs=-1",
        "+trainer.check_val_every_n_epoch=40",
        "trainer.checkpoint_every=1000",
    )
