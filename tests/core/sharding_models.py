"""A stranger's module and data, for runs that are compared over numbers of processes."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

SAMPLES = 64


class Points(LightningDataModule):
    """A small table, of which rank r of n sees every n-th row: ranks together see the batches of one process."""

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size
        x = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(0))
        self.dataset = TensorDataset(x, (x.sum(1) > 0).long())

    def _loader(self) -> DataLoader[Any]:
        trainer: Any = self.trainer
        rows = range(trainer.global_rank, SAMPLES, trainer.world_size)
        return DataLoader(self.dataset, self.batch_size, sampler=rows)  # type: ignore[arg-type]

    train_dataloader = val_dataloader = test_dataloader = _loader


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(self.norm(x)))


class Module(LightningModule):
    """Blocks that repeat, layers beside them, a weight that two layers share, and a bare parameter.

    It knows nothing of sharding, and its steps call no ``forward``.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.enter = nn.Linear(4, width)
        self.again = nn.Linear(4, width)
        self.again.weight = self.enter.weight
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.leave = nn.Linear(width, 2)
        self.shift = nn.Parameter(torch.zeros(3))

    def logits(self, x: Tensor) -> Tensor:
        h = self.enter(x) + self.again(x)
        for block in self.blocks:
            h = block(h)
        return self.leave(h) + self.shift[:2]

    def training_step(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.logits(batch[0]), batch[1])

    def sampled_loss(self, batch: Any, generator: torch.Generator) -> Tensor:
        """With the likeliest label in place of a drawn one: the same on any number of ranks."""
        logits = self.logits(batch[0])
        return F.cross_entropy(logits, logits.detach().argmax(-1))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.logits(batch[0]), batch[1]), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self.logits(batch[0]), batch[1]), sync_dist=True)


class WithStatistics(Module):
    """Statistics that training moves, which only the first rank's batches shape."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(self.norm(x))


class Shuffled(Points):
    """Rows that know their number, in an order that is drawn; not as many as divide evenly."""

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__(batch_size)
        rows = 30
        self.dataset = TensorDataset(*(each[:rows] for each in self.dataset.tensors), torch.arange(rows))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, self.batch_size)

    test_dataloader = val_dataloader


class Recording(Module):
    """Remembers which rows it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def training_step(self, batch: Any) -> Tensor:
        self.rows += batch[2].tolist()
        return super().training_step(batch)
