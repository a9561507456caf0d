"""An ill-conditioned matrix of low rank, seen through random measurements and sought as a product of two factors."""

from __future__ import annotations

import torch
from torch import Tensor

from lightrail.bench.claims.problem import CountedClosure, Problem
from lightrail.traits import Traits

__all__ = ["MatrixSensing"]


class MatrixSensing(Problem):
    """A 20 × 20 matrix of rank 3 and condition 50 from 600 measurements; factors have rank 5 and start small.

    The merit is the relative error of the product.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> round(MatrixSensing().merit(), 3)
        1.0
    """

    traits = Traits(rule="½ mean (⟨A_i, LRᵀ⟩ - y_i)² over 600 Gaussian A_i; rank 3, condition 50, factors of rank 5")
    passes = 300
    merit_name = "relative error"

    def __init__(self) -> None:
        u, v = (torch.linalg.qr(torch.randn(20, 3, dtype=torch.float64))[0] for _ in range(2))
        self._target = u @ torch.diag(torch.tensor([1.0, 0.2, 0.02], dtype=torch.float64)) @ v.T
        self._a = torch.randn(600, 400, dtype=torch.float64)
        self._y = self._a @ self._target.flatten()
        self._left, self._right = (torch.nn.Parameter(0.01 * torch.randn(20, 5, dtype=torch.float64)) for _ in range(2))

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        return [("left", self._left), ("right", self._right)]

    def closure(self, step: int) -> CountedClosure:
        def loss() -> Tensor:
            product = (self._left @ self._right.T).flatten()
            return (self._a @ product - self._y).square().mean() / 2

        return CountedClosure(loss, [self._left, self._right])

    @torch.no_grad()
    def merit(self) -> float:
        return float((self._left @ self._right.T - self._target).norm() / self._target.norm())
