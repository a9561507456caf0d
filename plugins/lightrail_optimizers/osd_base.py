"""What the three kinds of Online Subspace Descent share: the subspace, its own optimizer, and the state of both."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightrail.options import at_least, non_negative, one_of
from lightrail_optimizers.hidden_matrices import HiddenMatrixOptimizer
from lightrail_optimizers.inner_rules import ADAMW, LION, SGD, InnerRule
from lightrail_optimizers.subspaces import LowRank, leading_basis, tall
from lightrail_optimizers.tensor_lists import shrink_

__all__ = ["PAPER", "OnlineSubspaceDescent", "online_pca_gradient"]

PAPER = "Liang, Liu, Chen, Liu, 2024, Memory-Efficient LLM Training with Online Subspace Descent, arXiv:2408.12857"

_PROJECTION_RULES = {"adamw": ADAMW, "lion": LION, "sgd": SGD}
_PROJECTION_OPTIONS = {
    "adamw": {"betas": (0.9, 0.999), "eps": 1e-8},
    "lion": {"betas": (0.9, 0.99)},
    "sgd": {},
}


def online_pca_gradient(g: Tensor, p: Tensor, r: Tensor, orthogonality: float = 0.0) -> Tensor:
    """The gradient by P of ``‖Ĝ - Ĝ P Pᵀ‖² + orthogonality ‖PᵀP - I‖²``, where ``Ĝ = G / ‖G‖``.

    With ``A = ĜP`` and ``S = PᵀP`` it is ``2 Ĝᵀ A (S - 2I) + 2 P AᵀA + 4 orthogonality P (S - I)``: one product of the
    size of the matrix, where its square would be two.

    Args:
        g: G, of n columns.
        p: P, n × r; its columns need not be orthonormal.
        r: G P.
        orthogonality: At least 0.
    """
    # Below this the norm loses its digits to underflow; a gradient that small moves P less instead of wildly.
    norm = torch.linalg.vector_norm(g).clamp_min(torch.finfo(g.dtype).tiny ** 0.5)
    a, s = r / norm, p.t() @ p
    one = torch.eye(s.shape[0], dtype=s.dtype, device=s.device)
    gradient = (g.t() @ (a @ (s - 2 * one))).div_(norm / 2).add_(p @ (a.t() @ a), alpha=2)
    return gradient.add_(p @ (s - one), alpha=4 * orthogonality) if orthogonality else gradient


class OnlineSubspaceDescent(HiddenMatrixOptimizer):
    """Online Subspace Descent around one method with state, which its subclasses name."""

    inner: ClassVar[InnerRule]

    def check(self, options: dict[str, Any]) -> None:
        super().check(options)
        at_least(1, rank=options["rank"])
        non_negative(
            scale=options["scale"],
            projection_lr=options["projection_lr"],
            projection_decay=options["projection_decay"],
            orthogonality=options["orthogonality"],
        )
        one_of(tuple(_PROJECTION_RULES), projection_optimizer=options["projection_optimizer"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for group in self.param_groups:
            if group["hidden"]:
                group.setdefault("first_lr", float(group["lr"]))

    def update_hidden(self, group: dict[str, Any]) -> None:
        for x, g in self.gradients(group):
            self._update_matrix(group, x, g)

    def _update_matrix(self, group: dict[str, Any], x: Tensor, g: Tensor) -> None:
        kept = self.state[x]
        is_new = "basis" not in kept
        if is_new:
            self._start(group, kept, g)
        kept["step"] += 1
        space, g_tall = LowRank(kept["basis"]), tall(g)
        p = kept["basis"].to(g_tall.dtype)
        r = g_tall @ p
        shrink_([x], float(group["lr"]) * group["weight_decay"])
        self.descend(group, kept, x, r.to(x.dtype), space)
        # The first P is the best one for the first gradient: there is nothing to learn from it.
        if not is_new:
            self._update_basis(group, kept, online_pca_gradient(g_tall, p, r, group["orthogonality"]))

    def _start(self, group: dict[str, Any], kept: dict[str, Any], g: Tensor) -> None:
        kept["basis"] = leading_basis(g, group["rank"])
        long, rank = max(g.shape), kept["basis"].shape[1]
        for key in self.inner.state_names:
            kept[key] = g.new_zeros(long, rank)
        for key in _PROJECTION_RULES[group["projection_optimizer"]].state_names:
            kept[f"basis_{key}"] = torch.zeros_like(kept["basis"])
        kept["step"] = 0

    def descend(self, group: dict[str, Any], kept: dict[str, Any], x: Tensor, r: Tensor, space: LowRank) -> None:
        """``x -= scale lr up(u)``, where u is the direction of the method with state for the gradient r."""
        u = torch.zeros_like(r)
        states = [[kept[key]] for key in self.inner.state_names]
        self.inner.update(group, kept["step"], [u], [r], *states, lr=float(group["lr"]) * group["scale"], wd=0.0)
        space.add_(x, u)

    def _update_basis(self, group: dict[str, Any], kept: dict[str, Any], gradient: Tensor) -> None:
        name, p = group["projection_optimizer"], kept["basis"]
        rule, options = _PROJECTION_RULES[name], _PROJECTION_OPTIONS[name]
        relative = float(group["lr"]) / group["first_lr"] if group["first_lr"] else 1.0
        states = [[kept[f"basis_{key}"]] for key in rule.state_names]
        lr, wd = group["projection_lr"] * relative, group["projection_decay"]
        rule.update(options, kept["step"] - 1, [p], [gradient.to(p.dtype)], *states, lr=lr, wd=wd)
