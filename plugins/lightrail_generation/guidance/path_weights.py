"""How fast the weight of a particle grows along the reverse diffusion, where its score is mixed of others."""

from __future__ import annotations

import math

from torch import Tensor

from lightrail.generation import Level

__all__ = ["annealing_rate", "cfg_rate", "lambda_step", "product_rate"]


def lambda_step(here: Level, there: Level) -> float:
    """Δλ, the length of a step for weights: (1 − e^{−2h})/2 with h = λ_t − λ_s.

    It is what ∫ dλ |ε|² gives where the score stays as it is over the step, and finite for the step to the data.

    Args:
        here: The level s.
        there: The level t; σ_t = 0 is allowed.

    Example:
        >>> from lightrail.generation import KarrasVE
        >>> lambda_step(KarrasVE().level(2.0), KarrasVE().level(0.0))
        0.5
    """
    return -math.expm1(-2 * (there.lam - here.lam)) / 2


def annealing_rate(noise: Tensor, beta: float) -> Tensor:
    """d log w/dλ = β (β − 1) |ε|² of q^β, ``[B]`` in float64.

    Args:
        noise: ε, ``[B, …]``.
        beta: β.
    """
    return beta * (beta - 1) * _dots(noise, noise)


def cfg_rate(uncond: Tensor, cond: Tensor, beta: float) -> Tensor:
    """d log w/dλ = β (β − 1) |ε_u − ε_c|² of q_u^{1−β} q_c^β, ``[B]`` in float64.

    Args:
        uncond: ε_u, ``[B, …]``.
        cond: ε_c, ``[B, …]``.
        beta: β.
    """
    return beta * (beta - 1) * _dots(uncond - cond, uncond - cond)


def product_rate(first: Tensor, second: Tensor) -> Tensor:
    """d log w/dλ = 2 ⟨ε_1, ε_2⟩ of q_1 q_2, ``[B]`` in float64.

    Args:
        first: ε_1, ``[B, …]``.
        second: ε_2, ``[B, …]``.
    """
    return 2 * _dots(first, second)


def _dots(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).flatten(1).sum(1)
