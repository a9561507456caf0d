"""DADAO: accelerated, decentralised and asynchronous."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightrail import Traits
from lightrail.errors import ConfigurationError
from lightrail.federated import DecentralisedMethod, Gossip, State
from lightrail.options import positive
from lightrail_federated.poisson_clocks import chi_1, chi_2, edge_laplacian, ticks

__all__ = ["DADAO", "Constants", "flow", "gradient_event", "speak"]

X, X_TILDE, Y, Y_TILDE, Z, Z_TILDE = range(6)


@dataclass(frozen=True)
class Constants:
    """What follows from μ, L and the graph.

    Args:
        mu: μ, strong convexity of every f_i, positive.
        L: Smoothness of every f_i, at least μ.
        chi_1: χ_1 of the graph whose edges speak once a unit of time, all together.
        chi_2: χ_2 of it.
    """

    mu: float
    L: float
    chi_1: float
    chi_2: float

    @property
    def nu(self) -> float:
        """ν = μ/2."""
        return self.mu / 2

    @property
    def edge_rate(self) -> float:
        """λ = √(2 χ_1 χ_2), of all edges together; a node's gradients have the rate 1."""
        return math.sqrt(2 * self.chi_1 * self.chi_2)

    @property
    def beta_tilde(self) -> float:
        """β̃ = 2 (χ_1/λ) √(L/ν)."""
        return 2 * self.chi_1 / self.edge_rate * math.sqrt(self.L / self.nu)

    @property
    def field(self) -> Tensor:
        """B ``[6, 6]``: between events a node's (x, x̃, y, ỹ, z, z̃) follow V̇ = B V."""
        slow, fast = math.sqrt(self.nu / self.L), math.sqrt(self.L / self.nu)
        B = torch.zeros(6, 6, dtype=torch.float64)
        for row, other, speed in ((X, X_TILDE, slow / 8), (X_TILDE, X, slow / 8), (Y, Y_TILDE, slow / 4)):
            B[row, row], B[row, other] = -speed, speed
        for row, other, speed in ((Z, Z_TILDE, slow / 4), (Z_TILDE, Z, slow / 8)):
            B[row, row], B[row, other] = -speed, speed
        B[Y_TILDE, Y], B[Y_TILDE, Z], B[Y_TILDE, X_TILDE] = -fast / 2, -fast / 2, -fast / 2 * self.nu
        return B


def flow(V: Tensor, B: Tensor, duration: Tensor) -> Tensor:
    """e^{Bt} V: a node's vectors after some time without events.

    Args:
        V: ``[…, 6, d]``.
        B: ``[6, 6]``.
        duration: t, ``[…]``.
    """
    return torch.linalg.matrix_exp(B * duration[..., None, None]) @ V


def gradient_event(V: Tensor, g: Tensor, c: Constants) -> Tensor:
    """A node's vectors after a step: s = g - νx - ỹ; x -= s/(4L); x̃ -= s/(4√(Lν)); ỹ += (1 + ¼√(ν/L)) s.

    Args:
        V: ``[6, d]``.
        g: ∇f_i(x), ``[d]``.
        c: Constants of the problem.
    """
    s = g - c.nu * V[X] - V[Y_TILDE]
    moved = V.clone()
    moved[X] -= s / (4 * c.L)
    moved[X_TILDE] -= s / (4 * math.sqrt(c.L * c.nu))
    moved[Y_TILDE] += (1 + math.sqrt(c.nu / c.L) / 4) * s
    return moved


def speak(V: Tensor, beta_tilde: float) -> Tensor:
    """The vectors of two nodes that spoke: m = (y_i + z_i) - (y_j + z_j); z_i -= ½m, z̃_i -= β̃m; j the other way.

    Args:
        V: ``[2, 6, d]``.
        beta_tilde: β̃.
    """
    sums = V[:, Y] + V[:, Z]
    m = sums - sums.flip(0)
    moved = V.clone()
    moved[:, Z] -= m / 2
    moved[:, Z_TILDE] -= beta_tilde * m
    return moved


