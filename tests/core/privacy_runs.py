"""Small private runs, for tests: data that knows its records, a task that logs, and a callback that keeps gradients."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightrail
from lightrail import Run


def points(size: int = 64) -> TensorDataset:
    """Each record knows its number."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 4, generator=generator)
    return TensorDataset(x, (x.sum(1) > 0).long(), torch.arange(size))


class Points(LightningDataModule):
    def __init__(self, batch_size: int = 8, size: int = 64, poisoned: int = -1, num_workers: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.dataset = points(size)
        if poisoned >= 0:
            self.dataset.tensors[0][poisoned] = float("nan")

    def train_dataloader(self) -> Any:
        return DataLoader(self.dataset, self.batch_size, num_workers=self.num_workers)

    def val_dataloader(self) -> Any:
        return DataLoader(points(16), 16)


class Untouchable(LightningDataModule):
    """Whoever asks for its records fails the test."""

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()

    def train_dataloader(self) -> Any:
        raise AssertionError("the data was touched")


class Module(LightningModule):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any) -> Tensor:
        loss = self.loss(batch)
        self.log("train_own", loss, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: Any) -> None:
        logits = self.net(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]))
        self.log("val_accuracy", (logits.argmax(1) == batch[1]).float().mean())


class Watch(pl.Callback):
    """What anybody sees: the gradient before the optimizer, and which records a step had."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.before: list[Tensor] = []
        self.clipped: list[Tensor] = []
        self.records: list[list[int]] = []
        self.sizes: list[list[int]] = []
        self.early: list[bool] = []
        self._step = -1

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.records.append([])
            self.sizes.append([])
        self.records[-1] += batch[2].tolist()
        self.sizes[-1].append(len(batch[2]))

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.early.append(any(p.grad is not None for p in pl_module.parameters()))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        trained = [p for p in pl_module.parameters() if p.grad is not None]
        self.gradients.append(torch.cat([cast(Tensor, p.grad).flatten().clone() for p in trained]))
        self.before.append(flat(pl_module))


def flat(module: Any) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def compose(
    root: Path,
    *overrides: str,
    task: str = "privacy_runs.Module",
    data: str = "privacy_runs.Points",
    is_own: bool = False,
) -> Run:
    """A run whose update is its gradient; with the task's own optimizer where it is to have it."""
    return lightrail.compose(
        [
            f"task={task}",
            f"data={data}",
            *([] if is_own else ["optimizer=sgd", "optimizer.lr=1", "schedule=null"]),
            "logger=[csv]",
            "trainer.accelerator=cpu",
            "trainer.max_epochs=1",
            f"run.root={root}",
            *overrides,
        ]
    )


PRIVATE = ("+privacy=dp_sgd", "privacy.accountant=rdp")


def private(root: Path, *overrides: str, noise: float = 1.0, **names: Any) -> Run:
    return compose(root, *PRIVATE, f"privacy.noise={noise}", *overrides, **names)


def watched(run: Run) -> Watch:
    watch = Watch()
    run.callbacks = [*run.callbacks, watch]
    run.execute(show_progress=False)
    return watch


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def told(folder: Path, name: str = "privacy.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def only(root: Path) -> Path:
    """The one run folder."""
    (found,) = root.iterdir()
    return found


def sample_gradients(module: Module, at: Tensor, dataset: TensorDataset) -> Tensor:
    """The gradient of each record at parameters, ``[n, d]``."""
    offset = 0
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(at[offset : offset + p.numel()].view_as(p))
            offset += p.numel()
    found = []
    for i in range(len(dataset)):
        x, y, _ = dataset[i]
        gradients = torch.autograd.grad(module.loss((x[None], y[None])), list(module.parameters()))
        found.append(torch.cat([each.flatten() for each in gradients]))
    return torch.stack(found)
