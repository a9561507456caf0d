"""Clients that the data name: writers, hospitals, sensors."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.federated.partition import Partition, Samples
from lightrail.traits import Traits
from lightrail_federated.partitions.dealing import as_indices

__all__ = ["ByColumn"]


class ByColumn(Partition):
    """Samples with the same value in a column stay together: each value is a client, or is dealt to one.

    With as many clients as values, client k has the k-th value in their order. With fewer clients the values are
    shuffled, and dealt out in turn.

    Args:
        column: A key of samples that are mappings, or a place, from 0, in samples that are tuples.

    Raises:
        ConfigurationError: The column is neither a word nor a place.
        CompositionError: The samples have no such column of single values, or it has fewer values than there are
            clients.

    Example:
        >>> writers = torch.tensor([7, 3, 7, 5])
        >>> samples = Samples(torch.utils.data.TensorDataset(torch.zeros(4), torch.zeros(4), writers))
        >>> [part.tolist() for part in ByColumn(column=2).divide(samples, 3, torch.Generator())]
        [[1], [3], [0, 2]]
    """

    traits: ClassVar[Traits] = Traits(
        rule="the values of a column are clients", is_stochastic=True, example={"column": 2}
    )

    def __init__(self, column: str | int) -> None:
        if isinstance(column, bool) or not isinstance(column, str | int) or (isinstance(column, int) and column < 0):
            raise ConfigurationError(
                "column names no column of a sample",
                found=f"column={column!r}",
                allowed="a key, or a place from 0",
                remedy="Set federated.partition.column to a key such as writer, or to a place such as 2.",
            )
        self.column = column

    def divide(self, samples: Samples, clients: int, generator: torch.Generator) -> list[Tensor]:
        values = samples.column(self.column)
        count = int(values.max()) + 1
        if clients > count:
            raise CompositionError(
                "partition 'by_column' has more clients than values",
                found=f"{clients} clients, {count} values in the column {self.column!r}",
                allowed=f"at most {count} clients",
                remedy="Take fewer clients, or a column with more values.",
            )
        client_of = torch.arange(count)
        if clients < count:
            client_of[torch.randperm(count, generator=generator)] = torch.arange(count) % clients
        owners = client_of[values]
        return as_indices([(owners == client).nonzero().flatten().tolist() for client in range(clients)])
