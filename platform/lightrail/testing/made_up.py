"""A made-up table of numbers, for tasks that no installed data serves without a file of the user's."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["MadeUpTable"]


class MadeUpTable(LightningDataModule):
    """Rows of five numbers, and a noisy sum of them to predict.

    Args:
        batch_size: Rows a batch.
    """

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size

    def dimensions(self) -> dict[str, int]:
        """Five features and one target."""
        return {"in_features": 5, "out_features": 1}

    def _rows(self, part: int) -> TensorDataset:
        generator = torch.Generator().manual_seed(part)
        inputs = torch.randn(64, 5, generator=generator)
        return TensorDataset(inputs, inputs.sum(1) + 0.1 * torch.randn(64, generator=generator))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled."""
        return DataLoader(self._rows(0), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """In order."""
        return DataLoader(self._rows(1), batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """In order."""
        return DataLoader(self._rows(2), batch_size=self.batch_size)
