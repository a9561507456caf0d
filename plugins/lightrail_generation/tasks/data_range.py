"""What the training data are like: their range, their size, the shape of a sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightrail.errors import DataError
from lightrail.step.randomness import RandomState

__all__ = ["DataRange", "inputs_of", "labels_of", "measured", "training_batches"]


@dataclass(frozen=True)
class DataRange:
    """A pass over the training data.

    Args:
        low: The smallest number in them.
        high: The largest.
        mean: Of all numbers.
        square: The mean of their squares.
        shape: Of one sample.
        classes: One more than the largest label; 0 where there are none.
    """

    low: float
    high: float
    mean: float
    square: float
    shape: tuple[int, ...]
    classes: int

    def root_mean_square(self, center: float, scale: float) -> float:
        """Of the states (x − center)/scale."""
        return max(self.square - 2 * center * self.mean + center**2, 0.0) ** 0.5 / scale


def inputs_of(batch: Any) -> Tensor:
    """The data of a batch that is a tensor, or begins with one.

    Raises:
        DataError: They are no real numbers.
    """
    x = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise DataError(
            "noise cannot be added to these data",
            found=f"a batch that begins with {x.dtype if isinstance(x, Tensor) else type(x).__name__}",
            allowed="tensors of real numbers [B, …], or (tensor, label)",
            remedy="Choose data of images or points: data=digits, data=two_moons, data=image_folder.",
        )
    return x


def labels_of(batch: Any) -> Tensor | None:
    """The labels ``[B]`` of a batch; ``None`` where it has none."""
    label = batch[-1] if isinstance(batch, list | tuple) and len(batch) > 1 else None
    if not isinstance(label, Tensor) or label.is_floating_point() or label.dim() != 1:
        return None
    return label.long()


def training_batches(loader: Iterable[Any]) -> Iterator[Any]:
    """One pass over a loader, which moves no random numbers of the run."""
    with RandomState.kept():
        yield from loader


def measured(batches: Iterable[Any]) -> DataRange:
    """What the data are like.

    Raises:
        DataError: They are empty, constant, or not finite.
    """
    low, high, total, square, count, classes = float("inf"), float("-inf"), 0.0, 0.0, 0, 0
    shape: tuple[int, ...] = ()
    for batch in batches:
        x, label = inputs_of(batch).double(), labels_of(batch)
        shape = tuple(x.shape[1:])
        ends = torch.aminmax(x)
        low, high = min(low, float(ends.min)), max(high, float(ends.max))
        total, square, count = total + float(x.sum()), square + float(x.square().sum()), count + x.numel()
        classes = classes if label is None else max(classes, int(label.max()) + 1)
    if not (low < high < float("inf") and low > float("-inf")):
        raise DataError(
            "the range of the training data cannot be measured",
            found=f"values from {low} to {high} in {count} numbers",
            allowed="finite data that are not all the same",
            remedy="Look at the data, or give task.center and task.scale.",
        )
    return DataRange(low, high, total / count, square / count, shape, classes)
