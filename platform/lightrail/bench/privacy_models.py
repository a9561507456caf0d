"""What private training is measured on: three models with a loss, and records to train them on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["CLASSES", "MODELS", "Classification", "Records", "loss_of", "records_for"]

CLASSES = 10
_VOCABULARY, _LENGTH = 2048, 32


class _Residual(nn.Module):
    """Two convolutions with GroupNorm, beside a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.GroupNorm(8, out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.GroupNorm(8, out),
        )  # fmt: skip
        is_same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if is_same else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.first(x) + self.shortcut(x))


class _Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class _Block(nn.Module):
    """A transformer's block, before whose parts it is normalised; of layers that every library knows."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.mixed(self.before(x)).chunk(3, -1)
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in parts)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        return x + self.narrow(F.gelu(self.wide(self.between(x))))


class _Transformer(nn.Module):
    def __init__(self, width: int = 256, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(_VOCABULARY, width)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.blocks(self.tokens(x))).mean(1))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(1024, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, CLASSES))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.GroupNorm(8, 32), nn.ReLU(),
        _Residual(32, 32, 1), _Residual(32, 64, 2), _Residual(64, 128, 2), _Residual(128, 128, 1),
        _Pooled(), nn.Linear(128, CLASSES),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (_mlp, (1024,)),
    "cnn": (_cnn, (3, 32, 32)),
    "tokens": (_Transformer, (_LENGTH,)),
    # What a process trains before it is measured, so that libraries are loaded and threads are there.
    "tiny": (lambda: nn.Sequential(nn.Linear(4, CLASSES)), (4,)),
}
"""How each is built, and the shape of one record."""


def records_for(model: str, count: int) -> TensorDataset:
    """Random records of a model, with a class each."""
    shape = MODELS[model][1]
    x = torch.randint(_VOCABULARY, (count, *shape)) if model == "tokens" else torch.randn(count, *shape)
    return TensorDataset(x, torch.randint(CLASSES, (count,)))


def loss_of(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy, the mean over samples."""
    return F.cross_entropy(logits, classes)


class Classification(pl.LightningModule):
    """A model as a task; calls ``begun`` where a step begins.

    Args:
        network: Which of :data:`MODELS`.
    """

    begun: Callable[[int], None] | None = None

    def __init__(self, network: str) -> None:
        super().__init__()
        self.model = MODELS[network][0]()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.begun is not None and not torch.is_inference_mode_enabled():
            self.begun(batch_idx)
        x, y = batch
        return loss_of(self.model(x), y)


class Records(pl.LightningDataModule):
    """Records of a model.

    Args:
        network: Which of :data:`MODELS`.
        count: How many.
        batch_size: Of one step.
    """

    def __init__(self, network: str, count: int, batch_size: int) -> None:
        super().__init__()
        self.records, self.batch_size = records_for(network, count), batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.records, self.batch_size, shuffle=True)
