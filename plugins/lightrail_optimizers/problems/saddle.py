"""A saddle between two valleys, with a start beside its ridge."""

from __future__ import annotations

import torch
from torch import Tensor

from lightrail.bench.claims.problem import CountedClosure, Problem
from lightrail.traits import Traits

__all__ = ["Saddle"]


class Saddle(Problem):
    """``Σ x²/2 + Σ c (y⁴/4 - y²/2)``, c from 0.001 to 1; the merit is the loss above its minimum.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> problem = Saddle()
        >>> problem.merit() > 1
        True
    """

    traits = Traits(rule="Σ x²/2 + Σ c (y⁴/4 - y²/2) in 10 + 10 dimensions, c from 0.001 to 1, y starts at 10⁻³")
    passes = 300
    merit_name = "loss above the minimum"

    def __init__(self) -> None:
        self._c = torch.logspace(-3, 0, 10, dtype=torch.float64)
        self._x = torch.nn.Parameter(torch.randn(10, dtype=torch.float64))
        self._y = torch.nn.Parameter(1e-3 * torch.randn(10, dtype=torch.float64))

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        return [("x", self._x), ("y", self._y)]

    def _loss(self) -> Tensor:
        y2 = self._y.square()
        return self._x.square().sum() / 2 + (self._c * (y2.square() / 4 - y2 / 2)).sum()

    def closure(self, step: int) -> CountedClosure:
        return CountedClosure(self._loss, [self._x, self._y])

    @torch.no_grad()
    def merit(self) -> float:
        return float(self._loss() + self._c.sum() / 4)
