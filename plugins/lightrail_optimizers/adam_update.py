"""Adam's update by itself, for methods that change it before they apply it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightrail_optimizers.adam_rule import adamw_

__all__ = ["adam_update"]


def adam_update(
    g: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    *,
    t: int | Tensor,
    b1: float,
    b2: float,
    eps: float,
    early_eps: bool = False,
) -> list[Tensor]:
    """``-(m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)``, as new tensors, of moments that it updates in place.

    Args:
        g: Gradients; they stay as they are.
        m: First moments.
        v: Second moments.
        t: The step, from 1.
        b1: Of the first moment.
        b2: Of the second moment.
        eps: Added to the root of the second moment after its correction.
        early_eps: Add eps before the correction instead: ``-sqrt(1-b2^t) / (1-b1^t) m / (sqrt(v) + eps)``.
    """
    # What AdamW adds to zeros: torch's fused kernel finds it in one pass over memory.
    u = [torch.zeros_like(moment) for moment in m]
    if early_eps:
        eps = eps / (1 - b2**t) ** 0.5  # type: ignore[assignment]  # a 0-d tensor where t is one
    adamw_(u, g, m, v, lr=1.0, t=t, b1=b1, b2=b2, eps=eps, wd=0.0)
    return u
