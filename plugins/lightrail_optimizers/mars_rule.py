"""The equations of MARS, in the paper's letters, over lists of tensors.

Yuan, Liu, Wu, Zhou and Gu, 2024, "MARS: Unleashing the Power of Variance Reduction for Training Large Models",
arXiv:2411.10438.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightrail_optimizers.adam_rule import adamw_
from lightrail_optimizers.newton_schulz import newton_schulz
from lightrail_optimizers.tensor_lists import add_scaled_, shrink_

__all__ = ["corrected_", "mars_adamw", "mars_lion", "mars_shampoo"]


def corrected_(g_prev: list[Tensor], g: list[Tensor], *, gamma: float, b1: float) -> list[Tensor]:
    """``c = g + gamma b1/(1-b1) (g - g_prev)``, and each tensor ``c /= max(1, |c|)``, in the place of ``g_prev``."""
    c = g_prev
    torch._foreach_lerp_(c, g, 1 + gamma * b1 / (1 - b1))
    half = c[0].dtype in (torch.float16, torch.bfloat16)
    norms = torch._foreach_norm(c, 2, dtype=torch.float32 if half else None)
    if c[0].device.type == "cpu" and not torch.compiler.is_compiling():
        for each, norm in zip(c, norms, strict=True):
            if norm > 1:
                each.div_(norm)
    else:  # to look at the norms would make the host wait for the device
        torch._foreach_clamp_min_(norms, 1.0)
        torch._foreach_div_(c, norms)
    return c


def mars_adamw(
    x: list[Tensor],
    g: list[Tensor],
    g_prev: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    *,
    gamma: float,
    lr: float | Tensor,
    t: int | Tensor,
    b1: float,
    b2: float,
    eps: float,
    wd: float,
) -> None:
    """One update of AdamW, in place, on :func:`corrected_` gradients; ``g_prev = g``."""
    c = corrected_(g_prev, g, gamma=gamma, b1=b1)
    adamw_(x, c, m, v, lr=lr, t=t, b1=b1, b2=b2, eps=eps, wd=wd)
    torch._foreach_copy_(g_prev, g)


def mars_lion(
    x: list[Tensor],
    g: list[Tensor],
    g_prev: list[Tensor],
    m: list[Tensor],
    *,
    gamma: float,
    lr: float | Tensor,
    b1: float,
    wd: float,
) -> None:
    """One update, in place: ``m = b1 m + (1-b1) c``; ``x *= 1 - lr wd``; ``x -= lr sign(m)``; ``g_prev = g``."""
    torch._foreach_lerp_(m, corrected_(g_prev, g, gamma=gamma, b1=b1), 1 - b1)
    shrink_(x, lr * wd)
    add_scaled_(x, list(torch._foreach_sign(m)), -lr)
    torch._foreach_copy_(g_prev, g)


def mars_shampoo(
    x: list[Tensor],
    g: list[Tensor],
    g_prev: list[Tensor],
    m: list[Tensor],
    *,
    gamma: float,
    lr: float | Tensor,
    b1: float,
    eps: float,
    wd: float,
) -> None:
    """One update, in place: ``m = b1 m + (1-b1) c``; ``x *= 1 - lr wd``; ``x -= lr s NS(m / (1-b1))``; ``g_prev = g``.

    A tensor of more than two dimensions is a matrix of its first against the rest; ``s = sqrt(max(1, rows/columns))``.
    """
    torch._foreach_lerp_(m, corrected_(g_prev, g, gamma=gamma, b1=b1), 1 - b1)
    shrink_(x, lr * wd)
    filled = [(p, momentum.flatten(1)) for p, momentum in zip(x, m, strict=True) if p.numel() > 0]
    if filled:
        # NS(m / (1-b1)) with eps is NS(m) with (1-b1) eps.
        u = newton_schulz([matrix for _, matrix in filled], eps=(1 - b1) * eps)
        for direction in u:
            direction.mul_(max(1.0, direction.size(0) / direction.size(1)) ** 0.5)
        add_scaled_([p for p, _ in filled], [d.reshape(p.shape) for d, (p, _) in zip(u, filled, strict=True)], -lr)
    torch._foreach_copy_(g_prev, g)