class DADAO(DecentralisedMethod):
    """Accelerated gossip without rounds: gradients and messages happen when the clocks of nodes and of edges tick.

    Every node has six vectors. Between events they follow a linear equation V̇ = B V; a node's clock (rate 1) gives it
    a gradient step,

    s = ∇f_i(x) - νx - ỹ,   x -= s/(4L),   x̃ -= s/(4√(Lν)),   ỹ += (1 + ¼√(ν/L)) s,   ν = μ/2,

    and an edge's clock (√(2χ_1χ_2) over all edges) lets two nodes exchange y + z,

    m = (y_i + z_i) - (y_j + z_j),   z_i -= ½m,   z̃_i -= 2(χ_1/λ)√(L/ν) m,   and j the other way.

    The sums of z and of z̃ over nodes stay zero. A round of the run is a stretch of time of these clocks. For an error ε
    it takes O(n√(L/μ) log 1/ε) gradients and O(n√(χ_1χ_2)√(L/μ) log 1/ε) messages.

    Args:
        mu: μ, the strong convexity of every node's loss, positive (a weight decay gives it).
        L: Its smoothness, at least μ; where it is too small the run diverges.
        time: Units of time in a round, positive: so many gradients a node, on average.

    Deviations: gradients are those of all of a node's samples, as in the analysis. At the end of a round all nodes are
    advanced to a common time, which changes nothing of their path. Edges have equal rates.

    Example:
        >>> from lightrail import compose
        >>> run = ["+federated=dadao", "federated.nodes=4", "federated.mu=0.1", "federated.L=10", "logger=[]"]
        >>> compose(run).composition.config.federated.L
        10

    Reference:
        Nabli, Oyallon, DADAO: Decoupled Accelerated Decentralized Asynchronous Optimization, ICML 2023, Algorithm 1.
        arXiv 2208.00779.
    """

    traits: ClassVar[Traits] = Traits(
        rule="V̇ = B V between events; s = ∇f_i(x) - νx - ỹ at a node's; m = (y+z)_i - (y+z)_j at an edge's",
        paper="Nabli, Oyallon 2023, Decoupled Accelerated Decentralized Asynchronous Optimization, arXiv 2208.00779",
        is_stochastic=True,
        sets_step_size=True,
        example={"nodes": 4, "rounds": 2, "mu": 0.5, "L": 50.0},
        verified=(
            "10 nodes, L/μ = 5, after 400 units of time: mean square errors of 2.1e-12 (complete), 8.1e-13 (cycle) and"
            " 1.3e-12 (star), with about 3900 gradients and 2562, 6265 and 3574 exchanges.",
            "The sums of z and z̃ are zero to 1e-12.",
        ),
    )
    compressors: ClassVar = "none"
    runs_optimizer: ClassVar[bool] = False
    is_asynchronous: ClassVar[bool] = True

    def __init__(self, *, mu: float, L: float, time: float = 1.0, **common: Any) -> None:
        super().__init__(**common)
        positive(mu=mu, L=L, time=time)
        if mu > L:
            raise ConfigurationError(
                "no loss is more strongly convex than it is smooth",
                found=f"mu={mu}, L={L}",
                allowed="mu of at most L",
                remedy="Set federated.L to the greatest curvature, and federated.mu to the smallest.",
            )
        self.mu, self.L, self.time = mu, L, time
        self._figures: dict[str, float] = {}

    def start(self, X: Tensor, gossip: Gossip) -> State:
        V = torch.zeros(gossip.nodes, 6, X.shape[1], dtype=torch.float64, device=X.device)
        V[:, 0] = X
        return {"V": V}

    def step(self, state: State, gossip: Gossip) -> State:
        edges = gossip.edges
        laplacian = edge_laplacian(gossip.nodes, edges)
        c = Constants(self.mu, self.L, chi_1(laplacian), chi_2(laplacian, edges))
        V, B = state["V"].clone(), c.field.to(state["V"].device)
        last = torch.zeros(gossip.nodes, dtype=torch.float64, device=V.device)
        rates = torch.tensor([1.0] * gossip.nodes + [c.edge_rate / len(edges)] * len(edges))
        events = ticks(rates, self.time, gossip.generator)
        for now, clock in events:
            who = [clock] if clock < gossip.nodes else list(edges[clock - gossip.nodes])
            here = flow(V[who], B, now - last[who])
            last[who] = now
            if len(who) == 1:
                g = gossip.gradient(here[:, X], full=True, nodes=who)[0].double()
                V[who] = gradient_event(here[0], g, c)[None]
            else:
                gossip.sent(here[:, Y].nbytes)
                V[who] = speak(here, c.beta_tilde)
        gradients = sum(clock < gossip.nodes for _, clock in events)
        self._figures = {"gradients": float(gradients), "exchanges": float(len(events) - gradients)}
        return {"V": flow(V, B, self.time - last)}

    def weights(self, state: State) -> Tensor:
        return state["V"][:, X]

    def logged(self) -> dict[str, float]:
        return self._figures
