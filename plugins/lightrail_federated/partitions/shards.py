"""Clients that have a few labels each."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightrail.federated.partition import Partition, Samples
from lightrail.options import at_least
from lightrail.traits import Traits
from lightrail_federated.partitions.dealing import require_samples

__all__ = ["Shards"]


class Shards(Partition):
    """Sorts the samples by label, cuts them into shards of one size, and deals these out at random.

    Args:
        shards_per_client: At least 1; two of them are at most four labels, and as a rule two.

    Raises:
        ConfigurationError: The option is out of range.
        CompositionError: The samples have no labels, or there are more shards than samples.

    Example:
        >>> labels = torch.arange(100) % 10
        >>> samples = Samples(torch.utils.data.TensorDataset(torch.zeros(100), labels))
        >>> parts = Shards(shards_per_client=2).divide(samples, 5, torch.Generator())
        >>> [len(labels[part].unique()) for part in parts]
        [2, 2, 2, 2, 2]

    Reference:
        H. B. McMahan, E. Moore, D. Ramage, S. Hampson and B. Agüera y Arcas (2017), Communication-Efficient Learning of
        Deep Networks from Decentralized Data, AISTATS, arXiv 1602.05629, section 3.
    """

    traits: ClassVar[Traits] = Traits(
        rule="sorted by label, cut into shards, so many dealt to each",
        paper="H. B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Agüera y Arcas, 2017, Communication-Efficient "
        "Learning of Deep Networks from Decentralized Data, arXiv 1602.05629",
        is_stochastic=True,
    )

    def __init__(self, shards_per_client: int = 2) -> None:
        at_least(1, shards_per_client=shards_per_client)
        self.shards_per_client = int(shards_per_client)

    def divide(self, samples: Samples, clients: int, generator: torch.Generator) -> list[Tensor]:
        require_samples("shards", len(samples), clients, self.shards_per_client)
        by_label = samples.labels.argsort(stable=True)
        shards = by_label.tensor_split(clients * self.shards_per_client)
        dealt = torch.randperm(len(shards), generator=generator).view(clients, -1).tolist()
        return [torch.cat([shards[each] for each in hand]) for hand in dealt]
