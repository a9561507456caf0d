"""Which keys of a sweep mattered: how much of the difference between its trials each of them explains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightrail.sweep.results import Row

__all__ = ["Axis", "Importance", "axes_of", "importance_of"]

FOREST_FROM = 30  # trials: with fewer, a forest says more about itself than about them
_FEW = 5  # different numbers that are compared one by one; more are put into groups of like size
_BINS = 3
_REPEATS = 10


@dataclass(frozen=True)
class Axis:
    """A key that varies, as numbers.

    Args:
        key: The key.
        labels: The values of a choice, in order; empty for numbers.
        positions: Of each trial: the number, its logarithm to base 10, or the place of its value among the labels.
        is_log: Whether the positions are logarithms.
    """

    key: str
    labels: tuple[str, ...]
    positions: np.ndarray
    is_log: bool = False


@dataclass(frozen=True)
class Importance:
    """How much each key mattered, the most important first.

    Args:
        keys: The keys.
        shares: What each explains of the variance among trials, from 0.
        deviations: The standard deviation of each over repetitions; 0 where nothing was drawn.
        how: In words, how it was found.
    """

    keys: tuple[str, ...]
    shares: tuple[float, ...]
    deviations: tuple[float, ...]
    how: str


def axes_of(rows: Sequence[Row], spread: Mapping[str, bool] | None = None) -> list[Axis]:
    """The keys that vary among trials, as numbers.

    Args:
        rows: Trials, each of which gives a value to each key.
        spread: Whether a key's logarithm is what was spread evenly; where nothing is said of it, its range tells.

    Example:
        >>> from lightrail.launch.job import JobState
        >>> from lightrail.sweep.ledger import Trial
        >>> rows = [Row(Trial(i, {"lr": lr}, None), JobState("finished")) for i, lr in enumerate(("1e-4", "0.1"))]
        >>> axes_of(rows)[0].is_log, axes_of(rows)[0].positions.tolist()
        (True, [-4.0, -1.0])
    """
    keys = dict.fromkeys(key for row in rows for key in row.values)
    said = spread or {}
    found = [_axis(key, [row.values.get(key, "-") for row in rows], said.get(key)) for key in keys]
    return [axis for axis in found if len(set(axis.positions.tolist())) > 1]


def _axis(key: str, values: Sequence[str], said: bool | None) -> Axis:
    numbers = [_number(value) for value in values]
    if all(math.isfinite(each) for each in numbers):
        positions = np.array(numbers)
        is_wide = bool(positions.min() > 0 and positions.max() >= 20 * positions.min())
        is_log = is_wide if said is None else said
        return Axis(key, (), np.log10(positions) if is_log else positions, is_log)
    labels = tuple(dict.fromkeys(values))
    return Axis(key, labels, np.array([labels.index(value) for value in values], dtype=float))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def importance_of(rows: Sequence[Row]) -> Importance | None:
    """How much each key mattered beside the others; ``None`` where there is nothing to compare.

    Few trials are compared by the variance between those that share a value, less what chance would give; many by how
    much worse a random forest foretells them once the values of one key are shuffled.

    Args:
        rows: Trials that have a value.
    """
    values = np.array([row.value for row in rows], dtype=float)
    axes = axes_of(rows)
    if len(rows) < 3 or len(axes) < 2 or float(values.std()) == 0.0:
        return None
    return _by_forest(axes, values) if len(rows) >= FOREST_FROM else _by_variance(axes, values)


def _by_variance(axes: Sequence[Axis], values: np.ndarray) -> Importance:
    shares = [explained_variance(_groups(axis), values) for axis in axes]
    how = (
        f"share of the variance among {len(values)} trials that each key explains by itself, less what chance would "
        "explain"
    )
    return _sorted(axes, shares, [0.0] * len(axes), how)


def explained_variance(groups: np.ndarray, values: np.ndarray) -> float:
    """The share of the variance of values that lies between groups, less what chance would put there; at least 0.

    Args:
        groups: The group of each value.
        values: What is compared.

    Example:
        >>> round(explained_variance(np.array([0, 0, 1, 1]), np.array([1.0, 2.0, 5.0, 6.0])), 3)  # 1 - 1/17 * 3/2
        0.912
    """
    each = [values[groups == group] for group in np.unique(groups)]
    freedom = len(values) - len(each)
    if freedom == 0:
        return 0.0
    within = sum(float(((part - part.mean()) ** 2).sum()) for part in each)
    total = float(((values - values.mean()) ** 2).sum())
    return max(0.0, 1 - within / total * (len(values) - 1) / freedom)


def _groups(axis: Axis) -> np.ndarray:
    if axis.labels or len(np.unique(axis.positions)) <= _FEW:
        return axis.positions
    edges = np.quantile(axis.positions, np.linspace(0, 1, _BINS + 1)[1:-1])
    return np.searchsorted(edges, axis.positions)


def _by_forest(axes: Sequence[Axis], values: np.ndarray) -> Importance:
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    inputs = np.stack([_ordered(axis, values) for axis in axes], axis=1)
    forest = RandomForestRegressor(100, min_samples_leaf=2, oob_score=True, random_state=0).fit(inputs, values)
    found: Any = permutation_importance(forest, inputs, values, n_repeats=_REPEATS, random_state=0)
    seen = max(0.0, float(forest.oob_score_))
    how = (
        "share of the variance that hangs on each key, with what it does together with others: half of the R² that a "
        f"random forest of {len(values)} trials loses when the key is shuffled, mean ± sd of {_REPEATS}; the forest "
        f"explains {seen:.0%} of the variance of trials that it has not seen"
    )
    # A key that adds f to the result differs by f - f' once shuffled, and that varies twice as much as f.
    means = np.maximum(found.importances_mean, 0.0) / 2
    return _sorted(axes, means.tolist(), (found.importances_std / 2).tolist(), how)


def _ordered(axis: Axis, values: np.ndarray) -> np.ndarray:
    """Choices in the order of their mean value, in which a tree parts them best."""
    if not axis.labels:
        return axis.positions
    means = [float(values[axis.positions == place].mean()) for place in range(len(axis.labels))]
    return np.argsort(np.argsort(means))[axis.positions.astype(int)].astype(float)


def _sorted(axes: Sequence[Axis], shares: Sequence[float], deviations: Sequence[float], how: str) -> Importance:
    order = sorted(range(len(axes)), key=lambda i: -shares[i])
    return Importance(
        tuple(axes[i].key for i in order), tuple(shares[i] for i in order), tuple(deviations[i] for i in order), how
    )
