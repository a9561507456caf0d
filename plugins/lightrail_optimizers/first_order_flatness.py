"""Four gradients, at the worst points for the loss and for its gradient's norm, which GAM and FAD share.

First-order flatness is ``R1 = rho max ||∇L(x+d)||`` over ``||d|| <= rho``. With ``ĝ`` for ``g / ||g||``::

    g0 = ∇L(x)    g1 = ∇L(x + rho' ĝ0)    y = x + rho ĥ, h = g1 - g0
    g2 = ∇L(y)    g3 = ∇L(y + rho' ĝ2)

``h ≈ rho' ∇||∇L(x)||`` climbs the gradient's norm, so that y is its worst point nearby, ``R1 ≈ rho ||g2||`` and
``∇R1 ≈ rho/rho' (g3 - g2)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightrail.step import Closure
from lightrail_optimizers.closure_answers import gradients, wide
from lightrail_optimizers.nearby_gradients import dot, gradient_at
from lightrail_optimizers.tensor_lists import global_norm
from lightrail_optimizers.transforms.sam import ascent, moved

__all__ = ["Flatness", "first_order_flatness"]


@dataclass(frozen=True)
class Flatness:
    """What was found.

    Args:
        g0: The gradient, as are all one tensor a parameter, in single precision at least.
        g1: At the worst point for the loss.
        g2: At the worst point for the gradient's norm; empty where it was not asked for.
        g3: At the worst point for the loss near that one; empty where it was not asked for.
        figures: 0-d tensors: ``gradient_norm``, the norm of g0; ``sharpness``, by how much the loss rises on the way
            to ``x + rho' ĝ0``; ``flatness``, R1, where g2 was asked for.
    """

    g0: list[Tensor]
    g1: list[Tensor]
    g2: list[Tensor] = field(default_factory=list)
    g3: list[Tensor] = field(default_factory=list)
    figures: dict[str, Tensor] = field(default_factory=dict)


def first_order_flatness(
    closure: Closure, x: Sequence[Tensor], rho: float, rho_prime: float, adaptive: bool = False, evaluations: int = 3
) -> Flatness:
    """Evaluates so many of g1, g2 and g3.

    Args:
        closure: Answers at the current point.
        x: Its parameters that have a gradient, g0, in ``.grad``; no other is moved.
        rho: Radius within which the gradient's norm is to be low, >= 0.
        rho_prime: How far a gradient is followed, >= 0.
        adaptive: Whether a coordinate's reach grows with its magnitude, as for ASAM.
        evaluations: From 1 to 3.
    """
    g0 = wide(gradients(x))
    e, norm = ascent(x, g0, rho_prime, adaptive)
    g1 = gradient_at(closure, x, moved(x, e))
    # The trapezoidal rule along e, where the slope at the start is rho' ||T g0||: exact if the loss is quadratic.
    figures = {
        "gradient_norm": global_norm(g0) if adaptive else norm,
        "sharpness": (rho_prime * norm + dot(e, g1)) / 2,
    }
    if evaluations == 1 or not x:
        return Flatness(g0, g1, figures=figures)
    y = moved(x, ascent(x, torch._foreach_sub(g1, g0), rho, adaptive)[0])
    g2 = gradient_at(closure, x, y)
    figures["flatness"] = rho * global_norm(g2)
    if evaluations == 2:
        return Flatness(g0, g1, g2, figures=figures)
    g3 = gradient_at(closure, x, moved(y, ascent(y, g2, rho_prime, adaptive)[0]))
    return Flatness(g0, g1, g2, g3, figures)
