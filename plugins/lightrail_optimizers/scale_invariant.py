"""Weights whose scale has no effect on the loss: how they are recognised, and a step that keeps their norm.

Heo, Chun, Oh, Han, Yun, Kim, Uh and Ha, 2021, "AdamP: Slowing Down the Slowdown for Momentum Optimizers on
Scale-invariant Weights", arXiv:2006.08217.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Invariance", "decay_", "invariances", "projected"]


class Invariance(NamedTuple):
    """Whether a tensor looks scale-invariant: two 0-d truth values, of which at most one is true, and its norms."""

    by_row: Tensor
    whole: Tensor
    norms: Tensor  # of the rows

    def holds(self) -> Tensor:
        """Whether either is true."""
        return self.by_row | self.whole


def invariances(x: list[Tensor], g: list[Tensor], *, delta: float, eps: float) -> list[Invariance | None]:
    """Whether ``|cos(g, w)| < delta / sqrt(size of w)`` for every row w of a tensor, or else for the tensor as one.

    Args:
        x: Parameters.
        g: Gradients.
        delta: The threshold.
        eps: The least norm.

    Returns:
        ``None`` for tensors of fewer than two dimensions. On a CPU also where neither holds; elsewhere that stays on
        the device, for the host would have to wait for it.
    """
    found: list[Invariance | None] = []
    for p, gradient in zip(x, g, strict=True):
        if p.ndim < 2 or p.numel() == 0:
            found.append(None)
            continue
        each = _invariance(_rows(p), _rows(gradient), delta, eps)
        looks = p.device.type == "cpu" and not torch.compiler.is_compiling()
        found.append(None if looks and not each.holds() else each)
    return found


def _rows(tensor: Tensor) -> Tensor:
    """A row an output channel, in single precision at least."""
    return tensor.flatten(1).to(torch.promote_types(tensor.dtype, torch.float32))


def _invariance(w: Tensor, g: Tensor, delta: float, eps: float) -> Invariance:
    products = torch.linalg.vecdot(g, w)
    w_norms, g_norms = torch.linalg.vector_norm(w, dim=1), torch.linalg.vector_norm(g, dim=1)
    bounds = w_norms.clamp(min=eps) * g_norms.clamp(min=eps) * (delta / w.size(1) ** 0.5)
    by_row = (products.abs() < bounds).all()
    w_norm, g_norm = torch.linalg.vector_norm(w_norms), torch.linalg.vector_norm(g_norms)
    bound = w_norm.clamp(min=eps) * g_norm.clamp(min=eps) * (delta / w.numel() ** 0.5)
    return Invariance(by_row, (products.sum().abs() < bound) & ~by_row, w_norms)


def projected(u: list[Tensor], x: list[Tensor], found: Sequence[Invariance | None], *, eps: float) -> list[Tensor]:
    """``u - ŵ (ŵ·u)`` with ``ŵ = w / (|w| + eps)``, for the rows w of x or for x as a whole, where it is invariant.

    Returns:
        New tensors, or those of ``u`` where there is nothing to take out.
    """
    return [step if each is None else _projected(step, p, each, eps) for step, p, each in zip(u, x, found, strict=True)]


def _projected(u: Tensor, x: Tensor, found: Invariance, eps: float) -> Tensor:
    w, steps = _rows(x), _rows(u)
    products = torch.linalg.vecdot(steps, w)
    by_row = products / (found.norms + eps).square()
    whole = products.sum() / (torch.linalg.vector_norm(found.norms) + eps).square()
    radial = torch.where(found.by_row, by_row, torch.where(found.whole, whole, 0.0))
    return torch.addcmul(steps, radial[:, None], w, value=-1).to(u.dtype).view(x.shape)


def decay_(x: list[Tensor], found: Sequence[Invariance | None], by: float | Tensor, ratio: float) -> None:
    """``x *= 1 - by``, in place; ``x *= 1 - by ratio`` where it is invariant."""
    for p, each in zip(x, found, strict=True):
        part = 1.0 if each is None else 1 - (1 - ratio) * each.holds().to(each.norms.dtype)
        p.sub_(p * (by * part))
