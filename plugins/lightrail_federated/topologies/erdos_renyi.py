"""A random graph."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from lightrail.errors import CompositionError
from lightrail.federated.topology import Topology, is_connected
from lightrail.options import between
from lightrail.traits import Traits

__all__ = ["ErdosRenyi"]

_TRIES = 100


class ErdosRenyi(Topology):
    """Each pair of nodes has an edge with probability p; drawn again until all are connected.

    Args:
        p: In (0, 1]. Graphs are connected as a rule where it is above ln(n)/n.

    Raises:
        ConfigurationError: p is out of range.
        CompositionError: None of 100 graphs was connected.

    Example:
        >>> ErdosRenyi(p=1.0).edges(3, torch.Generator())
        [(0, 1), (0, 2), (1, 2)]

    Reference:
        P. Erdős and A. Rényi (1960), On the Evolution of Random Graphs; with independent edges: E. N. Gilbert (1959),
        Random Graphs, Annals of Mathematical Statistics 30(4).
    """

    traits: ClassVar[Traits] = Traits(
        rule="an edge with probability p",
        paper="E. N. Gilbert, 1959, Random Graphs, doi 10.1214/aoms/1177706098",
        is_stochastic=True,
    )

    def __init__(self, p: float = 0.5) -> None:
        between(0.0, 1.0, closed="right", p=p)
        self.p = p

    def edges(self, nodes: int, generator: torch.Generator) -> list[tuple[int, int]]:
        for _ in range(_TRIES):
            drawn = torch.rand(nodes, nodes, generator=generator, dtype=torch.float64) < self.p
            upper = drawn.triu(1)
            both = upper | upper.T
            # Lonely nodes are the usual reason, and quick to see.
            if bool(both.any(1).all()) and is_connected(both):
                return [(i, j) for i, j in upper.nonzero().tolist()]
        raise CompositionError(
            "topology 'erdos_renyi' makes no connected graph",
            found=f"p={self.p:g} with {nodes} nodes: none of {_TRIES} graphs was connected",
            allowed=f"p above ln(n)/n = {math.log(nodes) / nodes:.3g}, as a rule",
            remedy="Set federated.topology.p higher.",
        )
