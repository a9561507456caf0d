"""A user's table: numbers in columns, one of them the target."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lightrail.traits import Traits
from lightrail_starter.data.module import SplitData
from lightrail_starter.data.rows import Rows
from lightrail_starter.data.splits import Split, split_indices
from lightrail_starter.data.table_file import Sheet, column, numbers, read_sheet, refuse_unlabelled

__all__ = ["Table"]


class Table(SplitData):
    """A CSV file with a header line: every column but the target is a feature, and a number.

    A batch is ``(features [B, in_features] float32, target [B])``. Features, and the target of a regression, are
    standardised with the mean and the standard deviation of the training part, so that the same learning rates serve
    every table; :meth:`original_units` goes back.

    Args:
        path: The file.
        target: The name of the target's column.
        classes: Whether the target names classes (words or numbers), for classification; otherwise it is a number,
            for regression.
        ignore: Names of columns that are left out.
        delimiter: What stands between the cells.
        batch_size: Rows a batch, at least 1.
        num_workers: Processes that load batches; the table lies in memory, so 0 is fastest.
        split_seed: Seed of the split, independent of the seed of the run.
        val_fraction: Share of the rows for validation, in (0, 1).
        test_fraction: Share of the rows for test, in (0, 1).

    Raises:
        DataError: On reading: the file is missing or empty, has no such column, or has a cell that is not a finite
            number; line and column are named.
    """

    traits: ClassVar[Traits] = Traits(
        fits_to_data="standardises columns by the means and deviations of the training rows"
    )

    def __init__(
        self,
        path: str,
        target: str,
        classes: bool = False,
        ignore: list[str] | None = None,
        delimiter: str = ",",
        batch_size: int = 32,
        num_workers: int = 0,
        split_seed: int = 0,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
    ) -> None:
        super().__init__(batch_size, num_workers, split_seed, val_fraction, test_fraction)
        self.path = Path(path).expanduser()
        self.target = target
        self.classes = classes
        self.ignore = list(ignore or ())
        self.delimiter = delimiter

    @cached_property
    def _sheet(self) -> Sheet:
        sheet = read_sheet(self.path, self.delimiter)
        for name in (self.target, *self.ignore):
            column(sheet, name)
        return sheet

    @cached_property
    def feature_names(self) -> list[str]:
        """The columns that are features, in their order."""
        return [name for name in self._sheet.header if name != self.target and name not in self.ignore]

    @cached_property
    def _labels(self) -> np.ndarray:
        """The class of each row, as an index into ``class_names``."""
        where = column(self._sheet, self.target)
        cells = [row[where].strip() for row in self._sheet.rows]
        if "" in cells:
            refuse_unlabelled(self._sheet, cells.index(""), self.target)
        names = sorted(set(cells), key=_by_number)
        self.class_names = names
        index = {name: i for i, name in enumerate(names)}
        return np.array([index[cell] for cell in cells])

    @cached_property
    def _features(self) -> np.ndarray:
        return numbers(self._sheet, self.feature_names)

    @cached_property
    def _values(self) -> np.ndarray:
        """The target of a regression, ``[rows, 1]``."""
        return numbers(self._sheet, [self.target], remedy="; if the target names classes, set data.classes=true")

    def dimensions(self) -> dict[str, int]:
        """The number of features, and of classes if the target names classes."""
        _ = self._features, self._labels if self.classes else self._values
        sizes = {"in_features": len(self.feature_names), "out_features": 1}
        if self.classes:
            sizes["num_classes"] = sizes["out_features"] = int(self._labels.max()) + 1
        return sizes

    def load(self) -> Split[Any]:
        parts = split_indices(self._labels if self.classes else len(self._values), self.fractions, self.split_seed)
        mean, scale = _statistics(self._features[parts.train])
        features = torch.from_numpy((self._features - mean) / scale).float()
        if self.classes:
            target = torch.from_numpy(self._labels)
        else:
            self._mean, self._scale = (float(value[0]) for value in _statistics(self._values[parts.train]))
            target = torch.from_numpy((self._values[:, 0] - self._mean) / self._scale).float()
        return Split(*(Rows(features[part], target[part]) for part in (parts.train, parts.val, parts.test)))

    def original_units(self, values: Tensor) -> Tensor:
        """Standardised targets or predictions of a regression, in the units of the file."""
        _ = self.parts
        return values * self._scale + self._mean if not self.classes else values

    @property
    def target_scale(self) -> float:
        """The size of one standardised unit of the target, in the units of the file."""
        _ = self.parts
        return 1.0 if self.classes else self._scale


def _statistics(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if not len(values):
        return np.zeros(values.shape[1]), np.ones(values.shape[1])
    deviation = values.std(axis=0)
    return values.mean(axis=0), np.where(deviation > 0, deviation, 1.0)


def _by_number(cell: str) -> tuple[int, float, str]:
    try:
        return (0, float(cell), cell)
    except ValueError:
        return (1, 0.0, cell)
