"""One in the middle."""

from __future__ import annotations

from typing import ClassVar

import torch

from lightrail.federated.topology import Topology
from lightrail.traits import Traits

__all__ = ["Star"]


class Star(Topology):
    """Every node speaks with node 0 alone: weights 1/n, so that the second eigenvalue is 1 − 1/n.

    Example:
        >>> Star().edges(4, torch.Generator())
        [(0, 1), (0, 2), (0, 3)]
    """

    traits: ClassVar[Traits] = Traits(rule="i speaks with 0")

    def edges(self, nodes: int, generator: torch.Generator) -> list[tuple[int, int]]:
        return [(0, i) for i in range(1, nodes)]
