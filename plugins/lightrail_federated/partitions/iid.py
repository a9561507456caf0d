"""Every client is like every other."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightrail.federated.partition import Partition, Samples
from lightrail.traits import Traits
from lightrail_federated.partitions.dealing import require_samples

__all__ = ["IID"]


class IID(Partition):
    """Deals the shuffled samples out evenly; the first clients have one more where they do not come out even.

    Raises:
        CompositionError: There are more clients than samples.

    Example:
        >>> samples = Samples(torch.utils.data.TensorDataset(torch.zeros(5)))
        >>> parts = IID().divide(samples, 2, torch.Generator())
        >>> [len(part) for part in parts], sorted(torch.cat(parts).tolist())
        ([3, 2], [0, 1, 2, 3, 4])
    """

    traits: ClassVar[Traits] = Traits(rule="a random n/N of the samples each", is_stochastic=True)

    def divide(self, samples: Samples, clients: int, generator: torch.Generator) -> list[Tensor]:
        require_samples("iid", len(samples), clients)
        return list(torch.randperm(len(samples), generator=generator).tensor_split(clients))
