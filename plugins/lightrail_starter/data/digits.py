"""Handwritten digits, from the copy that scikit-learn carries."""

from __future__ import annotations

import gzip
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from lightrail.errors import DataError
from lightrail.traits import Traits
from lightrail_starter.data.module import SplitData
from lightrail_starter.data.rows import Rows
from lightrail_starter.data.splits import Split, split_indices

__all__ = ["Digits"]


class Digits(SplitData):
    """1797 real handwritten digits, 8 by 8 pixels in 17 grey levels; no download.

    A batch is ``(images [B, 1, 8, 8] float32 in [0, 1], labels [B] int64)``. The three parts have the same mixture of
    digits.

    Args:
        batch_size: Samples a batch, at least 1.
        num_workers: Processes that load batches; 0 is fastest here.
        split_seed: Seed of the split, independent of the seed of the run.
        val_fraction: Share of the images for validation, in (0, 1).
        test_fraction: Share of the images for test, in (0, 1).

    Example:
        >>> data = Digits(batch_size=16)
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> tuple(images.shape), tuple(labels.shape)
        ((16, 1, 8, 8), (16,))

    Reference:
        E. Alpaydin and C. Kaynak (1998), Optical Recognition of Handwritten Digits, UCI Machine Learning Repository.
    """

    traits: ClassVar[Traits] = Traits(example={"batch_size": 16})

    def __init__(
        self,
        batch_size: int = 32,
        num_workers: int = 0,
        split_seed: int = 0,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
    ) -> None:
        super().__init__(batch_size, num_workers, split_seed, val_fraction, test_fraction)
        self.class_names = [str(digit) for digit in range(10)]

    def dimensions(self) -> dict[str, int]:
        """The sizes of the images and the number of digits."""
        return {"in_features": 64, "in_channels": 1, "image_size": 8, "num_classes": 10, "out_features": 10}

    @cached_property
    def _table(self) -> np.ndarray:
        return _read()

    def load(self) -> Split[Any]:
        images = torch.from_numpy(self._table[:, :64].astype(np.float32) / 16).view(-1, 1, 8, 8)
        labels = torch.from_numpy(self._table[:, 64].astype(np.int64))
        parts = split_indices(labels.numpy(), self.fractions, self.split_seed)
        return Split(*(Rows(images[part], labels[part]) for part in (parts.train, parts.val, parts.test)))


def _read() -> np.ndarray:
    """64 pixels in 0..16 and the digit, ``[1797, 65]``."""
    # Importing scikit-learn takes seconds; finding its folder takes none.
    spec = find_spec("sklearn")
    folder = next(iter(spec.submodule_search_locations or [])) if spec is not None else None
    path = Path(folder or "sklearn") / "datasets" / "data" / "digits.csv.gz"
    if not path.is_file():
        raise DataError(
            "the embedded digits are not there",
            found=f"no file {path}",
            allowed="an installed scikit-learn, which carries them",
            remedy="Run `pip install --force-reinstall scikit-learn`.",
        )
    cells = gzip.decompress(path.read_bytes()).replace(b"\n", b",").rstrip(b",").split(b",")
    return np.array(cells, dtype=np.float32).reshape(-1, 65)
