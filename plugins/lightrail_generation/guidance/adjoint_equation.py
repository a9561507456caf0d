"""The probability flow between uniform steps in λ, and its adjoint equation: gradients without stored states."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lightrail.errors import CompositionError
from lightrail.generation import Grid, Level, NoisePath, weighted_sum
from lightrail.options import one_of
from lightrail_generation.samplers.deis import TABLEAUS, multistep_weights
from lightrail_generation.samplers.exponential import lagrange_coefficients

__all__ = ["METHODS", "adjoint_gradient", "knots_of", "opaque", "solved"]

NoiseOf = Callable[[Tensor, Level], Tensor]
Slopes = Callable[[Sequence[Tensor], Level], list[Tensor]]

METHODS = ("adams", "rk4")
# Predictions that the explicit Adams method looks at.
LOOKS_BACK = 4


def knots_of(grid: Grid, steps: int) -> list[Level]:
    """Levels at equal distances in λ, from the first level of a grid where α > 0 to its last where σ > 0.

    Args:
        grid: The levels of a run.
        steps: Intervals between them, at least 1.
    """
    path = grid.path
    first = grid[0] if math.isfinite(grid[0].lam) else path.level(path.t_finite)
    last = path.level(path.t_min) if grid[-1].is_clean else grid[-1]
    step = (last.lam - first.lam) / steps
    return [first, *(path.level_at_lam(first.lam + i * step) for i in range(1, steps)), last]


def solved(noise: NoiseOf, x: Tensor, levels: Sequence[Level], path: NoisePath, method: str = "adams") -> Tensor:
    """The state at the last level, by d(x/α)/dρ = ε.

    Args:
        noise: ε of states at a level.
        x: States ``[B, …]`` at the first level.
        levels: α > 0 and σ > 0 at each; they may rise or fall.
        path: The noise path.
        method: ``adams``, explicit, of order 4 by a polynomial in λ with one evaluation a step; or ``rk4`` in ρ, four.

    Example:
        >>> from lightrail.generation import KarrasVE
        >>> path = KarrasVE()
        >>> levels = [path.level(t) for t in (4.0, 2.0, 1.0)]
        >>> solved(lambda x, level: torch.ones_like(x), torch.zeros(1, 1), levels, path).item()
        -3.0
    """

    def slopes(states: Sequence[Tensor], level: Level) -> list[Tensor]:
        return [noise(level.alpha * states[0], level)]

    return levels[-1].alpha * _integrated(slopes, [x / levels[0].alpha], levels, path, method)[0]


def adjoint_gradient(
    noise: NoiseOf,
    x: Tensor,
    gradient: Tensor,
    levels: Sequence[Level],
    path: NoisePath,
    method: str = "adams",
    steered_by: Sequence[Tensor] = (),
) -> list[Tensor]:
    """∂L/∂x_T from ∂L/∂x_0, with no more memory than one evaluation needs.

    With y = x/α and a = ∂L/∂y the adjoint equation is da/dρ = −(∂ε/∂y)ᵀ a. What is solved, from data to noise, is

    dy/dρ = ε,  db/dλ = σ (∂ε/∂x)ᵀ b − b,  d(∂L/∂c)/dλ = (∂ε/∂c)ᵀ b,  b = ρ a,  λ = −log ρ

    because b does not decay on the way as a does, and large steps stay stable.

    Args:
        noise: ε of states at a level, which autograd can follow.
        x: States ``[B, …]`` at the last level.
        gradient: ∂L/∂x there.
        levels: From noise to data, as for :func:`solved`.
        path: The noise path.
        method: As for :func:`solved`.
        steered_by: Tensors c on which ``noise`` depends besides, such as embeddings; they require gradients.

    Returns:
        ∂L/∂x at the first level, and ∂L/∂c for each c, without what L itself says of c.

    Raises:
        CompositionError: Autograd cannot follow ``noise``.

    Example:
        >>> from lightrail.generation import KarrasVE
        >>> path = KarrasVE()
        >>> levels = [path.level(4.0 * 0.5**i) for i in range(9)]
        >>> x = torch.ones(1, 1, dtype=torch.float64)
        >>> found, = adjoint_gradient(lambda x, level: x / level.rho, x, x, levels, path, "rk4")
        >>> round(float(found), 3)  # x_0 = x_T ρ_0/ρ_T
        0.004
    """

    def slopes(states: Sequence[Tensor], level: Level) -> list[Tensor]:
        y, b = states[0], states[1]
        with torch.enable_grad():
            x = (level.alpha * y).detach().requires_grad_()
            e = noise(x, level)
            if not e.requires_grad:
                raise opaque()
            pulled, *others = torch.autograd.grad(e, (x, *steered_by), b, materialize_grads=True)
        return [e.detach(), level.sigma * pulled - b, *others]

    here, there = levels[-1], levels[0]
    begin = [x / here.alpha, here.sigma * gradient, *(torch.zeros_like(c) for c in steered_by)]
    found = _integrated(slopes, begin, levels[::-1], path, method)
    return [found[1] / there.sigma, *found[2:]]


def _integrated(
    slopes: Slopes, states: Sequence[Tensor], levels: Sequence[Level], path: NoisePath, method: str
) -> list[Tensor]:
    """The states at the last level; the slope of the first is in ρ, those of the others in λ."""
    one_of(METHODS, method=method)
    now, history = list(states), []
    for number, (here, there) in enumerate(pairwise(levels)):
        history = [slopes(now, here), *history[: LOOKS_BACK - 1]]
        if method == "rk4" or len(history) < min(LOOKS_BACK, len(levels) - 1):
            # An Adams method that began with fewer predictions would be of order 2 in all.
            now = _runge_kutta_step(slopes, now, history[0], here, there, path)
            continue
        knots = tuple(levels[number - j] for j in range(len(history)))
        in_rho, in_lam = multistep_weights(path, there, knots, "lam"), _weights_in_lam(there, knots)
        now = [_moved(x, in_lam if i else in_rho, [each[i] for each in history]) for i, x in enumerate(now)]
    return now


def _weights_in_lam(there: Level, knots: Sequence[Level]) -> list[float]:
    """∫ L_j dλ from the first knot to ``there``, L_j the polynomial in λ that is 1 at knot j and 0 at the others."""
    h = there.lam - knots[0].lam
    rows = lagrange_coefficients([(knot.lam - knots[0].lam) / h for knot in knots])
    return [h * math.fsum(c / (k + 1) for k, c in enumerate(row)) for row in rows]


def _runge_kutta_step(
    slopes: Slopes, states: Sequence[Tensor], first: list[Tensor], here: Level, there: Level, path: NoisePath
) -> list[Tensor]:
    """By the classical rule in ρ, for y, a = b/ρ and the others."""
    span = there.rho - here.rho
    rows, weights = TABLEAUS["rho_rk4"]
    begin = _per_rho(states, 1 / here.rho)

    def moved(shares: Sequence[float]) -> list[Tensor]:
        scaled = [span * share for share in shares]
        return [_moved(x, scaled, [each[i] for each in stages[: len(scaled)]]) for i, x in enumerate(begin)]

    stages = [_slopes_in_rho(first, states, here)]
    for place, row in rows:
        level = there if place == 1 else path.level_at_lam(-math.log(here.rho + place * span))
        reached = _per_rho(moved(row), level.rho)
        stages.append(_slopes_in_rho(slopes(reached, level), reached, level))
    return _per_rho(moved(weights), there.rho)


def _per_rho(states: Sequence[Tensor], factor: float) -> list[Tensor]:
    """With the second, a or b, multiplied."""
    return [factor * x if i == 1 else x for i, x in enumerate(states)]


def _slopes_in_rho(found: list[Tensor], states: Sequence[Tensor], level: Level) -> list[Tensor]:
    """Those of y, a and the others, from those of y in ρ and of b and the others in λ: da/dρ = −(db/dλ + b)/ρ²."""
    if len(found) == 1:
        return found
    of_a = (found[1] + states[1]) * (-(level.rho**-2))
    return [found[0], of_a, *(each * (-1 / level.rho) for each in found[2:])]


def _moved(x: Tensor, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    return weighted_sum((1.0, x), *zip(weights, slopes, strict=True))


def opaque() -> CompositionError:
    return CompositionError(
        "the model cannot be differentiated",
        found="a prediction without a gradient",
        allowed="a model that autograd can follow",
        remedy="Let its output() run without torch.no_grad(), or choose guidance that needs no gradient: find_noise.",
    )
