"""StableMax: probabilities that grow with the logits, not with their exponentials."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["log_stablemax", "stablemax", "stablemax_cross_entropy"]


def log_stablemax(z: Tensor, dim: int = -1) -> Tensor:
    """``log(s(z_i) / sum_j s(z_j))`` with ``s(z) = z + 1`` for z >= 0 and ``1 / (1 - z)`` below, in double precision.

    Args:
        z: Logits.
        dim: The axis of the classes.

    Example:
        >>> [round(value, 6) for value in log_stablemax(torch.tensor([2.0, 0.0, -3.0])).tolist()]
        [-0.348307, -1.446919, -2.833213]
    """
    # Apple's accelerator has no double precision.
    z = z.to(torch.float32 if z.device.type == "mps" else torch.float64)
    # log s(z) is sign(z) log(1 + |z|). Each branch is clamped to where it holds, or where it is not taken its
    # derivative would be that of a logarithm at zero, and their sum not a number.
    log_s = torch.where(z >= 0, torch.log1p(z.clamp(min=0)), -torch.log1p(-z.clamp(max=0)))
    return log_s.log_softmax(dim)


def stablemax(z: Tensor, dim: int = -1) -> Tensor:
    """``s(z_i) / sum_j s(z_j)`` with ``s(z) = z + 1`` for z >= 0 and ``1 / (1 - z)`` below, in double precision.

    Unlike the softmax, it changes where a constant is added to all logits.

    Args:
        z: Logits.
        dim: The axis of the classes.

    Example:
        >>> [round(value, 6) for value in stablemax(torch.tensor([2.0, 0.0, -3.0])).tolist()]
        [0.705882, 0.235294, 0.058824]
    """
    return log_stablemax(z, dim).exp()


def stablemax_cross_entropy(logits: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """``-log stablemax(logits)`` of the right class, worked out in double precision.

    Args:
        logits: ``[B, C]``, or ``[B, C, …]``.
        target: Classes, ``[B]`` or ``[B, …]``.
        reduction: ``mean``, ``sum`` or ``none``, as in torch's ``cross_entropy``.

    Returns:
        In the dtype of the logits, in single precision at least.

    Example:
        >>> round(stablemax_cross_entropy(torch.tensor([[2.0, 0.0, -3.0]]), torch.tensor([0])).item(), 6)
        0.348307

    Reference:
        Prieto, Barsbey, Mediano and Birdal, 2025, "Grokking at the Edge of Numerical Stability", arXiv:2501.04697,
        the section on StableMax.
    """
    losses = F.nll_loss(log_stablemax(logits, dim=min(1, logits.dim() - 1)), target, reduction=reduction)
    return losses.to(torch.promote_types(logits.dtype, torch.float32))
