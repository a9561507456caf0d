"""A circle."""

from __future__ import annotations

from typing import ClassVar

import torch

from lightrail.federated.topology import Topology
from lightrail.traits import Traits

__all__ = ["Ring"]


class Ring(Topology):
    """Each node speaks with the next and the one before: weights 1/3, 1/3, 1/3.

    Two nodes have one edge, and weights 1/2. The second eigenvalue is (1 + 2 cos(2π/n))/3 from three nodes on.

    Example:
        >>> Ring().edges(3, torch.Generator()), Ring().edges(2, torch.Generator())
        ([(0, 1), (1, 2), (0, 2)], [(0, 1)])
    """

    traits: ClassVar[Traits] = Traits(rule="i speaks with i ± 1 mod n")

    def edges(self, nodes: int, generator: torch.Generator) -> list[tuple[int, int]]:
        around = [(i, i + 1) for i in range(nodes - 1)]
        return [*around, (0, nodes - 1)] if nodes > 2 else around
