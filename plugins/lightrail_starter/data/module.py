"""The data module that all others here are: three data sets that yield whole batches, and their loaders."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from lightrail.errors import DataError
from lightrail.options import at_least
from lightrail_starter.data.rows import as_is
from lightrail_starter.data.splits import Fractions, Split

__all__ = ["SplitData"]


class SplitData(LightningDataModule):
    """Three parts of one data set, loaded once, when they are first needed.

    Args:
        batch_size: Samples a batch, at least 1.
        num_workers: Processes that load batches; 0 loads them in the training process, best for data in memory.
        split_seed: Seed of the split, independent of the seed of the run.
        val_fraction: Share of the data for validation, in (0, 1).
        test_fraction: Share of the data for test, in (0, 1).
    """

    class_names: list[str] | None = None

    def __init__(
        self, batch_size: int, num_workers: int, split_seed: int, val_fraction: float, test_fraction: float
    ) -> None:
        super().__init__()
        at_least(1, batch_size=batch_size)
        at_least(0, num_workers=num_workers, split_seed=split_seed)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.split_seed = split_seed
        self.fractions = Fractions(val_fraction, test_fraction)

    @abstractmethod
    def load(self) -> Split[Any]:
        """Reads the data: three map-style data sets whose ``__getitems__`` returns a finished batch."""

    @abstractmethod
    def dimensions(self) -> dict[str, int]:
        """The named sizes that models and tasks may need."""

    @cached_property
    def parts(self) -> Split[Any]:
        """The three data sets.

        Raises:
            DataError: Training cannot fill one batch, or another part is empty.
        """
        parts = self.load()
        for name in ("train", "val", "test"):
            size = len(getattr(parts, name))
            needed = self.batch_size if name == "train" else 1
            if size < needed:
                raise DataError(
                    f"the {name} part of the data cannot fill one batch",
                    found=f"{size} samples in {name}",
                    allowed=f"at least {needed} (data.batch_size={self.batch_size})",
                    remedy=f"Lower data.batch_size to at most {size}, or give more data."
                    if name == "train" and size
                    else f"Give more data, or a larger share to {name}.",
                )
        return parts

    def setup(self, stage: str) -> None:
        """Reads the data."""
        _ = self.parts

    def _loader(self, dataset: Dataset[Any], *, shuffle: bool) -> DataLoader[Any]:
        # Without a generator of its own, the loader draws the order from torch's global one: the seed of the run
        # decides it, and a resumed run repeats it.
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            collate_fn=as_is,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.num_workers > 0 and torch.cuda.is_available(),
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled; the last batch of an epoch may be smaller."""
        return self._loader(self.parts.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """In order."""
        return self._loader(self.parts.val, shuffle=False)

    def test_dataloader(self) -> DataLoader[Any]:
        """In order."""
        return self._loader(self.parts.test, shuffle=False)
