"""Fixed splits into training, validation and test parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from lightrail.errors import ConfigurationError
from lightrail.options import between

__all__ = ["Fractions", "Split", "split_documents", "split_indices"]

Part = TypeVar("Part")

CUT_BY_DOCUMENT_FROM = 10  # with fewer, whole documents could not come near the fractions


@dataclass(frozen=True)
class Split(Generic[Part]):
    """Three disjoint parts of one data set."""

    train: Part
    val: Part
    test: Part


@dataclass(frozen=True)
class Fractions:
    """The shares of the data that validation and test get; training gets the rest.

    Args:
        val: Between 0 and 1.
        test: Between 0 and 1.

    Raises:
        ConfigurationError: One is out of range, or nothing is left for training.
    """

    val: float
    test: float

    def __post_init__(self) -> None:
        between(0, 1, closed="neither", val_fraction=self.val, test_fraction=self.test)
        if self.val + self.test >= 1:
            raise ConfigurationError(
                "val_fraction and test_fraction leave nothing for training",
                found=f"val_fraction={self.val}, test_fraction={self.test}",
                allowed="two fractions that add up to less than 1",
                remedy="Lower one of them.",
            )


def split_indices(labels: np.ndarray | int, fractions: Fractions, seed: int) -> Split[np.ndarray]:
    """Draws three disjoint sets of indices, each in increasing order.

    Args:
        labels: The class of each sample, ``[N]``, for a split in which every part has the same mixture of classes; or
            the number of samples, for a plain one.
        fractions: The shares.
        seed: Equal seeds give equal splits, on every machine and with every version of NumPy.

    Example:
        >>> parts = split_indices(np.array([0] * 10 + [1] * 20), Fractions(0.1, 0.2), seed=0)
        >>> len(parts.train), len(parts.val), len(parts.test), int((parts.test >= 10).sum())
        (21, 3, 6, 4)
    """
    # NumPy freezes the stream of the old generator for good; that of the new one may change.
    random = np.random.RandomState(seed)
    groups = (
        [np.arange(labels)] if isinstance(labels, int) else [np.flatnonzero(labels == c) for c in np.unique(labels)]
    )
    train, val, test = [], [], []
    for group in groups:
        order = random.permutation(group)
        num_val, num_test = round(len(order) * fractions.val), round(len(order) * fractions.test)
        val.append(order[:num_val])
        test.append(order[num_val : num_val + num_test])
        train.append(order[num_val + num_test :])
    return Split(*(np.sort(np.concatenate(part)) if part else np.arange(0) for part in (train, val, test)))


def split_documents(documents: Sequence[bytes], fractions: Fractions, seed: int) -> Split[bytes]:
    """Splits texts so that each part gets about its share of the bytes.

    Ten documents or more are dealt out whole, in an order drawn with ``seed``; fewer are joined, and the end of the
    text goes to validation and test.

    Example:
        >>> parts = split_documents([b"a" * 80 + b"b" * 10 + b"c" * 10], Fractions(0.1, 0.1), seed=0)
        >>> parts.val, parts.test
        (b'bbbbbbbbbb', b'cccccccccc')
    """
    size = sum(map(len, documents))
    if len(documents) < CUT_BY_DOCUMENT_FROM:
        text = b"\n\n".join(documents)
        first, second = round(len(text) * (1 - fractions.val - fractions.test)), round(len(text) * (1 - fractions.test))
        return Split(text[:first], text[first:second], text[second:])
    parts: dict[str, list[bytes]] = {"train": [], "val": [], "test": []}
    wanted = {"val": fractions.val * size, "test": fractions.test * size}
    for index in np.random.RandomState(seed).permutation(len(documents)):
        name = next((n for n, rest in wanted.items() if sum(map(len, parts[n])) < rest), "train")
        parts[name].append(documents[index])
    return Split(*(b"\n\n".join(part) for part in parts.values()))
