"""Linear equations of every sample of a batch at once, known by what their matrix does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["conjugate_gradients", "dots"]

# How many units in the last place of a vector's length are no more than rounding.
ROUNDING = 8


def conjugate_gradients(
    operator: Callable[[Tensor], Tensor], right: Tensor, start: Tensor | None = None, steps: int = 50, tol: float = 1e-8
) -> Tensor:
    """Solves M x = b for a symmetric, positive semidefinite M, each sample with step lengths of its own.

    Args:
        operator: M, on ``[B, …]``.
        right: b, in the range of M.
        start: Where to start, ``[B, …]``; 0 where it is not given.
        steps: At most how many, at least 0.
        tol: A sample whose residual is this much smaller than b and M times its start is done; not below what the
            precision of b can tell from 0.

    Returns:
        x, ``[B, …]``; one that started outside the range of M keeps what M does not see.

    Example:
        >>> scale = torch.tensor([1.0, 4.0, 9.0])
        >>> x = conjugate_gradients(lambda x: scale * x, torch.ones(1, 3))
        >>> bool(torch.allclose(scale * x, torch.ones(1, 3)))
        True

    Reference:
        M. R. Hestenes and E. Stiefel (1952), Methods of Conjugate Gradients for Solving Linear Systems.
    """
    x = torch.zeros_like(right) if start is None else start.clone()
    seen = torch.zeros_like(right) if start is None else operator(x)
    residual = right - seen
    direction, squares = residual, dots(residual, residual)
    rounding = ROUNDING * torch.finfo(right.dtype).eps
    enough = max(tol, rounding) ** 2 * (dots(right, right) + dots(seen, seen))
    largest = torch.zeros_like(squares)
    for _ in range(steps):
        going = squares > enough
        if not bool(going.any()):
            break
        moved = operator(direction)
        curvature, lengths = dots(direction, moved), dots(direction, direction)
        largest = torch.maximum(largest, curvature / lengths.where(lengths > 0, 1.0))
        # A sample that is done, or whose direction M sees no more of than rounding, stays as it is.
        going = going & (curvature > rounding * largest * lengths)
        length = torch.where(going, squares / curvature.where(going, 1.0), 0.0)
        x = x + _rows(length, x) * direction
        residual = residual - _rows(length, x) * moved
        now = torch.where(going, dots(residual, residual), 0.0)
        direction = residual + _rows(torch.where(going, now / squares.where(going, 1.0), 0.0), x) * direction
        squares = now
    return x


def dots(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ of each sample, ``[B]``."""
    return (a * b).flatten(1).sum(1)


def _rows(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))
