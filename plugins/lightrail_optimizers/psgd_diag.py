"""PSGD with a diagonal preconditioner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightrail.traits import Claim, Traits
from lightrail_optimizers.flat_vector import blocks
from lightrail_optimizers.psgd_base import PAPER, PSGD, psgd_traits_under, step_over

__all__ = ["PSGDDiag", "fit_diag", "precondition_diag"]


def fit_diag(d: Tensor, v: Tensor, h: Tensor, *, step: float, normalizer: str = "second") -> None:
    """Moves ``Q = diag(d)`` towards ``d⁴ = mean(v²) / mean(h²)``, in place.

    ``d -= mu d ((d h)² - (v/d)²)`` with ``mu = step / max((d h)² + (v/d)²)``.

    Args:
        d: The diagonal.
        v: A random direction.
        h: The Hessian times v.
        step: In (0, 1].
        normalizer: ``first`` has ``max |(d h)² - (v/d)²|`` in the place of the sum.
    """
    parts = blocks(len(d), d.device)
    gradients, sizes = [], []
    for i in parts:
        a, b = (d[i] * h[i]).square_(), (v[i] / d[i]).square_()
        gradients.append(a - b)
        sizes.append(a.add_(b).max() if normalizer == "second" else gradients[-1].abs().max())
    mu = step_over(step, torch.stack(sizes).max())
    for i, gradient in zip(parts, gradients, strict=True):
        d[i].sub_(gradient.mul_(d[i]).mul_(mu))


def precondition_diag(d: Tensor, g: Tensor) -> Tensor:
    """``P g = d² g``, as a new vector."""
    return torch.mul(d, d).mul_(g)


class PSGDDiag(PSGD):
    """PSGD with a diagonal preconditioner: every coordinate is divided by the magnitude of its curvature.

    ``Q = diag(d)`` and ``P = Q²`` are fitted to pairs ``v ~ N(0, I)``, ``h = H v`` so that
    ``E[h^T P h + v^T P^-1 v]`` is least: ``d -= mu d ((d h)² - (v/d)²)``; ``x -= lr P g``. P tends to ``|H|^-1`` for a
    diagonal H.

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
        The paper has it as the low-rank kind of rank 0, to which it is equal; apart from it, it keeps one vector only.
        With several groups, v is drawn for all at once and each Q is fitted to its own part of ``H v``, parts from the
        other groups' v included. A finite difference takes as v what rounding left of the move. ``hvp=whitening`` adds
        to g a direction of 2^-13 times its mean magnitude, as the authors' code does and the paper does not.

    Example:
        >>> from lightrail import Closure
        >>> _ = torch.manual_seed(0)
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> curvature = torch.tensor([1.0, 100.0])
        >>> optimizer = PSGDDiag([x], lr=0.5)
        >>> for _ in range(100):
        ...     loss = optimizer.step(Closure(lambda: (curvature * x**2).sum() / 2, [x]))
        >>> loss.item() < 1e-6
        True

    Reference:
        Pooladzandi and Li, 2024, "Curvature-Informed SGD via General Purpose Lie-Group Preconditioners",
        arXiv:2402.04553, Section 3 with rank 0.
    """

    traits = Traits(
        rule="x -= lr d² g, d fitted so that E[(d h)² + (v/d)²] is least for h = H v",
        paper=PAPER,
        state=1,
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
        return psgd_traits_under(PSGDDiag.traits, options)

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
        return {"d": torch.full_like(like, scale)}

    def _fit(self, group: Mapping[str, Any], q: Mapping[str, Tensor], v: Tensor, h: Tensor) -> None:
        fit_diag(q["d"], v, h, step=group["preconditioner_lr"], normalizer=group["normalizer"])

    def _precondition(self, q: Mapping[str, Tensor], g: Tensor) -> Tensor:
        return precondition_diag(q["d"], g)
