"""Everybody with everybody."""

from __future__ import annotations

from typing import ClassVar

import torch

from lightrail.federated.topology import Topology
from lightrail.traits import Traits

__all__ = ["Complete"]


class Complete(Topology):
    """Every node speaks with every other: weights 1/n, so that one round is the mean.

    Example:
        >>> Complete().mixing(4, torch.Generator())[0].tolist()
        [0.25, 0.25, 0.25, 0.25]
    """

    traits: ClassVar[Traits] = Traits(rule="W = 1 1ᵀ / n")

    def edges(self, nodes: int, generator: torch.Generator) -> list[tuple[int, int]]:
        return [(i, j) for i in range(nodes) for j in range(i + 1, nodes)]
