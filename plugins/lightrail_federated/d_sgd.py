"""Decentralised stochastic gradient descent."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightrail import Traits
from lightrail.federated import DecentralisedMethod, Gossip, State

__all__ = ["DSGD", "consensus_covariance"]


def consensus_covariance(X: Tensor) -> tuple[float, float]:
    """How nodes are scattered: the trace of Ξ = (1/n) Σ_j (w_j - w̄)(w_j - w̄)ᵀ, and its largest eigenvalue.

    Args:
        X: The nodes' weights w_j, a node a row ``[n, d]``. Ξ is ``[d, d]`` and never made: its eigenvalues are those
            of an ``[n, n]`` matrix.

    Example:
        >>> consensus_covariance(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        (1.0, 1.0)
    """
    away = (X - X.mean(0)).double()
    gram = away @ away.T / len(X)
    return float(gram.trace()), float(torch.linalg.eigvalsh(gram)[-1])


class DSGD(DecentralisedMethod):
    """Decentralised SGD: every node takes a step on its own data, and averages with its neighbours.

    X ← W (X - α G): adapt, then combine; the step is that of the run's optimizer, whichever it is. With
    ``combine_first``, X ← W X - α G.

    Its mean w̄ feels how far nodes are apart: with Ξ = (1/n) Σ_j (w_j - w̄)(w_j - w̄)ᵀ and losses of third order,
    (1/n) Σ_j ∇L(w_j) = ∇L(w̄) + ½ ∇³L : Ξ exactly, which is the gradient of E L(w̄ + ε), ε ~ N(0, Ξ): flat directions are
    preferred, as by sharpness-aware minimization along the average direction. The trace of Ξ is the logged
    ``consensus_distance``; its largest eigenvalue is logged as ``consensus_top_eigenvalue``.

    Args:
        combine_first: Whether a node averages before it steps; the gradient is that at x_i either way.

    Deviations: the weights of the average are constant, where the paper lets them fall as k^(-τ_β); a schedule of the
    learning rate gives its α_k. With a constant step and different data, where nodes settle is biased.

    Example:
        >>> from lightrail import compose
        >>> run = ["+federated=d_sgd", "federated.nodes=4", "federated.combine_first=true", "logger=[]"]
        >>> compose(run).composition.config.federated.combine_first
        True

    Reference:
        Swenson, Murray, Poor, Kar, Distributed Stochastic Gradient Descent: Nonconvexity, Nonsmoothness, and
        Convergence to Local Minima, JMLR 2022. arXiv 2003.02818.
        Zhu, He, Song, Xu, Shen, Tao, Decentralized SGD and Average-direction SAM are Asymptotically Equivalent,
        ICML 2023. arXiv 2306.02913.
    """

    traits: ClassVar[Traits] = Traits(
        rule="X ← W (X - α G)",
        paper="Swenson et al. 2022, Distributed Stochastic Gradient Descent, arXiv 2003.02818",
        example={"nodes": 4, "rounds": 2},
        verified=(
            "On a complete graph it is centralised gradient descent, to 1e-13.",
            "A constant step is biased: 8 different quadratics on a ring end 0.23 from the optimum, their mean 0.03.",
            "mean_j ∇L(w_j) = ∇L(w̄) + ½∇³L : Ξ holds to 1e-14 on a cubic.",
        ),
    )
    compressors: ClassVar = "none"

    def __init__(self, *, combine_first: bool = False, **common: Any) -> None:
        super().__init__(**common)
        self.combine_first = combine_first
        self._figures: dict[str, float] = {}

    def step(self, state: State, gossip: Gossip) -> State:
        X = state["X"]
        stepped = gossip.local_step(X)
        X = gossip.mix(X) + (stepped - X) if self.combine_first else gossip.mix(stepped)
        self._figures = {"consensus_top_eigenvalue": consensus_covariance(X)[1]}
        return {"X": X}

    def logged(self) -> dict[str, float]:
        return self._figures
