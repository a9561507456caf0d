"""Clients with data of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch.utils.data import Dataset

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.federated.partition import Partition, Samples
from lightrail.traits import Traits

__all__ = ["Sources"]


class Sources(Partition):
    """Builds the data once for each client, with another value of one option: another file, another folder.

    Args:
        option: An option of the data plugin, such as ``path``.
        values: Its value for each client, at least one.

    Raises:
        ConfigurationError: No option or no values are given.
        CompositionError: There are not as many values as clients, the run has no data plugin, or a source is empty.

    Example:
        >>> def rebuild(**changes):
        ...     return torch.utils.data.TensorDataset(torch.zeros(changes["rows"]))
        >>> samples = Samples(rebuild(rows=1), rebuild)
        >>> [len(each) for each in Sources("rows", [2, 3]).datasets(samples, 2, torch.Generator())]
        [2, 3]
    """

    traits: ClassVar[Traits] = Traits(
        rule="a data source of its own for each client", example={"option": "path", "values": ["a", "b"]}
    )

    def __init__(self, option: str, values: Sequence[Any]) -> None:
        if not isinstance(option, str) or not option or isinstance(values, str) or not len(values):
            raise ConfigurationError(
                "partition 'sources' needs an option of the data and its value for each client",
                found=f"option={option!r}, values={values!r}",
                allowed="a name, and a list of at least one value",
                remedy="Write federated.partition.option=path federated.partition.values=[a.csv,b.csv].",
            )
        self.option, self.values = option, list(values)

    def datasets(self, samples: Samples, clients: int, generator: torch.Generator) -> list[Dataset[Any]]:
        if samples.rebuild is None:
            raise CompositionError(
                "partition 'sources' has no data plugin to build again for each client",
                found="a run whose data were not built by lightrail",
                allowed="a run with +data=NAME",
                remedy="Choose a data plugin, or use another partition.",
            )
        if len(self.values) != clients:
            raise CompositionError(
                "partition 'sources' needs one value a client",
                found=f"{len(self.values)} values, {clients} clients",
                allowed=f"{clients} values",
                remedy=f"Set federated.clients={len(self.values)}, or list a value of {self.option} for each client.",
            )
        found = [samples.rebuild(**{self.option: value}) for value in self.values]
        for value, dataset in zip(self.values, found, strict=True):
            if not len(dataset):  # type: ignore[arg-type]
                raise CompositionError(
                    "a source of partition 'sources' has no samples",
                    found=f"{self.option}={value}",
                    allowed="at least one sample a client",
                    remedy="Leave that source out, or mend it.",
                )
        return found
