"""Logistic regression whose columns differ a millionfold in scale."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from lightrail.bench.claims.problem import CountedClosure, Problem
from lightrail.traits import Traits

__all__ = ["ScaledLogistic"]


class ScaledLogistic(Problem):
    """1024 noisy samples of 30 features, scaled by 10⁻³ to 10³; the merit is the loss above its minimum.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> 0.05 < ScaledLogistic().merit() < 1
        True
    """

    traits = Traits(rule="logistic regression, 30 features scaled from 10⁻³ to 10³, 128 samples a batch")
    passes = 300
    merit_name = "loss above the minimum"

    def __init__(self) -> None:
        scale = torch.logspace(-3, 3, 30, dtype=torch.float64)
        self._x = torch.randn(1024, 30, dtype=torch.float64) * scale
        logits = self._x @ (torch.randn(30, dtype=torch.float64) / scale / 3)
        self._y = torch.bernoulli(logits.sigmoid())
        self._w = torch.nn.Parameter(torch.zeros(30, dtype=torch.float64))
        self._order = torch.randperm(1024)
        self._minimum = self._least(scale)

    def _least(self, scale: Tensor) -> float:
        """Newton's method in the unscaled features, where the problem is well conditioned."""
        x, w = self._x / scale, torch.zeros_like(scale)
        for _ in range(30):
            p = (x @ w).sigmoid()
            hessian = x.T @ (x * (p * (1 - p))[:, None])
            w -= torch.linalg.solve(hessian, x.T @ (p - self._y))
        return float(cross_entropy(x @ w, self._y))

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        return [("w", self._w)]

    def closure(self, step: int) -> CountedClosure:
        rows = self._order.roll(-128 * step)[:128]
        batch = (self._x[rows], self._y[rows])

        def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
            return cross_entropy(batch[0] @ self._w, batch[1])

        def sampled_loss(batch: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
            logits = batch[0] @ self._w
            return cross_entropy(logits, torch.bernoulli(logits.detach().sigmoid(), generator=generator))

        return CountedClosure(loss, [self._w], batch, sampled_loss_fn=sampled_loss)

    @torch.no_grad()
    def merit(self) -> float:
        return float(cross_entropy(self._x @ self._w, self._y)) - self._minimum
