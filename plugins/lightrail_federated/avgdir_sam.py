"""Sharpness-aware minimization along the average direction."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightrail import Traits
from lightrail.options import at_least, non_negative
from lightrail.step import Closure, Transform

__all__ = ["AverageDirectionSAM"]


class AverageDirectionSAM(Transform):
    r"""The gradient of the loss averaged over Gaussian steps away: what decentralised SGD does to its mean, at one node.

    g = (1/m) Σ_j ∇L(x + ε_j),   ε_j ~ N(0, ρ²I),   in pairs ±ε unless ``paired`` is false: an estimate of
    ∇E L(x + ε). For losses of third order a pair gives ∇L(x) + ½ ∇³L : εεᵀ exactly.

    Args:
        rho: ρ, the standard deviation of each entry of ε, at least 0; 0 leaves the gradient as it is.
        samples: m, at least 1; even where they are paired.
        paired: Whether ε_j come as ε and -ε, so that what is of first order cancels.

    Deviations: the covariance is ρ²I, where decentralised SGD has that of its nodes, which one process has not; gradients
    edited by transforms before this one are replaced by those that they make of the points around. Random numbers are
    drawn on the processor from torch's global generator.

    Example:
        >>> from lightrail import TransformedOptimizer
        >>> w = torch.nn.Parameter(torch.tensor([2.0]))
        >>> optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=0.5), [AverageDirectionSAM(rho=0.1)])
        >>> loss = optimizer.step(Closure(lambda: (w**2).sum() / 2, [w]))
        >>> round(w.item(), 6)
        1.0

    Reference:
        Zhu, He, Song, Xu, Shen, Tao, Decentralized SGD and Average-direction SAM are Asymptotically Equivalent,
        ICML 2023. arXiv 2306.02913.
    """

    traits: ClassVar[Traits] = Traits(
        rule="g = (1/m) Σ_j ∇L(x + ε_j), ε_j ~ N(0, ρ²I)",
        paper="Zhu et al. 2023, Decentralized SGD and Average-direction SAM, ICML, arXiv 2306.02913",
        state=0,
        extra_evaluations=2,
        needs_closure=True,
        is_stochastic=True,
        example={"rho": 0.01},
    )

    def __init__(self, rho: float = 0.01, samples: int = 2, paired: bool = True) -> None:
        non_negative(rho=rho)
        at_least(1, samples=samples)
        at_least(2, samples=samples + samples % 2)
        self.rho, self.samples, self.paired = rho, samples, paired
        self._rise: Tensor | None = None
