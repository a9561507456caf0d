"""Compression of vectors, and the feedback that brings back later what a compression left out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["feed_back_", "largest", "power_iteration", "share"]

# Vectors shorter than this are searched whole: a threshold found from a sample saves time on long ones only.
_LONG, _SAMPLE = 1 << 17, 1 << 15


def feed_back_(e: Tensor, g: Tensor, compress: Callable[[Tensor], Tensor]) -> Tensor:
    """Error feedback: ``a = e + g``; ``c = compress(a)``; ``e = a - c``, in place. Returns c.

    However it compresses, ``Σ c + e = Σ g``, up to rounding: nothing of a gradient is lost, some of it comes later.

    Args:
        e: The error so far, zeros at first.
        g: The gradient, in the dtype to calculate in.
        compress: Gives a vector like its argument, which it does not change.

    Example:
        >>> e = torch.zeros(2)
        >>> feed_back_(e, torch.tensor([3.0, 2.0]), lambda a: a * torch.tensor([1.0, 0.0])).tolist(), e.tolist()
        ([3.0, 0.0], [0.0, 2.0])
    """
    a = g + e
    c = compress(a)
    torch.sub(a, c, out=e)
    return c


def share(size: int, density: float) -> int:
    """How many of ``size`` entries a density keeps: at least one of a vector that has any."""
    return min(size, max(1, round(density * size)))


def largest(a: Tensor, k: int) -> Tensor:
    """The indices of k entries of greatest magnitude, in no order.

    Args:
        a: A vector.
        k: Between 0 and its length.

    Example:
        >>> sorted(largest(torch.tensor([1.0, -5.0, 0.0, 3.0]), 2).tolist())
        [1, 3]
    """
    size = a.abs()
    if a.device.type != "cpu" or len(a) < _LONG:
        return torch.topk(size, k, sorted=False).indices
    # A CPU finds the top of a long vector several times faster among those that exceed a threshold: one that, by a
    # sample of the vector, a few more than k do. Where fewer do, the whole vector is searched.
    sample = size[:: len(a) // _SAMPLE]
    rank = min(len(sample), int(1.1 * k / len(a) * len(sample)) + 8)
    candidates = torch.nonzero(size >= sample.topk(rank).values[-1]).squeeze(1)
    if len(candidates) < k:
        return torch.topk(size, k, sorted=False).indices
    return candidates[torch.topk(size[candidates], k, sorted=False).indices]


def power_iteration(a: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """One step of subspace iteration: ``p = orth(a q)``; ``q = a^T p``; then ``p q^T`` is near a, of the rank of q.

    Args:
        a: rows × columns.
        q: columns × r, from the step before, or random.

    Returns:
        p, rows × r, with orthonormal columns even where ``a q`` is zero, and the new q.
    """
    p = torch.linalg.qr(a @ q).Q
    return p, a.t() @ p
