"""Sharpness-aware minimization along the average direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightrail import Traits
from lightrail.options import at_least, non_negative
from lightrail.step import Closure, Transform
from lightrail.step.sharded import shard_of

__all__ = ["AverageDirectionSAM"]


class AverageDirectionSAM(Transform):
    """The gradient of the loss averaged over Gaussian steps away: what decentralised SGD does to its mean, at one node.

    g = 1/(2m) Σ_j (∇L(x + ε_j) + ∇L(x - ε_j)),   ε_j ~ N(0, ρ²I):   an estimate of ∇E L(x + ε).

    For losses of third order a pair gives ∇L(x) + ½ ∇³L : εεᵀ exactly: the pull away from sharp places alone, since
    what is of first order in ε cancels.

    Args:
        rho: ρ, the standard deviation of each entry of ε, at least 0; 0 leaves the gradient as it is.
        pairs: m, at least 1; each costs two evaluations.

    Deviations: the covariance is ρ²I, where decentralised SGD has that of its nodes, which one process has not. Random
    numbers are drawn on the processor, from torch's global generator.

    Example:
        >>> from lightrail import TransformedOptimizer
        >>> w = torch.nn.Parameter(torch.tensor([2.0]))
        >>> optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=0.5), [AverageDirectionSAM(rho=0.1)])
        >>> loss = optimizer.step(Closure(lambda: (w**2).sum() / 2, [w]))
        >>> round(w.item(), 5)
        1.0

    Reference:
        Zhu, He, Song, Xu, Shen, Tao, Decentralized SGD and Average-direction SAM are Asymptotically Equivalent,
        ICML 2023. arXiv 2306.02913.
    """

    traits: ClassVar[Traits] = Traits(
        rule="g = 1/(2m) Σ_j (∇L(x + ε_j) + ∇L(x - ε_j)), ε_j ~ N(0, ρ²I)",
        paper="Zhu et al. 2023, Decentralized SGD and Average-direction SAM, ICML, arXiv 2306.02913",
        state=0,
        extra_evaluations=2,
        needs_closure=True,
        is_stochastic=True,
        example={"rho": 0.01},
        verified=(
            "A pair is ∇L + ½∇³L : εεᵀ to rounding on a cubic; the same identity holds for the mean of nodes of d_sgd.",
        ),
    )

    @staticmethod
    def traits_under(options: Mapping[str, Any]) -> Traits:
        """Each pair is two evaluations."""
        return replace(AverageDirectionSAM.traits, extra_evaluations=2 * options.get("pairs", 1))

    def __init__(self, rho: float = 0.01, pairs: int = 1) -> None:
        non_negative(rho=rho)
        at_least(1, pairs=pairs)
        self.rho, self.pairs = rho, pairs

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        if self.rho == 0:
            return
        x = [p.detach().clone() for p in closure.params]
        total = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in x]
        for _ in range(self.pairs):
            away = [shard_of(self.rho * torch.randn(p.shape, dtype=p.dtype).to(p.device), p) for p in x]
            for sign in (1.0, -1.0):
                with closure.at([p + sign * e for p, e in zip(x, away, strict=True)]):
                    _, found = closure.gradient()
                torch._foreach_add_(total, [g.to(t.dtype) for g, t in zip(found, total, strict=True)])
        for p, g in zip(closure.params, total, strict=True):
            if p.grad is not None:
                p.grad = (g / (2 * self.pairs)).to(p.dtype)
