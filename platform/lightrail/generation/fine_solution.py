"""The solution that searches compare with: the same flow, in many small steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lightrail.generation.noise_path import Level, NoisePath
from lightrail.generation.prediction import Prediction
from lightrail.generation.sampler import Predict, weighted_sum

__all__ = ["fine_levels", "fine_solution"]


def fine_levels(path: NoisePath, levels: Sequence[Level], evaluations: int) -> list[list[Level]]:
    """Each interval of a grid in small parts, equal in λ; from α = 0 they are equal in time.

    On the way to σ = 0 they reach down to the smallest time at which the network is asked, then jump.

    Args:
        path: The noise path.
        levels: Falling, at least two.
        evaluations: About how many parts in all, shared by length in λ.

    Returns:
        One list an interval, from its own first level to its last.
    """
    smallest = path.level(path.t_min)
    ends = [min(there, max(smallest, here, key=_lam), key=_lam) for here, there in pairwise(levels)]
    lengths = [end.lam - here.lam for end, here in zip(ends, levels, strict=False)]
    share = evaluations / len(lengths)
    finite = sum(length for length in lengths if math.isfinite(length))
    left = evaluations - share * sum(math.isinf(length) for length in lengths)
    parts: list[list[Level]] = []
    for length, end, (here, there) in zip(lengths, ends, pairwise(levels), strict=True):
        count = max(1, round(share if math.isinf(length) else left * length / finite)) if length > 0 else 1
        if math.isinf(length):
            inner = [path.level(here.t + (end.t - here.t) * i / count) for i in range(1, count)]
        else:
            inner = [path.level_at_lam(here.lam + length * i / count) for i in range(1, count)]
        jump = [end] if there is not end and length > 0 else []
        parts.append([here, *inner, *jump, there])
    return parts


def _lam(level: Level) -> float:
    return level.lam


def fine_solution(
    predict: Predict, x: Tensor, path: NoisePath, levels: Sequence[Level], evaluations: int = 200, *, flow: bool = False
) -> Tensor:
    """The states at each level of a grid, by a two-step method of order 2 with many steps between.

    Args:
        predict: Asks the network.
        x: States ``[B, …]`` at ``levels[0]``.
        path: The noise path.
        levels: Falling, at least two.
        evaluations: About how often the network is asked.
        flow: Whether the flow is followed in time, for a model that tells no data; else the data in λ.

    Returns:
        ``[len(levels), B, …]``.
    """
    step = _flow_step if flow else _data_step
    states = [x]
    before: Prediction | None = None
    for part in fine_levels(path, levels, evaluations):
        for here, there in pairwise(part):
            now = predict(x, here)
            x = step(x, now, before, there)
            before = now
        states.append(x)
    return torch.stack(states)


def _data_step(x: Tensor, now: Prediction, before: Prediction | None, there: Level) -> Tensor:
    # x_t = (σ_t/σ_s) x + α_t (1 − e^{−h}) (D_0 + (D_0 − D_{−1}) h/(2 h_{−1})), which is D_0 at σ_t = 0
    here = now.level
    ratio = there.sigma / here.sigma
    gain = there.alpha - ratio * here.alpha
    slope = 0.0
    if before is not None and math.isfinite(before.level.lam) and math.isfinite(there.lam):
        slope = (there.lam - here.lam) / (here.lam - before.level.lam) / 2
    terms = [(ratio, x), (gain * (1 + slope), now.data)]
    if before is not None:
        terms.append((-gain * slope, before.data))
    return weighted_sum(*terms)


def _flow_step(x: Tensor, now: Prediction, before: Prediction | None, there: Level) -> Tensor:
    length = there.t - now.level.t
    if before is None:
        return weighted_sum((1.0, x), (length, now.flow))
    slope = length / (now.level.t - before.level.t) / 2
    return weighted_sum((1.0, x), (length * (1 + slope), now.flow), (-length * slope, before.flow))
