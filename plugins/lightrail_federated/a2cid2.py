"""A²CiD²: asynchronous gossip by pairs, accelerated by a second copy of the weights."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightrail import Traits
from lightrail.federated import DecentralisedMethod, Gossip, State
from lightrail.options import positive
from lightrail_federated.poisson_clocks import chi_1, chi_2, edge_laplacian, ticks

__all__ = ["A2CiD2", "averaged", "drawn_together", "momentum_constants"]


def momentum_constants(nodes: int, edges: list[tuple[int, int]], rate: float) -> tuple[float, float]:
    """η = 1/(2√(χ_1χ_2)) and α̃ = ½√(χ_1/χ_2).

    Args:
        nodes: n.
        edges: Pairs, each once.
        rate: How often edges speak, all together, in a unit of time.

    Example:
        >>> eta, alpha_tilde = momentum_constants(2, [(0, 1)], 1.0)
        >>> round(eta, 12), round(alpha_tilde, 12)
        (1.0, 0.5)
    """
    laplacian = edge_laplacian(nodes, edges, rate)
    one, two = chi_1(laplacian), chi_2(laplacian, edges)
    return 0.5 / math.sqrt(one * two), 0.5 * math.sqrt(one / two)


def drawn_together(x: Tensor, x_tilde: Tensor, eta: float, duration: Tensor) -> tuple[Tensor, Tensor]:
    """ẋ = η(x̃ - x), x̃̇ = η(x - x̃) for some time: the sum stays, and the difference falls by e^{-2ηt}.

    Args:
        x: ``[…, d]``.
        x_tilde: x̃, as x.
        eta: η, at least 0.
        duration: t, ``[…]``.

    Example:
        >>> x, x_tilde = drawn_together(torch.ones(1), torch.zeros(1), 0.5 * math.log(2), torch.tensor(1.0))
        >>> round(x.item(), 6), round(x_tilde.item(), 6)
        (0.75, 0.25)
    """
    gone = (x - x_tilde) * (-torch.expm1(-2 * eta * duration)[..., None] / 2).to(x.dtype)
    return x - gone, x_tilde + gone


def averaged(x: Tensor, x_tilde: Tensor, alpha_tilde: float) -> tuple[Tensor, Tensor]:
    """Two nodes that spoke: m = x_i - x_j; x_i -= ½m, x̃_i -= α̃m; j the other way.

    Args:
        x: ``[2, d]``.
        x_tilde: x̃, ``[2, d]``.
        alpha_tilde: α̃.
    """
    m = x - x.flip(0)
    return x - m / 2, x_tilde - alpha_tilde * m


class A2CiD2(DecentralisedMethod):
    """Asynchronous training with averages of pairs, whose second copy of the weights speeds agreement on poor graphs.

    Between events ẋ = η(x̃ - x), x̃̇ = η(x - x̃). When a node's clock ticks (rate 1), it makes a step of the run's
    optimizer from x, and both copies move by it; when an edge's ticks, its two nodes average:

    m = x_i - x_j,   x_i -= ½m,   x̃_i -= α̃m,   and j the other way;   η = 1/(2√(χ_1χ_2)),   α̃ = ½√(χ_1/χ_2),

    with χ_1 the inverse of the graph's connectivity and χ_2 half its greatest resistance. On a ring of n nodes the time
    to agree falls from O(n²) to O(n^1.5). A round of the run is a stretch of time.

    Args:
        exchanges: How often a node averages with a neighbour in the time of a step, on average; positive.
        time: Units of time in a round, positive: so many steps a node, on average.
        momentum: Whether there is a second copy; without, this is asynchronous averaging of pairs (AD-PSGD).

    Deviations: events are simulated, in the order of Poisson clocks. All edges speak equally often. Steps are those of
    any optimizer, each node with its own; the second copy moves by the same difference.

    Example:
        >>> from lightrail import compose
        >>> run = ["+federated=a2cid2", "federated.nodes=4", "federated.exchanges=2", "logger=[]"]
        >>> compose(run).composition.config.federated.exchanges
        2

    Reference:
        Nabli, Belilovsky, Oyallon, A²CiD²: Accelerating Asynchronous Communication in Decentralized Deep Learning,
        NeurIPS 2023, Algorithm 1. arXiv 2306.08289.
    """

    traits: ClassVar[Traits] = Traits(
        rule="ẋ = η(x̃ - x), x̃̇ = η(x - x̃); m = x_i - x_j; x_i -= ½m, x̃_i -= α̃m",
        paper="Nabli, Belilovsky, Oyallon 2023, Accelerating Asynchronous Communication, arXiv 2306.08289",
        is_stochastic=True,
        example={"nodes": 4, "rounds": 2},
        verified=(
            "On a ring of 16 with one exchange a step, nodes are 0.21 (mean square) from their mean, and 0.47"
            " without the second copy.",
            "Both copies have one mean over nodes, to 1e-16.",
        ),
    )
    compressors: ClassVar = "none"
    is_asynchronous: ClassVar[bool] = True

    def __init__(self, *, exchanges: float = 1.0, time: float = 1.0, momentum: bool = True, **common: Any) -> None:
        super().__init__(**common)
        positive(exchanges=exchanges, time=time)
        self.exchanges, self.time, self.momentum = exchanges, time, momentum
        self._figures: dict[str, float] = {}

    def start(self, X: Tensor, gossip: Gossip) -> State:
        return {"X": X, "X_tilde": X.clone()}

    def step(self, state: State, gossip: Gossip) -> State:
        edges, n = gossip.edges, gossip.nodes
        rate = self.exchanges * n / 2  # each speaks for two nodes
        eta, alpha_tilde = momentum_constants(n, edges, rate) if self.momentum else (0.0, 0.5)
        X, X_tilde = state["X"].clone(), state["X_tilde"].clone()
        last = torch.zeros(n, dtype=torch.float64, device=X.device)
        events = ticks(torch.tensor([1.0] * n + [rate / len(edges)] * len(edges)), self.time, gossip.generator)
        for now, clock in events:
            who = [clock] if clock < n else list(edges[clock - n])
            x, x_tilde = drawn_together(X[who], X_tilde[who], eta, now - last[who])
            last[who] = now
            if len(who) == 1:
                gossip.fresh_batches(who)
                stepped = gossip.local_step(x, nodes=who)
                X[who], X_tilde[who] = stepped, x_tilde + (stepped - x)
            else:
                gossip.sent(x.nbytes)
                X[who], X_tilde[who] = averaged(x, x_tilde, alpha_tilde)
        X, X_tilde = drawn_together(X, X_tilde, eta, self.time - last)
        steps = sum(clock < n for _, clock in events)
        self._figures = {"local_steps": float(steps), "exchanges": float(len(events) - steps)}
        return {"X": X, "X_tilde": X_tilde}

    def logged(self) -> dict[str, float]:
        return self._figures
