"""Plugins of a stranger, named by their dotted path, for tests of whole runs."""

from __future__ import annotations

import dataclasses
import os
import signal
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightrail import Closure, Run, Traits, Transform


class Points(LightningDataModule):
    """A small table, without dimensions: the task knows them."""

    def __init__(self, batch_size: int = 16, poisoned: int = -1) -> None:
        super().__init__()
        self.batch_size = batch_size
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(64, 4, generator=generator)
        if poisoned >= 0:
            x[poisoned] = float("nan")
        self.dataset = TensorDataset(x, (x.nan_to_num().sum(1) > 0).long())

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset, self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset, 16)


class Module(LightningModule):
    """Somebody's own LightningModule: no model argument, no configure_optimizers, logs in the usual way."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))

    def training_step(self, batch: Any) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0].nan_to_num()), batch[1]))


class OwnOptimizer(Module):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.125)


class SetsItsStep(torch.optim.SGD):
    traits = Traits(sets_step_size=True)

    def __init__(self, params: Any, scale: float = 1.0) -> None:
        if scale < 0:
            raise ValueError("scale must be at least 0")
        super().__init__(params, lr=0.1 * scale)


class LooksTwice(Transform):
    """Asks for a second gradient."""

    traits = Traits(needs_closure=True, extra_evaluations=1)

    def __init__(self, rho: float = 0.05) -> None:
        self.rho = rho

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        with closure.at([p + self.rho * p.grad for p in params if p.grad is not None]):
            closure()


class Wrapper:
    """The simplest wrapper: halves every update, whatever the optimizer."""

    def __init__(self, factor: float = 0.5) -> None:
        self.factor = factor

    def wrap(self, run: Run) -> Run:
        return dataclasses.replace(
            run, transforms=[*run.transforms, Shrink(self.factor)], notes=[*run.notes, f"updates times {self.factor}"]
        )


class Shrink(Transform):
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def after_step(self, params: list[Tensor], previous: list[Tensor]) -> None:
        for p, before in zip(params, previous, strict=True):
            p.lerp_(before, 1 - self.factor)


class Signals(pl.Callback):
    """Sends this process a signal, as a terminal or a cluster does."""

    def __init__(self, step: int = 3, number: int = int(signal.SIGTERM), times: int = 1) -> None:
        self.step = step
        self.number = number
        self.times = times

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
