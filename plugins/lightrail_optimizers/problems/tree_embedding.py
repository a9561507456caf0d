"""A tree embedded in hyperbolic space."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightrail.bench.claims.problem import CountedClosure, Problem
from lightrail.errors import PluginError
from lightrail.traits import Traits

__all__ = ["TreeEmbedding"]


class TreeEmbedding(Problem):
    """A binary tree of 63 nodes in the Poincaré disc, each node to be closer to its kin than to strangers.

    The merit is the mean loss over all edges, each against the same 20 strangers.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> 2 < TreeEmbedding().merit() < 4
        True
    """

    traits = Traits(rule="softmax of negative Poincaré distances, 62 edges of a binary tree, 20 strangers each")
    passes = 300

    def __init__(self) -> None:
        try:
            import geoopt
        except ImportError as error:
            raise PluginError(
                "the problem 'tree_embedding' lives on a manifold of geoopt, which is not installed",
                found=str(error),
                allowed="geoopt 0.5 or newer",
                remedy="Install lightrail[manifold].",
            ) from error
        self._ball: Any = geoopt.PoincareBall()
        parameter: Any = geoopt.ManifoldParameter
        self._points = parameter(1e-3 * torch.randn(63, 2, dtype=torch.float64), manifold=self._ball)
        self._child = torch.arange(1, 63)
        self._parent = (self._child - 1) // 2
        self._strangers = torch.randint(63, (62, 20))

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        return [("points", self._points)]

    def _loss(self) -> Tensor:
        others = torch.cat([self._parent[:, None], self._strangers], dim=1)
        distances = self._ball.dist(self._points[self._child][:, None], self._points[others])
        # A stranger that is the node itself is none.
        distances = distances.masked_fill(others == self._child[:, None], torch.inf)
        return torch.nn.functional.cross_entropy(-distances, torch.zeros(62, dtype=torch.long))

    def closure(self, step: int) -> CountedClosure:
        return CountedClosure(self._loss, [self._points])

    @torch.no_grad()
    def merit(self) -> float:
        return float(self._loss())
