"""The equations of the preconditioned Polyak step, with and without slack.

Abdukhakimov, Xiang, Kamzolov and Takáč, 2023, "Stochastic Gradient Descent with Preconditioned Polyak Step-size",
arXiv:2310.02093. Each answers a small problem in the norm ``||Δ||²_B = Δᵀ B Δ``, in which the loss is its linear model
``f + gᵀΔ``. The answer is ``Δ = -tau B⁻¹ g``, and ``n`` stands for ``||g||²_B⁻¹``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["adagrad_scale", "adam_scale", "polyak", "polyak_l1", "polyak_l2"]


def polyak(f: float, n: float, *, eta_max: float) -> float:
    """``tau = min(f / n, eta_max)``: the least ``||Δ||_B`` with ``f + gᵀΔ = 0``.

    Args:
        f: The loss above its lower bound; below it nothing moves.
        n: The squared norm of the gradient.
        eta_max: The largest step.

    Example:
        >>> polyak(2.0, 25.0, eta_max=1.0)
        0.08
    """
    return min(max(f, 0.0) / n, eta_max) if n > 0 else 0.0


def polyak_l1(f: float, n: float, s: float, *, lam: float, mu: float) -> tuple[float, float]:
    """The least ``½||Δ||²_B + mu/2 (s' - s)² + lam s'`` with ``f + gᵀΔ <= s'`` and ``s' >= 0``.

    Where s' is positive, ``tau = (f - s + lam/mu)₊ / (n + 1/mu)`` and ``s' = s + (tau - lam) / mu``. Where that is
    negative, s' is 0 and the whole loss is left to Δ: ``tau = f / n``, which is then the smaller of the two.

    Args:
        f: The loss above its lower bound.
        n: The squared norm of the gradient.
        s: The slack, >= 0.
        lam: The price of slack, >= 0.
        mu: Its inertia, > 0.

    Returns:
        ``(tau, s')``.
    """
    free = max(f - s + lam / mu, 0.0) / (n + 1 / mu)
    tau = min(free, max(f, 0.0) / n) if n > 0 else 0.0
    return tau, max(s + (free - lam) / mu, 0.0)


def polyak_l2(f: float, n: float, s: float, *, lam: float, mu: float) -> tuple[float, float]:
    """The least ``½||Δ||²_B + mu/2 (s' - s)² + lam/2 s'²`` with ``f + gᵀΔ <= s'``.

    ``tau = (f - mu s / (mu + lam))₊ / (n + 1 / (mu + lam))`` and ``s' = (mu s + tau) / (mu + lam)``, which is never
    negative; the arguments and the answer are those of :func:`polyak_l1`.
    """
    tau = max(f - mu * s / (mu + lam), 0.0) / (n + 1 / (mu + lam))
    return tau, (mu * s + tau) / (mu + lam)


def adam_scale(g: Sequence[Tensor], v: list[Tensor], *, t: int, b2: float, eps: float) -> list[Tensor]:
    """``v = b2 v + (1-b2) g²``, in place; ``B = sqrt(v / (1-b2^t)) + eps``."""
    torch._foreach_mul_(v, b2)
    torch._foreach_addcmul_(v, list(g), list(g), 1 - b2)
    b = torch._foreach_sqrt(v)
    torch._foreach_div_(b, (1 - b2**t) ** 0.5)
    torch._foreach_add_(b, eps)
    return list(b)


def adagrad_scale(g: Sequence[Tensor], v: list[Tensor], *, eps: float) -> list[Tensor]:
    """``v = v + g²``, in place; ``B = sqrt(v) + eps``."""
    torch._foreach_addcmul_(v, list(g), list(g))
    b = torch._foreach_sqrt(v)
    torch._foreach_add_(b, eps)
    return list(b)
