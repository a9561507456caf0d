"""The update of SGD with momentum over lists of tensors, for the methods that are built on it.

Polyak, 1964, "Some methods of speeding up the convergence of iteration methods", in the form that torch has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightrail_optimizers.tensor_lists import add_scaled_

__all__ = ["momentum_step_"]


def momentum_step_(
    x: list[Tensor], g: list[Tensor], m: list[Tensor], *, lr: float | Tensor, b: float, wd: float = 0.0
) -> None:
    """``m = b m + g + wd x``; ``x -= lr m``, in place.

    Args:
        x: Parameters.
        g: Gradients; they stay as they are.
        m: Momenta; zeros at first.
        lr: Learning rate.
        b: How much of the momentum stays.
        wd: Weight decay, coupled.
    """
    if m[0].device.type == "cpu":
        # Not `_foreach_mul_`: on a CPU it rounds the factor to half precision when m is in it.
        for m_i in m:
            m_i.mul_(b)
    else:
        torch._foreach_mul_(m, b)
    torch._foreach_add_(m, torch._foreach_add(g, x, alpha=wd) if wd else g)
    add_scaled_(x, m, -lr)
