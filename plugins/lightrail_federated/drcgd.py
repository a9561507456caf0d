"""Decentralised conjugate gradients over matrices with orthonormal columns."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightrail import Traits
from lightrail.errors import CompositionError
from lightrail.federated import DecentralisedMethod, Gossip, State
from lightrail.options import at_least, one_of, positive

__all__ = ["DRCGD", "conjugacy", "polar", "tangent"]


def polar(Y: Tensor) -> Tensor:
    """P_M(Y) = U Vᵀ of the thin Y = U Σ Vᵀ: the nearest matrix with orthonormal columns.

    Args:
        Y: ``[…, d, r]`` with d ≥ r, of rank r.

    Example:
        >>> polar(torch.tensor([[3.0], [4.0]])).flatten().tolist()
        [0.6000000238418579, 0.800000011920929]
    """
    U, _, V = torch.linalg.svd(Y, full_matrices=False)
    return U @ V


def tangent(x: Tensor, Y: Tensor) -> Tensor:
    """P_T(Y) = Y - x sym(xᵀY): the part of Y along which x stays orthonormal to first order.

    Args:
        x: ``[…, d, r]``, xᵀx = I.
        Y: As x.

    Example:
        >>> tangent(torch.tensor([[1.0], [0.0]]), torch.tensor([[5.0], [2.0]])).flatten().tolist()
        [0.0, 2.0]
    """
    product = x.mT @ Y
    return Y - x @ (product + product.mT) / 2


def conjugacy(g: Tensor, g_last: Tensor, g_last_here: Tensor, rule: str, cap: float | None) -> Tensor:
    """β of each node: ‖g‖²/‖g'‖² (``fr``), or max(0, ⟨g, g - P_T(g')⟩/‖g'‖²) (``pr``); at most ``cap``.

    Args:
        g: Riemannian gradients ``[n, D]``.
        g_last: g', those of the last round ``[n, D]``.
        g_last_here: P_T(g') at the new points ``[n, D]``.
        rule: ``fr`` (Fletcher-Reeves) or ``pr`` (Polak-Ribière).
        cap: ``None`` for no bound.

    Returns:
        ``[n, 1]``; 0 where g' is zero.
    """
    over = (g * (g if rule == "fr" else g - g_last_here)).sum(1, keepdim=True)
    under = g_last.square().sum(1, keepdim=True)
    beta = torch.where(under > 0, over / under, torch.zeros_like(under)).clamp(min=0)
    return beta if cap is None else beta.clamp(max=cap)


class DRCGD(DecentralisedMethod):
    """Decentralised Riemannian conjugate gradients: nodes agree on matrices with orthonormal columns, xᵀx = I.

    g = P_T(∇f_i(x)),   η ← -g + β P_T(Σ_j Wᵗ_ij η_j),   β = ‖g‖²/‖g'‖²,
    x_i ← P_M(Σ_j Wᵗ_ij x_j + α η_i),

    with P_M(Y) = U Vᵀ of Y's singular value decomposition and P_T(Y) = Y - x sym(xᵀY); no retraction, no transport.
    With β = 0 it is decentralised projected Riemannian gradient descent. Parameters not named are moved without
    projections. The run's model is the projection of the mean.

    Args:
        lr: α, positive.
        parameters: The names of the matrices; by default the only one with two dimensions. One that is wider than high
            has orthonormal rows.
        mixing: t, how often nodes average in a round; at least 1.
        beta: ``fr`` or ``pr``: max(0, ⟨g, g - P_T(g')⟩/‖g'‖²).
        beta_cap: The greatest β, positive; null for none.
        full: Whether gradients are those of all of a node's samples; conjugacy means little on batches.

    Deviations: the step is constant, where the theory asks for a line search. With a constant step and no cap,
    β = ‖g‖²/‖g'‖² is slower than gradient descent; hence the cap. What the weights start from is projected.

    Example:
        >>> from lightrail import compose
        >>> run = ["+federated=drcgd", "federated.nodes=4", "federated.mixing=10", "logger=[]"]
        >>> compose(run).composition.config.federated.mixing
        10

    Reference:
        Chen, Ye, Xu, Wang, Decentralized Riemannian Conjugate Gradient Method on the Stiefel Manifold, ICLR 2024,
        Algorithm 1. arXiv 2308.10547.
    """

    traits: ClassVar[Traits] = Traits(
        rule="g = P_T(∇f); η ← -g + βP_T(Wᵗη); x ← P_M(Wᵗx + αη)",
        paper="Chen et al. 2024, Decentralized Riemannian Conjugate Gradient Method, ICLR, arXiv 2308.10547",
        needs_whole_tensors=True,
        example={"nodes": 4, "rounds": 2, "lr": 0.05},
        verified=(
            "Three principal components of 20, 8 nodes on a ring, t = 10, α = 0.02: 112 rounds to a gradient of 2e-2,"
            " 1001 without conjugacy, more than 3000 without the cap; α = 0.2: 61, 107, more than 3000.",
            "xᵀx = I to 2e-15.",
        ),
    )
    compressors: ClassVar = "none"
    runs_optimizer: ClassVar[bool] = False

    def __init__(
        self,
        *,
        lr: float = 0.02,
        parameters: list[str] | None = None,
        mixing: int = 1,
        beta: Literal["fr", "pr"] = "fr",
        beta_cap: float | None = 0.9,
        full: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        positive(lr=lr, **({} if beta_cap is None else {"beta_cap": beta_cap}))
        at_least(1, mixing=mixing)
        one_of(("fr", "pr"), beta=beta)
        self.lr, self.parameters, self.mixing = lr, parameters, mixing
        self.beta, self.beta_cap, self.full = beta, beta_cap, full
        self._matrices: list[tuple[slice, tuple[int, int]]] = []
        self._figures: dict[str, float] = {}

    def start(self, X: Tensor, gossip: Gossip) -> State:
        self._find(gossip)
        x = self._projected(X)
        return {"X": x, "eta": torch.zeros_like(x), "g": torch.zeros_like(x)}

    def _find(self, gossip: Gossip) -> None:
        places = dict(gossip.layout.places())
        shapes = dict(zip(gossip.layout.names, gossip.layout.shapes, strict=True))
        matrices = [name for name, shape in shapes.items() if len(shape) == 2]
        chosen = matrices if self.parameters is None else list(self.parameters)
        if not chosen or not set(chosen) <= set(matrices) or (self.parameters is None and len(chosen) > 1):
            raise CompositionError(
                "drcgd must know which matrices have orthonormal columns",
                found=f"federated.parameters={self.parameters}",
                allowed=f"some of {', '.join(matrices)}" if matrices else "a model with a parameter of two dimensions",
                remedy="Name them: federated.parameters=[NAME]." if matrices else "Choose another model.",
            )
        self._matrices = [(places[name], (shapes[name][0], shapes[name][1])) for name in chosen]

    def step(self, state: State, gossip: Gossip) -> State:
        if not self._matrices:
            self._find(gossip)  # after a checkpoint
        x, eta = state["X"], state["eta"]
        g = self._along(x, gossip.gradient(x, full=self.full))
        beta = conjugacy(g, state["g"], self._along(x, state["g"]), self.beta, self.beta_cap)
        mixed = x
        for _ in range(self.mixing):
            # In one message: two would cross each link otherwise.
            mixed, eta = gossip.mix(torch.cat([mixed, eta], 1)).chunk(2, 1)
        eta = -g + beta * self._along(x, eta)
        norm = float(g.mean(0).norm())
        self._figures = {"beta": float(beta.mean()), "gradient_norm": norm}
        return {"X": self._projected(mixed + self.lr * eta), "eta": eta, "g": g}

    def _projected(self, X: Tensor) -> Tensor:
        out = X.clone()
        for place, shape in self._matrices:
            out[:, place] = _flat(polar(_tall(X[:, place], shape)), shape)
        return out

    def _along(self, X: Tensor, Y: Tensor) -> Tensor:
        out = Y.clone()
        for place, shape in self._matrices:
            out[:, place] = _flat(tangent(_tall(X[:, place], shape), _tall(Y[:, place], shape)), shape)
        return out

    def joined(self, state: State) -> Tensor:
        return self._projected(state["X"].mean(0, keepdim=True))[0]

    def logged(self) -> dict[str, float]:
        return self._figures


def _tall(rows: Tensor, shape: tuple[int, int]) -> Tensor:
    found = rows.reshape(len(rows), *shape)
    return found if shape[0] >= shape[1] else found.mT


def _flat(matrices: Tensor, shape: tuple[int, int]) -> Tensor:
    return (matrices if shape[0] >= shape[1] else matrices.mT).reshape(len(matrices), -1)
