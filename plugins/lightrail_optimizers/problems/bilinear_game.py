"""A bilinear game, around whose solution plain descent and ascent turn outwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightrail.bench.claims.problem import CountedClosure, Problem
from lightrail.traits import Traits

__all__ = ["BilinearGame"]


class BilinearGame(Problem):
    """``min over x, max over y of x·Ay``, ten dimensions a player, moving at once; the merit is the distance to 0.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> round(BilinearGame().merit(), 6)
        1.0
    """

    traits = Traits(rule="min over x, max over y of x·Ay in 10 + 10 dimensions, singular values of A from 0.3 to 1")
    passes = 300
    merit_name = "distance to the solution"

    def __init__(self) -> None:
        left, right = (torch.linalg.qr(torch.randn(10, 10))[0] for _ in range(2))
        self._a = left @ torch.diag(torch.linspace(0.3, 1, 10)) @ right
        start = torch.randn(2, 10)
        self._x, self._y = (torch.nn.Parameter(each) for each in start / start.norm())

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        return [("x", self._x), ("y", self._y)]

    def groups(self, named: bool) -> list[Any]:
        return [{"params": [(name, p)] if named else [p], "player": name} for name, p in self.named_parameters()]

    def closure(self, step: int) -> CountedClosure:
        def loss(player: str) -> Tensor:
            value = self._x @ self._a @ self._y
            return value if player == "x" else -value

        return CountedClosure(loss, [self._x, self._y], players={"x": [self._x], "y": [self._y]})

    @torch.no_grad()
    def merit(self) -> float:
        return float(torch.cat([self._x, self._y]).norm())
