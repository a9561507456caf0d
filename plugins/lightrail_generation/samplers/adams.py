"""Adams-Bashforth coefficients, and steps along ρ = σ/α, where the probability flow is d(x/α)/dρ = ε."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction
from math import comb

import torch
from torch import Tensor

from lightrail.errors import ConfigurationError
from lightrail.generation import Level, Prediction, weighted_sum
from lightrail.generation.prediction import weights_of

__all__ = ["ADAMS", "adams_bashforth", "along_rho", "combined", "of_differences", "terms_of"]

# γ_i of x' = x + h Σ γ_i ∇^i f, with ∇ f_n = f_n − f_{n−1}.
ADAMS = (Fraction(1), Fraction(1, 2), Fraction(5, 12), Fraction(3, 8), Fraction(251, 720))


def of_differences(coefficients: Sequence[Fraction | float]) -> tuple[float, ...]:
    """The weights w_j, newest first, with which Σ_j w_j f_{n−j} = Σ_i c_i ∇^i f_n.

    Example:
        >>> of_differences([1, 0.5])
        (1.5, -0.5)
    """
    count = len(coefficients)
    return tuple(float((-1) ** j * sum(comb(i, j) * coefficients[i] for i in range(j, count))) for j in range(count))


@functools.cache
def adams_bashforth(order: int) -> tuple[float, ...]:
    """The weights of the newest ``order`` slopes, newest first; they sum to 1.

    Args:
        order: From 1 to 5.

    Example:
        >>> adams_bashforth(2)
        (1.5, -0.5)
    """
    return of_differences(ADAMS[:order])


def terms_of(prediction: Prediction, form: str, weight: float) -> tuple[tuple[float, Tensor], ...]:
    """Pairs (w, tensor) whose weighted sum is ``weight`` times the prediction in ``form``, which is not worked out.

    The factors of the conversion go into the weights, in double precision, so that it costs no pass of its own and
    nothing cancels where α or σ is small.

    Args:
        prediction: At a level with numbers.
        form: data or noise.
        weight: Its factor.
    """
    if form in prediction.known:
        return ((weight, prediction.known[form]),)
    level = prediction.level
    source = next((each for each in ("data", "noise") if each in prediction.known), prediction.form)
    a, b = weights_of(source, level)
    c, d = weights_of(form, level)
    determinant = level.alpha * b - level.sigma * a
    if determinant == 0:
        raise _starts_at_pure_noise(level)
    factor = weight / determinant
    of_value = factor * (d * level.alpha - c * level.sigma)
    return ((factor * (c * b - d * a), prediction.x), (of_value, prediction.known[source]))


def combined(*terms: tuple[float, Tensor]) -> Tensor:
    """Σ w x over pairs (w, x), where one tensor may come up several times and is read once."""
    merged: dict[int, tuple[float, Tensor]] = {}
    for weight, tensor in terms:
        before = merged.get(id(tensor))
        merged[id(tensor)] = (weight if before is None else weight + before[0], tensor)
    return weighted_sum(*merged.values())


def along_rho(x: Tensor, here: Level, there: Level, *terms: tuple[float, Prediction | Tensor]) -> Tensor:
    """x_t = α_t (x_s/α_s + Σ w ε): a step of the flow in ρ.

    Args:
        x: The states at ``here``, where α > 0.
        here: s.
        there: t; σ = 0 is allowed.
        terms: Pairs of w, which sum to ρ_t − ρ_s, and a prediction or its noise.
    """
    if here.alpha == 0:
        raise _starts_at_pure_noise(here)
    pairs: list[tuple[float, Tensor]] = [(there.alpha / here.alpha, x)]
    for weight, term in terms:
        if isinstance(term, torch.Tensor):
            pairs.append((there.alpha * weight, term))
        else:
            pairs += terms_of(term, "noise", there.alpha * weight)
    return combined(*pairs)


def _starts_at_pure_noise(level: Level) -> ConfigurationError:
    return ConfigurationError(
        "this sampler cannot start where nothing of the data is left",
        found=f"a first time of {level.t:.6g}, where α = {level.alpha:.3g}",
        allowed="times with α > 0",
        remedy="Start a little later: lower time_grid.start or the first of time_grid.times.",
    )
