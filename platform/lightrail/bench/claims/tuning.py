"""The search for a learning rate: every method gets the same number of trials."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["search"]


def search(evaluate: Callable[[float], float], start: float, trials: int) -> tuple[float, dict[float, float]]:
    """Descends in the logarithm of the rate: by decades while that helps, then by halves around the best.

    Args:
        evaluate: What a rate gives; lower is better, infinite where it diverges.
        start: The first rate, > 0: a method's own default.
        trials: How many rates are tried, >= 1.

    Returns:
        The best rate, and what each rate gave.

    Example:
        >>> best, tried = search(lambda lr: abs(math.log10(lr) + 2), start=1e-4, trials=5)
        >>> round(best, 6), len(tried)
        (0.01, 5)
    """
    found: dict[float, float] = {}

    def value(place: float) -> float:
        if place not in found:
            found[place] = evaluate(_rate(start, place))
        return found[place]

    best, stride, direction = 0.0, 1.0, 1.0
    value(best)
    while len(found) < trials:
        if math.isinf(found[best]):  # everything has diverged so far, and smaller rates are safer
            best, direction = min(found) - stride, -1.0
            value(best)
            continue
        places = [best + direction * stride, best - direction * stride]
        new = next((place for place in places if place not in found), None)
        if new is None:
            stride /= 2
            continue
        if value(new) < found[best]:
            direction = 1.0 if new > best else -1.0
            best = new
    return _rate(start, best), {_rate(start, place): merit for place, merit in found.items()}


def _rate(start: float, place: float) -> float:
    return float(f"{start * 10**place:.4g}")
