"""FAD: flatness-aware minimization for domain generalization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightrail.options import between, non_negative, positive
from lightrail.step import Closure, Transform
from lightrail.traits import Traits
from lightrail_optimizers.first_order_flatness import first_order_flatness
from lightrail_optimizers.learning_rate_share import LearningRateShare
from lightrail_optimizers.nearby_gradients import put_gradients, with_gradient

__all__ = ["FAD", "fad_gradient"]


def fad_gradient(
    g0: list[Tensor],
    g1: list[Tensor],
    g2: list[Tensor],
    g3: list[Tensor],
    alpha: float,
    beta: float,
    c: float = 1.0,
) -> list[Tensor]:
    """``g0 + beta (alpha (g1 - g0) + (1-alpha) c (g3 - g2))``.

    Args:
        g0: The gradient, at least in single precision as are all.
        g1: At the worst point for the loss.
        g2: At the worst point for the gradient's norm; may be empty where ``alpha`` is 1.
        g3: At the worst point for the loss near that one; may be empty where ``alpha`` is 1.
        alpha: Share of zeroth-order flatness, from 0 to 1.
        beta: Strength of both, >= 0.
        c: ``rho / rho'``, so that ``c (g3 - g2)`` is the gradient of ``rho ||∇L||``.

    Returns:
        New tensors; g1 itself, bit for bit, for ``alpha = beta = 1``.

    Example:
        >>> g = [[torch.tensor([float(i)])] for i in (1, 2, 5, 9)]
        >>> fad_gradient(*g, alpha=0.5, beta=0.5)
        [tensor([2.2500])]
    """
    if not g0:
        return []
    direction = list(torch._foreach_lerp(g0, g1, beta * alpha))
    if alpha < 1:
        torch._foreach_add_(direction, torch._foreach_sub(g3, g2), alpha=beta * (1 - alpha) * c)
    return direction


class FAD(Transform):
    """Flatness-aware minimization: the loss, its rise nearby and its largest gradient nearby, all at once.

    ``L + beta (alpha R0 + (1-alpha) R1)``, where ``R0 = max L(x+d) - L(x)`` and ``R1 = rho max ||∇L(x+d)||`` over
    ``||d|| <= rho``; its gradient is ``g0 + beta (alpha (g1 - g0) + (1-alpha) rho/rho' (g3 - g2))``, with g0 at x, g1
    at ``x + rho' ĝ0``, g2 at ``y = x + rho ĥ`` for ``h = g1 - g0``, and g3 at ``y + rho' ĝ2`` (a hat divides by the
    norm).

    Args:
        rho: Radius, > 0.
        alpha: Share of R0, from 0 to 1. 1 is SAM's objective, in two evaluations; with ``beta=1`` it is SAM of
            radius ``rho_prime``, bit for bit.
        beta: Strength of both, >= 0; 0 is the optimizer without FAD, bit for bit, at the price of one evaluation.
        rho_prime: How far a gradient is followed, > 0, which is the radius of R0; ``None`` for ``rho``.
        adaptive: Whether a coordinate's reach grows with its magnitude, as in ASAM.
        radius_follows_lr: Whether both radii are multiplied by ``lr / lr at the start``, so that they fall with the
            schedule.

    Raises:
        ConfigurationError: An option out of range, a sparse gradient or a complex parameter.
        ClosureError: The closure cannot evaluate elsewhere.

    Guarantees:
        All four evaluations see the same micro-batches and the same dropout masks; BatchNorm statistics move once.
        Logged are the norm of the gradient, R0 (``sharpness``) and R1 (``flatness``).

    Deviations:
        The coefficient of ``g3 - g2`` is derived from the objective, to first order in rho; there is no published
        code to compare with, and the default options are ours.

    Example:
        >>> from lightrail import Closure, TransformedOptimizer
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [FAD(rho=0.5)])
        >>> loss = optimizer.step(Closure(lambda: (w**2).sum() / 2, [w]))
        >>> [round(value, 4) for value in w.tolist()]
        [2.67, 3.56]

    Reference:
        Zhang, Xu, Yu, Dong, Tian and Cui, 2023, "Flatness-Aware Minimization for Domain Generalization",
        arXiv:2307.11108, the section on the method.
    """

    traits = Traits(
        rule="g = g0 + beta (alpha (g1 - g0) + (1-alpha) rho/rho' (g3 - g2))",
        paper=(
            "Zhang, Xu, Yu, Dong, Tian, Cui, 2023, Flatness-Aware Minimization for Domain Generalization, "
            "arXiv:2307.11108"
        ),
        state=0,
        extra_evaluations=3,
        needs_closure=True,
    )

    @staticmethod
    def traits_under(options: Mapping[str, Any]) -> Traits:
        """Without a share of first-order flatness two gradients are enough; without strength, one."""
        if options.get("beta", 1.0) == 0:
            return replace(FAD.traits, extra_evaluations=0, needs_closure=False)
        return replace(FAD.traits, extra_evaluations=1) if options.get("alpha", 0.5) == 1 else FAD.traits

    def __init__(
        self,
        rho: float = 0.05,
        alpha: float = 0.5,
        beta: float = 1.0,
        rho_prime: float | None = None,
        adaptive: bool = False,
        radius_follows_lr: bool = False,
    ) -> None:
        rho_prime = rho if rho_prime is None else rho_prime
        positive(rho=rho, rho_prime=rho_prime)
        between(0.0, 1.0, closed="both", alpha=alpha)
        non_negative(beta=beta)
        self.rho = rho
        self.rho_prime = rho_prime
        self.alpha = alpha
        self.beta = beta
        self.adaptive = adaptive
        self.radius_follows_lr = radius_follows_lr
        self._share = LearningRateShare()
        self._figures: dict[str, Tensor] = {}

    def prepare(self, optimizer: Optimizer) -> None:
        if self.radius_follows_lr:
            self._share.watch(optimizer)

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        if self.beta == 0:
            return
        x = with_gradient("fad", closure)
        share = self._share.now()
        spent = 3 if self.alpha < 1 else 1
        found = first_order_flatness(closure, x, share * self.rho, share * self.rho_prime, self.adaptive, spent)
        c = self.rho / self.rho_prime
        put_gradients(x, fad_gradient(found.g0, found.g1, found.g2, found.g3, self.alpha, self.beta, c))
        self._figures = found.figures

    def logged(self) -> dict[str, float]:
        return {name: float(value) for name, value in self._figures.items()}
