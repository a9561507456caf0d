"""Two interleaved half circles, the smallest data on which a generative model can be seen to work."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightrail.options import at_least, non_negative
from lightrail.traits import Traits

__all__ = ["TwoMoons"]


class TwoMoons(LightningDataModule):
    """Points on two half circles of radius 1, with normal noise; no file is read.

    With u uniform in [0, π] and z normal, class 0 is (cos u, sin u) + noise · z and class 1 is
    (1 − cos u, 1/2 − sin u) + noise · z.

    A batch is ``(points [B, 2] float32, labels [B] int64)``. Both classes are as large, up to one point.

    Args:
        batch_size: Points a batch, at least 1.
        num_workers: Processes that load batches; 0 is fastest here.
        samples: Points for training, at least ``batch_size``; validation and test have a quarter as many each.
        noise: The standard deviation of the noise, at least 0.
        data_seed: Of the points, independent of the seed of the run.

    Raises:
        ConfigurationError: An option is out of range.

    Example:
        >>> data = TwoMoons(batch_size=16)
        >>> points, labels = next(iter(data.train_dataloader()))
        >>> tuple(points.shape), tuple(labels.shape)
        ((16, 2), (16,))
    """

    traits: ClassVar[Traits] = Traits(example={"batch_size": 16, "samples": 256})

    def __init__(
        self,
        batch_size: int = 256,
        num_workers: int = 0,
        samples: int = 4096,
        noise: float = 0.06,
        data_seed: int = 0,
    ) -> None:
        super().__init__()
        at_least(1, batch_size=batch_size)
        at_least(0, num_workers=num_workers, data_seed=data_seed)
        at_least(max(8, batch_size), samples=samples)
        non_negative(noise=noise)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.samples = samples
        self.noise = noise
        self.data_seed = data_seed
        self.class_names = ["upper", "lower"]

    def dimensions(self) -> dict[str, int]:
        """Two numbers a point, two classes."""
        return {"in_features": 2, "num_classes": 2, "out_features": 2}

    @cached_property
    def parts(self) -> dict[str, _Points]:
        """The points for training, validation and test, drawn one after the other."""
        # NumPy froze the stream of its old generator for good: equal seeds give equal points everywhere.
        random = np.random.RandomState(self.data_seed)
        sizes = {"train": self.samples, "val": self.samples // 4, "test": self.samples // 4}
        return {name: _Points(*_moons(size, self.noise, random)) for name, size in sizes.items()}

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled; the last batch of an epoch may be smaller."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """In order."""
        return self._loader("val", shuffle=False)

    def test_dataloader(self) -> DataLoader[Any]:
        """In order."""
        return self._loader("test", shuffle=False)

    def _loader(self, name: str, *, shuffle: bool) -> DataLoader[Any]:
        return DataLoader(
            self.parts[name],
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            collate_fn=_as_is,
            persistent_workers=self.num_workers > 0,
        )


class _Points(Dataset[tuple[Tensor, Tensor]]):
    """Points and labels, read a batch at a time."""

    def __init__(self, points: Tensor, labels: Tensor) -> None:
        self.points = points
        self.labels = labels

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.points[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        where = torch.tensor(indices)
        return self.points[where], self.labels[where]


def _as_is(batch: Any) -> Any:
    return batch


def _moons(count: int, noise: float, random: np.random.RandomState) -> tuple[Tensor, Tensor]:
    labels = np.arange(count) % 2
    angles = random.uniform(0, np.pi, count)
    upper = np.stack((np.cos(angles), np.sin(angles)), axis=1)
    lower = np.stack((1 - np.cos(angles), 0.5 - np.sin(angles)), axis=1)
    points = np.where(labels[:, None] == 0, upper, lower) + noise * random.normal(size=(count, 2))
    return torch.from_numpy(points.astype(np.float32)), torch.from_numpy(labels.astype(np.int64))
