"""Partitions: which client has which samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightrail.errors import CompositionError

__all__ = ["Partition", "Samples"]


class Samples:
    """The training data, as a partition sees it.

    Args:
        dataset: Map-style.
        rebuild: Makes the training dataset of the run's data plugin with some options changed; ``None`` where the run
            has no data plugin.

    Example:
        >>> samples = Samples(torch.utils.data.TensorDataset(torch.zeros(3, 2), torch.tensor([1, 0, 1])))
        >>> len(samples), samples.labels.tolist()
        (3, [1, 0, 1])
    """

    def __init__(self, dataset: Dataset[Any], rebuild: Callable[..., Dataset[Any]] | None = None) -> None:
        self.dataset = dataset
        self.rebuild = rebuild

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    @cached_property
    def labels(self) -> Tensor:
        """The label of each sample, ``[n]`` int64; words are numbered in the order of the alphabet.

        It is the second element of a sample, or its ``label``, ``labels``, ``target`` or ``y``.

        Raises:
            CompositionError: Samples have no label that is one whole number or word.
        """
        return self._column(("label", "labels", "target", "y"), 1, "labels")

    @property
    def known_labels(self) -> Tensor | None:
        """The labels, where they were asked for already or lie in the dataset's tensors; ``None`` otherwise."""
        is_at_hand = "labels" in vars(self) or hasattr(self.dataset, "tensors")
        try:
            return self.labels if is_at_hand else None
        except CompositionError:
            return None

    def column(self, key: str | int) -> Tensor:
        """Another column of the samples, ``[n]`` int64: its distinct values are numbered in their order.

        Args:
            key: A key of samples that are mappings, or a place in samples that are sequences.

        Raises:
            CompositionError: Samples have no such column of single values.
        """
        return self._column((key,), key if isinstance(key, int) else None, f"column {key!r}")

    def _column(self, keys: Sequence[str | int], place: int | None, what: str) -> Tensor:
        values = [_value(self.dataset[i], keys, place) for i in range(len(self))]
        if any(value is None for value in values):
            found = self.dataset[next(i for i, value in enumerate(values) if value is None)]
            allowed = "samples (x, y) or mappings in which it is a single number or word"
            raise _refusal(what, f"a sample that is {_described(found)}", allowed)
        if what == "labels" and all(isinstance(value, int) for value in values):
            return torch.tensor(values, dtype=torch.int64)
        fraction = next((value for value in values if isinstance(value, float)), None)
        if what == "labels" and fraction is not None:
            raise _refusal(what, f"a sample whose label is {fraction:g}", "labels that are whole numbers or words")
        distinct = sorted(set(values), key=lambda value: (isinstance(value, str), value))
        numbers = {value: number for number, value in enumerate(distinct)}
        return torch.tensor([numbers[value] for value in values], dtype=torch.int64)


class Partition:
    """Divides the samples among clients; subclass it, and override :meth:`divide`. Options are those of ``__init__``.

    Example:
        >>> class Alternating(Partition):
        ...     def divide(self, samples, clients, generator):
        ...         return [torch.arange(k, len(samples), clients) for k in range(clients)]
        >>> samples = Samples(torch.utils.data.TensorDataset(torch.zeros(5)))
        >>> [each.tolist() for each in Alternating().divide(samples, 2, torch.Generator())]
        [[0, 2, 4], [1, 3]]
    """

    def divide(self, samples: Samples, clients: int, generator: torch.Generator) -> list[Tensor]:
        """Which samples each client has.

        Args:
            samples: All of them.
            clients: How many clients, at most as many as samples.
            generator: Where random numbers come from; seeded by the run.

        Returns:
            Indices ``[n_k]`` int64, one tensor a client; no sample twice, and none of them empty.
        """
        raise NotImplementedError

    def datasets(self, samples: Samples, clients: int, generator: torch.Generator) -> list[Dataset[Any]] | None:
        """A dataset for each client, where clients have sources of their own; ``None`` where :meth:`divide` says."""
        return None


def _refusal(what: str, found: str, allowed: str) -> CompositionError:
    return CompositionError(
        f"the samples have no {what} to divide them by",
        found=found,
        allowed=allowed,
        remedy="Use federated.partition=iid, or data whose samples have it.",
    )


def _value(sample: Any, keys: Sequence[str | int], place: int | None) -> int | str | float | None:
    found: Any = None
    if isinstance(sample, dict):
        found = next((sample[key] for key in keys if key in sample), None)
    elif isinstance(sample, Sequence) and place is not None and not isinstance(sample, str) and place < len(sample):
        found = sample[place]
    if isinstance(found, str):
        return found
    if not isinstance(found, Tensor):
        found = torch.as_tensor(found) if isinstance(found, int | float) or hasattr(found, "__array__") else None
    if found is None or found.numel() != 1:
        return None
    number = found.item()
    if not math.isfinite(number):
        return None
    return int(number) if number == int(number) else number


def _described(sample: Any) -> str:
    if isinstance(sample, dict):
        return "a mapping of " + ", ".join(map(repr, sample))
    if isinstance(sample, tuple | list):
        return f"a {type(sample).__name__} of " + ", ".join(
            f"{type(each).__name__}{list(each.shape)}" if isinstance(each, Tensor) else type(each).__name__
            for each in sample
        )
    return f"a {type(sample).__name__}"
