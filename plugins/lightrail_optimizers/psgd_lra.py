"""PSGD with a low-rank preconditioner; its matrices have the capital letters of the paper."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightrail.options import at_least
from lightrail.traits import Claim, Peer, Traits
from lightrail_optimizers.flat_vector import blocks
from lightrail_optimizers.psgd_base import PAPER, PSGD, draw_uniforms, psgd_traits_under, step_over
from lightrail_optimizers.sophia_rule import draw_directions

__all__ = ["PSGDLRA", "balance_lra", "fit_lra", "precondition_lra"]

_BALANCING_PROBABILITY = 0.01


def fit_lra(
    U: Tensor, V: Tensor, d: Tensor, v: Tensor, h: Tensor, *, step: float, moves_u: bool, normalizer: str = "second"
) -> None:
    """Moves ``Q = (I + U V^T) diag(d)`` towards ``P h h^T = v v^T P^-1`` on average, where ``P = Q^T Q``; in place.

    With ``a = Q h`` and ``b = Q^-T v``, all of the Q from before: ``d -= mu d (P h h - v P^-1 v)``, entry by entry, and
    ``U -= mu (a a^T - b b^T) V (I + V^T U)`` or ``V -= mu (I + V U^T) (a a^T - b b^T) U``.

    Args:
        U: A column a rank; fastest where it is stored by columns.
        V: Likewise.
        d: A vector.
        v: A random direction.
        h: The Hessian times v.
        step: How far, relative to the normalizer, in (0, 1].
        moves_u: Whether U moves, or V: never both.
        normalizer: mu is ``step`` over the size of the gradient of the criterion (``first``), or over a bound on its
            curvature (``second``): ``max sqrt(((P h)² + v²) (h² + (P^-1 v)²))`` for d,
            ``||a|| ||V V^T a|| + ||b|| ||V V^T b||`` for U, and with U in the place of V for V.
    """
    rows = blocks(len(d), d.device)
    found = _transform(U, V, d, v, h, rows)
    gradients, sizes = [], []
    e = torch.linalg.solve(found.K, found.Vb)
    for i, ab in zip(rows, found.ab, strict=True):
        Ph = torch.addmv(ab[0], V[i], found.Ua).mul_(d[i])
        inverse_Pv = torch.addmv(ab[1], U[i], e, alpha=-1).div_(d[i])
        gradients.append((Ph * h[i]).addcmul_(v[i], inverse_Pv, value=-1))
        if normalizer == "second":
            sizes.append((torch.hypot(Ph, v[i]).mul_(torch.hypot(h[i], inverse_Pv))).max())
        else:
            sizes.append(gradients[-1].abs().max())
    if moves_u:
        _move_u_(U, V, found, rows, step, normalizer)
    else:
        _move_v_(U, V, d, v, found, rows, step, normalizer)
    mu = step_over(step, torch.stack(sizes).max())
    for i, gradient in zip(rows, gradients, strict=True):
        d[i].sub_(gradient.mul_(d[i]).mul_(mu))


class _Transformed(NamedTuple):
    """``a = Q h`` and ``b = Q^-T v``, block by block as the two rows of ``ab``, and what U and V make of them."""

    K: Tensor  # I + V^T U
    ab: list[Tensor]
    Ua: Tensor  # U^T a, and so on
    Va: Tensor
    Ub: Tensor
    Vb: Tensor


def _transform(U: Tensor, V: Tensor, d: Tensor, v: Tensor, h: Tensor, rows: list[slice]) -> _Transformed:
    rank = U.shape[1]
    K = torch.eye(rank, dtype=d.dtype, device=d.device)
    Vy, Uw, Ua, Vb = d.new_zeros(4, rank)
    for i in rows:
        K.addmm_(V[i].T, U[i])
        Vy.addmv_(V[i].T, d[i] * h[i])
        Uw.addmv_(U[i].T, v[i] / d[i])
    Va, Ub = K @ Vy, torch.linalg.solve(K.T, Uw)
    ab = []
    for i in rows:
        both = torch.stack((d[i] * h[i], v[i] / d[i]))
        both[0].addmv_(U[i], Vy)
        both[1].addmv_(V[i], Ub, alpha=-1)
        Ua.addmv_(U[i].T, both[0])
        Vb.addmv_(V[i].T, both[1])
        ab.append(both)
    return _Transformed(K, ab, Ua, Va, Ub, Vb)


def _move_u_(U: Tensor, V: Tensor, found: _Transformed, rows: list[slice], step: float, normalizer: str) -> None:
    t = torch.stack((found.Va, found.Vb))
    mu = step_over(step, _size(V, t, found.ab, rows, normalizer))
    t = t @ found.K * torch.stack((-mu, mu))[:, None]
    for i, ab in zip(rows, found.ab, strict=True):
        U[i].addmm_(ab.T, t)


def _move_v_(
    U: Tensor, V: Tensor, d: Tensor, v: Tensor, found: _Transformed, rows: list[slice], step: float, normalizer: str
) -> None:
    t = torch.stack((found.Ua, found.Ub))
    mu = step_over(step, _size(U, t, found.ab, rows, normalizer))
    t_scaled = t * torch.stack((-mu, mu))[:, None]
    for i, ab in zip(rows, found.ab, strict=True):
        # (I + V U^T) of a and of b; the latter is D^-1 v again.
        both = torch.stack((torch.addmv(ab[0], V[i], found.Ua), v[i] / d[i]))
        V[i].addmm_(both.T, t_scaled)


def _size(X: Tensor, t: Tensor, ab: list[Tensor], rows: list[slice], normalizer: str) -> Tensor:
    """``||a|| ||X X^T a|| + ||b|| ||X X^T b||``, or ``||a (X X^T a)^T - b (X X^T b)^T||``; t is ``[a b]^T X``."""
    inner, outer = t.new_zeros(2, 2), t.new_zeros(2, 2)
    for i, both in zip(rows, ab, strict=True):
        z = t @ X[i].T
        inner.addmm_(both, both.T)
        outer.addmm_(z, z.T)
    products = inner * outer
    if normalizer == "second":
        return products.diagonal().sqrt().sum()
    return (products[0, 0] + products[1, 1] - products[0, 1] - products[1, 0]).clamp(min=0).sqrt()


def balance_lra(U: Tensor, V: Tensor) -> None:
    """Gives U and V equal norms without changing ``U V^T``, in place."""
    rho = torch.sqrt(torch.linalg.vector_norm(U) / torch.linalg.vector_norm(V))
    U.div_(rho)
    V.mul_(rho)


def precondition_lra(U: Tensor, V: Tensor, d: Tensor, g: Tensor) -> Tensor:
    """``P g = D (I + V U^T) (I + U V^T) D g``, as a new vector."""
    rows = blocks(len(d), d.device)
    Vy, UQg = d.new_zeros(2, U.shape[1])
    for i in rows:
        Vy.addmv_(V[i].T, d[i] * g[i])
    out = torch.empty_like(g)
    for i in rows:
        torch.mul(d[i], g[i], out=out[i]).addmv_(U[i], Vy)
        UQg.addmv_(U[i].T, out[i])
    for i in rows:
        out[i].addmv_(V[i], UQg).mul_(d[i])
    return out


class PSGDLRA(PSGD):
    """PSGD with a low-rank preconditioner: a matrix of rank r on top of a diagonal, over all parameters together.

    ``Q = (I + U V^T) diag(d)`` and ``P = Q^T Q`` are fitted to pairs ``v ~ N(0, I)``, ``h = H v`` so that
    ``E[h^T P h + v^T P^-1 v]`` is least, by steps within the group of such matrices (:func:`fit_lra`): d at each fit,
    and either U or V, by the toss of a coin; ``x -= lr P g``. P tends to ``|H|^-1`` as far as r allows.

    Args:
        params: Parameters or parameter groups. Q runs over all parameters of its group as one vector.
        lr: Learning rate, >= 0. P takes the units away: 0.01 to 0.1 fits most problems, up to 1 a quadratic.
        rank: r, >= 1: Q takes 2 r + 1 copies of the parameters, and time likewise.
        momentum: In [0, 1); above 0, P multiplies ``m = momentum m + (1 - momentum) g``, which has no correction of its
            start.
        preconditioner_lr: Of Q, in (0, 1]; ``None`` for 0.1 with the second normalizer and 0.01 with the first.
        update_probability: Of a fit of Q at a step, in [0, 1]. A fit costs an evaluation; 0.1 is nearly as good once Q
            has settled. 0 leaves Q as it begins.
        initial_scale: Q begins as this times the identity, > 0; ``None`` finds it from the first pair, whatever the
            probability.
        max_norm: The largest norm of ``P m`` over the group, > 0; a longer one is shortened. Where the loss is flat
            (dead units), P grows and grows: this, or weight decay in the loss, bounds what comes of it.
        hvp: What h is. ``exact``: the Hessian times v, by differentiating twice. ``finite_difference``: the change of
            the gradient along a small v. ``whitening``: the gradient itself, without a second evaluation; then P tends
            to ``E[g g^T]^(-1/2)``.
        normalizer: What a step of Q is relative to: ``second``, a bound on the curvature of the criterion, or
            ``first``, the size of its gradient.
        maximize: Ascend.

    Raises:
        ConfigurationError: An option out of range; a complex or sharded parameter, or a sparse gradient.
        ClosureError: A fit is due and the closure cannot evaluate again.

    Guarantees:
        v and the chances come from torch's global generator, so that an exact resume repeats them, and are the same on
        all ranks.

    Deviations:
        As in the authors' code, U and V begin as noise of variance ``1 / (n (r + 10))`` over n parameters, and at one
        fit in a hundred, by chance, they are given equal norms. Rank 0 is :class:`PSGDDiag`.
        With several groups, v is drawn for all at once and each Q is fitted to its own part of ``H v``, parts from the
        other groups' v included. A finite difference takes as v what rounding left of the move. ``hvp=whitening`` adds
        to g a direction of 2^-13 times its mean magnitude, as the authors' code does and the paper does not.

    Example:
        >>> from lightrail import Closure
        >>> _ = torch.manual_seed(0)
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -1.0, 1.0]))
        >>> H = torch.eye(3) + 99 * torch.ones(3, 3) / 3
        >>> optimizer = PSGDLRA([x], lr=0.5, rank=1)
        >>> for _ in range(200):
        ...     loss = optimizer.step(Closure(lambda: x @ H @ x / 2, [x]))
        >>> loss.item() < 1e-6
        True

    Reference:
        Pooladzandi and Li, 2024, "Curvature-Informed SGD via General Purpose Lie-Group Preconditioners",
        arXiv:2402.04553, the low-rank approximation preconditioner.
    """

    traits = Traits(
        rule="x -= lr Q^T Q g, Q = (I + U V^T) diag(d) fitted so that E[|Q h|² + |Q^-T v|²] is least for h = H v",
        paper=PAPER,
        state=21,
        extra_evaluations=1,
        needs_second_derivatives=True,
        needs_whole_tensors=True,
        is_stochastic=True,
        example={"lr": 0.05},
        peers=(
            Peer("heavyball.PSGDLRA", {"rank": 10, "preconditioner_update_probability": 1.0, "consume_grad": False}),
        ),
        claim=Claim(sentence="a lower loss than Adam's", problems=("docs_lm", "digits", "scaled_logistic")),
    )

    @staticmethod
    def traits_under(options: Mapping[str, Any]) -> Traits:
        """As ``traits``; ``hvp`` says what is asked of the closure, and ``rank`` is in the state."""
        ranked = dataclasses.replace(PSGDLRA.traits, state=2 * options.get("rank", 10) + 1)
        return psgd_traits_under(ranked, options)

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        rank: int = 10,
        momentum: float = 0.0,
        preconditioner_lr: float | None = None,
        update_probability: float = 1.0,
        initial_scale: float | None = None,
        max_norm: float | None = None,
        hvp: str = "exact",
        normalizer: str = "second",
        maximize: bool = False,
    ) -> None:
        at_least(1, rank=rank)
        super().__init__(
            params,
            {
                "lr": lr,
                "rank": rank,
                "momentum": momentum,
                "preconditioner_lr": preconditioner_lr,
                "update_probability": update_probability,
                "initial_scale": initial_scale,
                "max_norm": max_norm,
                "hvp": hvp,
                "normalizer": normalizer,
                "maximize": maximize,
            },
        )

    def _begin(self, group: Mapping[str, Any], like: Tensor, scale: float) -> dict[str, Tensor]:
        # By columns: each is one stretch of memory, however many there are.
        shape = (group["rank"], len(like))
        U, V = draw_directions([like.new_empty(shape), like.new_empty(shape)], "gaussian")
        deviation = (len(like) * (group["rank"] + 10)) ** -0.5
        return {"U": U.mul_(deviation), "V": V.mul_(deviation), "d": torch.full_like(like, scale)}

    def _fit(self, group: Mapping[str, Any], q: Mapping[str, Tensor], v: Tensor, h: Tensor) -> None:
        U, V, d = q["U"].T, q["V"].T, q["d"]
        balance, toss = draw_uniforms(2, d.device)
        if balance < _BALANCING_PROBABILITY:
            balance_lra(U, V)
        step, normalizer = group["preconditioner_lr"], group["normalizer"]
        fit_lra(U, V, d, v, h, step=step, moves_u=toss < 0.5, normalizer=normalizer)

    def _precondition(self, q: Mapping[str, Tensor], g: Tensor) -> Tensor:
        return precondition_lra(q["U"].T, q["V"].T, q["d"], g)
