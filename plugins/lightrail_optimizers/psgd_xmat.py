"""PSGD with a preconditioner in the shape of an X."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightrail.traits import Claim, Traits
from lightrail_optimizers.flat_vector import blocks
from lightrail_optimizers.psgd_base import PAPER, PSGD, psgd_traits_under, step_over

__all__ = ["PSGDXMat", "fit_xmat", "precondition_xmat"]


def fit_xmat(a: Tensor, b: Tensor, v: Tensor, h: Tensor, *, step: float, normalizer: str = "second") -> None:
    """Moves ``Q = diag(a) + adiag(b)`` towards ``P h h^T = v v^T P^-1`` on average, where ``P = Q^T Q``; in place.

    With ~ for the order reversed: ``p = Q h = a h + b h~``, ``q = Q^-T v = (a~ v - b~ v~) / (a a~ - b b~)``;
    ``∇a = p² - q²``, ``∇b = p p~ - q q~``; ``a -= mu (∇a a + ∇b b~)`` and ``b -= mu (∇a b + ∇b a~)``, both of the Q
    from before. The middle of an odd number of entries is on both diagonals: it is a's, and b has 0 there.

    Args:
        a: The diagonal.
        b: The other one: row i has ``b[i]`` in column -1-i.
        v: A random direction.
        h: The Hessian times v.
        step: In (0, 1].
        normalizer: mu is ``step / max(p² + q²)`` (``second``) or ``step / max(|∇a|, |∇b|)`` (``first``).
    """
    pairs = _mirrored(len(a), a.device)
    gradients, sizes = [], []
    for i, j in pairs:
        (a1, a2), (b1, b2), (v1, v2), (h1, h2) = ((x[i], x[j].flip(0)) for x in (a, b, v, h))
        determinant = (a1 * a2).addcmul_(b1, b2, value=-1)
        p1, p2 = (a1 * h1).addcmul_(b1, h2), (a2 * h2).addcmul_(b2, h1)
        q1 = (a2 * v1).addcmul_(b2, v2, value=-1).div_(determinant)
        q2 = (a1 * v2).addcmul_(b1, v1, value=-1).div_(determinant)
        nabla_b = (p1 * p2).addcmul_(q1, q2, value=-1) if i != j else torch.zeros_like(p1)
        for x in (p1, p2, q1, q2):
            x.square_()
        gradients.append((p1 - q1, p2 - q2, nabla_b))
        size = [p1 + q1, p2 + q2] if normalizer == "second" else [x.abs() for x in gradients[-1]]
        sizes += [x.max() for x in size]
    mu = step_over(step, torch.stack(sizes).max())
    for (i, j), gradient in zip(pairs, gradients, strict=True):
        _move_(a, b, i, j, *(x.mul_(mu) for x in gradient))


def _move_(a: Tensor, b: Tensor, i: slice, j: slice, na1: Tensor, na2: Tensor, nb: Tensor) -> None:
    """The entries ``i`` and their mirror images ``j`` of both diagonals, in place."""
    (a1, a2), (b1, b2) = ((x[i].clone(), x[j].flip(0)) for x in (a, b))
    a[i].addcmul_(na1, a1, value=-1).addcmul_(nb, b2, value=-1)
    b[i].addcmul_(na1, b1, value=-1).addcmul_(nb, a2, value=-1)
    if i != j:
        a[j] = a2.addcmul(na2, a2, value=-1).addcmul_(nb, b1, value=-1).flip(0)
        b[j] = b2.addcmul(na2, b2, value=-1).addcmul_(nb, a1, value=-1).flip(0)


def precondition_xmat(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """``P g = (a² + (b²)~) g + (a b + (a b)~) g~``, as a new vector."""
    out = torch.empty_like(g)
    for i, j in _mirrored(len(g), g.device):
        (a1, a2), (b1, b2), (g1, g2) = ((x[i], x[j].flip(0)) for x in (a, b, g))
        cross = (a1 * b1).addcmul_(a2, b2)
        out[i] = (a1 * a1).addcmul_(b2, b2).mul_(g1).addcmul_(cross, g2)
        out[j] = (a2 * a2).addcmul_(b1, b1).mul_(g2).addcmul_(cross, g1).flip(0)
    return out


def _mirrored(size: int, device: torch.device) -> list[tuple[slice, slice]]:
    """Parts of the first half and their mirror images; the middle of an odd number is its own."""
    half, odd = divmod(size, 2)
    parts = [*blocks(half, device), *([slice(half, half + 1)] if odd else [])]
    return [(i, slice(size - i.stop, size - i.start)) for i in parts]


class PSGDXMat(PSGD):
    """PSGD with an X-shaped preconditioner: a diagonal and an antidiagonal, for the price of two vectors.

    ``Q = diag(a) + adiag(b)`` and ``P = Q^T Q`` are fitted to pairs ``v ~ N(0, I)``, ``h = H v`` so that
    ``E[h^T P h + v^T P^-1 v]`` is least, by steps within the group of such matrices (:func:`fit_xmat`);
    ``x -= lr P g``. P tends to ``|H|^-1`` where that has this shape.

    Args:
        params: Parameters or parameter groups. Q runs over all parameters of its group as one vector.
        lr: Learning rate, >= 0. P takes the units away: 0.01 to 0.1 fits most problems, up to 1 a quadratic.
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
        With several groups, v is drawn for all at once and each Q is fitted to its own part of ``H v``, parts from the
        other groups' v included. A finite difference takes as v what rounding left of the move. ``hvp=whitening`` adds
        to g a direction of 2^-13 times its mean magnitude, as the authors' code does and the paper does not.

    Example:
        >>> from lightrail import Closure
        >>> _ = torch.manual_seed(0)
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
        >>> H = torch.tensor([[50.5, 49.5], [49.5, 50.5]])
        >>> optimizer = PSGDXMat([x], lr=0.5)
        >>> for _ in range(200):
        ...     loss = optimizer.step(Closure(lambda: x @ H @ x / 2, [x]))
        >>> loss.item() < 1e-6
        True

    Reference:
        Pooladzandi and Li, 2024, "Curvature-Informed SGD via General Purpose Lie-Group Preconditioners",
        arXiv:2402.04553, the matrix-free preconditioner.
    """

    traits = Traits(
        rule="x -= lr Q^T Q g, Q = diag(a) + adiag(b) fitted so that E[|Q h|² + |Q^-T v|²] is least for h = H v",
        paper=PAPER,
        state=2,
        extra_evaluations=1,
        needs_second_derivatives=True,
        needs_whole_tensors=True,
        is_stochastic=True,
        example={"lr": 0.05},
        claim=Claim(sentence="a lower loss than Adam's", problems=("docs_lm", "digits", "scaled_logistic")),
    )

    @staticmethod
    def traits_under(options: Mapping[str, Any]) -> Traits:
        """As ``traits``; ``hvp`` says what is asked of the closure."""
        return psgd_traits_under(PSGDXMat.traits, options)

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        momentum: float = 0.0,
        preconditioner_lr: float | None = None,
        update_probability: float = 1.0,
        initial_scale: float | None = None,
        max_norm: float | None = None,
        hvp: str = "exact",
        normalizer: str = "second",
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
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
        return {"a": torch.full_like(like, scale), "b": torch.zeros_like(like)}

    def _fit(self, group: Mapping[str, Any], q: Mapping[str, Tensor], v: Tensor, h: Tensor) -> None:
        fit_xmat(q["a"], q["b"], v, h, step=group["preconditioner_lr"], normalizer=group["normalizer"])

    def _precondition(self, q: Mapping[str, Tensor], g: Tensor) -> Tensor:
        return precondition_xmat(q["a"], q["b"], g)
