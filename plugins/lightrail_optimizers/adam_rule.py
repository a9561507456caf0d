"""The equations of Adam and AdamW over lists of tensors, for the many methods that are built on them.

Kingma and Ba, 2015, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980, Algorithm 1; Loshchilov and Hutter,
2019, "Decoupled Weight Decay Regularization", arXiv:1711.05101, Algorithm 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightrail_optimizers.tensor_lists import add_scaled_, shrink_

__all__ = ["adam_direction", "adam_moments_", "adam_update", "adamw_"]

_FUSED_DEVICES = ("cpu", "cuda")


def adam_moments_(g: list[Tensor], m: list[Tensor], v: list[Tensor], *, b1: float, b2: float) -> None:
    """``m = b1 m + (1-b1) g``; ``v = b2 v + (1-b2) g²``, in place."""
    torch._foreach_lerp_(m, g, 1 - b1)
    shrink_(v, 1 - b2)
    torch._foreach_addcmul_(v, g, g, 1 - b2)


def adam_direction(
    m: list[Tensor], v: list[Tensor], *, t: float | Tensor, b1: float, b2: float, eps: float | Tensor
) -> list[Tensor]:
    """``(m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)``, as new tensors."""
    u = list(torch._foreach_sqrt(v))
    torch._foreach_div_(u, (1 - b2**t) ** 0.5)
    torch._foreach_add_(u, eps)
    torch._foreach_reciprocal_(u)
    torch._foreach_mul_(u, m)
    torch._foreach_div_(u, 1 - b1**t)
    return u


def adamw_(
    x: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    *,
    lr: float | Tensor,
    t: float | Tensor,
    b1: float,
    b2: float,
    eps: float | Tensor,
    wd: float,
) -> None:
    """One update, in place: ``x *= 1 - lr wd``, then ``x -= lr`` times :func:`adam_direction` of the new moments.

    Args:
        x: Parameters.
        g: Gradients; they stay as they are.
        m: First moments.
        v: Second moments.
        lr: Learning rate.
        t: The step, from 1.
        b1: Of the first moment.
        b2: Of the second moment.
        eps: Added to the root of the second moment after its correction.
        wd: Decoupled weight decay.
    """
    if _can_fuse(x, g, m, v):
        torch._fused_adamw_(
            x,
            g,
            m,
            v,
            [],
            [torch.full((), float(t), device=x[0].device)] * len(x),
            lr=float(lr),
            beta1=b1,
            beta2=b2,
            weight_decay=wd,
            eps=float(eps),
            amsgrad=False,
            maximize=False,
        )
        return
    adam_moments_(g, m, v, b1=b1, b2=b2)
    shrink_(x, lr * wd)
    add_scaled_(x, adam_direction(m, v, t=t, b1=b1, b2=b2, eps=eps), -lr)


def adam_update(
    g: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    *,
    t: float | Tensor,
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
    corrected_eps = eps / (1 - b2**t) ** 0.5 if early_eps else eps
    adamw_(u, g, m, v, lr=1.0, t=t, b1=b1, b2=b2, eps=corrected_eps, wd=0.0)
    return u


def _can_fuse(x: list[Tensor], *others: list[Tensor]) -> bool:
    """torch's fused kernel makes one pass over memory; it needs equal dtypes and strides, which it does not check."""
    if torch.compiler.is_compiling() or not x or x[0].device.type not in _FUSED_DEVICES:
        return False
    return all(
        y.dtype == p.dtype and y.stride() == p.stride() for other in others for p, y in zip(x, other, strict=True)
    )
