"""The pictures of a sweep: every trial as a line across its keys, and how much each key mattered."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightrail.report.wording import number
from lightrail.sweep.importance import Axis, Importance, axes_of
from lightrail.sweep.method import Goal
from lightrail.sweep.results import Row, best_of, sorted_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["importance_picture", "parallel_picture"]

INK, SOFT, FAINT = "#1d2129", "#646b78", "#e4e4e0"
ACCENT, BEST = "#3866d6", "#e07a1f"
WORST_TO_BEST = ("#bac4d8", "#9db6ea", "#3866d6", "#17307a")
_SPREAD = 0.035  # of the height: lines through one choice part so far that each is seen
_TICKS = 5


def parallel_picture(
    rows: Sequence[Row], goal: Goal, names: Mapping[str, str], spread: Mapping[str, bool] | None = None
) -> Figure:
    """Every trial as one line across the keys that vary, up to the value that it reached.

    Args:
        rows: Trials that have a value.
        goal: What the sweep is after; better is up.
        names: What each key is called.
        spread: Whether a key's logarithm is what was spread evenly, where that is known.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import PathPatch

    # The worst first, so that the better ones lie above.
    rows = sorted_rows(rows, goal)[::-1]
    axes = axes_of(rows, spread)
    result = np.array([row.value for row in rows], dtype=float)
    heights = [_heights(axis, result, goal) for axis in axes]
    heights.append(_result_heights(result, goal))
    figure = Figure(figsize=(max(13.6, 1.75 * (len(axes) + 1)), 5.4), layout="constrained", facecolor="white")
    drawn = figure.add_subplot()
    colours = LinearSegmentedColormap.from_list("trials", WORST_TO_BEST)
    best = best_of(rows, goal)
    for index, row in enumerate(rows):
        is_best = row is best
        place = index / max(len(rows) - 1, 1)
        line = _curve([float(each[index]) for each in heights])
        drawn.add_patch(PathPatch(
            line, fc="none", ec=BEST if is_best else colours(place), lw=3.0 if is_best else 1.6,
            alpha=1.0 if is_best else 0.8 + 0.2 * place, zorder=4 if is_best else 2, capstyle="round",
        ))  # fmt: skip
    for place, axis in enumerate(axes):
        _draw_axis(drawn, place, _ticks(axis), names.get(axis.key, axis.key))
    arrow = "↑" if goal.mode == "max" else "↓"
    _draw_axis(drawn, len(axes), _result_ticks(result, goal), f"{goal.metric} {arrow}", is_result=True)
    if best is not None:
        drawn.plot([len(axes)], [heights[-1][-1]], "o", ms=8, color=BEST, mec="white", mew=1.5, zorder=6)
    drawn.set_xlim(-0.28, len(axes) + 0.42)
    drawn.set_ylim(-0.06, 1.06)
    drawn.set_axis_off()
    return figure


def _heights(axis: Axis, result: np.ndarray, goal: Goal) -> np.ndarray:
    low, high = float(axis.positions.min()), float(axis.positions.max())
    heights = (axis.positions - low) / (high - low)
    if axis.labels or len(np.unique(axis.positions)) <= _TICKS:
        # Through one value they lie side by side, the better ones above.
        for each in np.unique(heights):
            among = np.flatnonzero(heights == each)
            order = np.argsort(np.argsort(result[among] if goal.mode == "max" else -result[among]))
            heights[among] = each + _SPREAD * (2 * order / max(len(among) - 1, 1) - 1) * (len(among) > 1)
    return heights


def _result_heights(result: np.ndarray, goal: Goal) -> np.ndarray:
    span = float(result.max() - result.min())
    heights = (result - result.min()) / span if span else np.full(len(result), 0.5)
    return heights if goal.mode == "max" else 1 - heights


def _curve(heights: Sequence[float]) -> Any:
    """A smooth line through the axes, level where it crosses each."""
    from matplotlib.path import Path

    points, codes = [(0.0, heights[0])], [Path.MOVETO]
    for place, (left, right) in enumerate(itertools.pairwise(heights)):
        points += [(place + 0.42, left), (place + 0.58, right), (place + 1.0, right)]
        codes += [Path.CURVE4] * 3
    return Path(points, codes)


def _ticks(axis: Axis) -> list[tuple[float, str]]:
    low, high = float(axis.positions.min()), float(axis.positions.max())
    if axis.labels:
        return [((place - low) / (high - low), label) for place, label in enumerate(axis.labels)]
    values = np.unique(axis.positions)
    if len(values) > _TICKS:
        values = np.linspace(low, high, _TICKS)
    shown = [10**each if axis.is_log else each for each in values]
    return [
        (float((each - low) / (high - low)), _short(value, exact=len(np.unique(axis.positions)) <= _TICKS))
        for each, value in zip(values, shown, strict=True)
    ]


def _short(value: float, *, exact: bool) -> str:
    if float(value).is_integer() and abs(value) < 1e5:
        return f"{int(value)}"
    return number(float(f"{value:.4g}")).rstrip("0") if exact and abs(value) >= 1e-3 else f"{value:.2g}"


def _result_ticks(result: np.ndarray, goal: Goal) -> list[tuple[float, str]]:
    low, high = float(result.min()), float(result.max())
    if low == high:
        return [(0.5, number(low))]
    shares = np.linspace(0, 1, _TICKS)
    values = [low + share * (high - low) for share in (shares if goal.mode == "max" else 1 - shares)]
    return [(float(share), number(value)) for share, value in zip(shares, values, strict=True)]


def _draw_axis(
    drawn: Axes, place: int, ticks: Sequence[tuple[float, str]], name: str, *, is_result: bool = False
) -> None:
    drawn.plot([place, place], [0, 1], color=INK if is_result else SOFT, lw=1.6 if is_result else 1.0, zorder=3)
    side = 0.045 if is_result else -0.045
    for height, label in ticks:
        drawn.plot([place, place + side / 2.5], [height, height], color=SOFT, lw=1.0, zorder=3)
        drawn.text(
            place + side, height, label if len(label) <= 22 else f"{label[:21]}…", fontsize=9.5, color=INK, zorder=5,
            ha="left" if is_result else "right", va="center",
            bbox={"fc": "white", "ec": "none", "alpha": 0.82, "pad": 1.2, "boxstyle": "round,pad=0.15"},
        )  # fmt: skip
    drawn.text(place, 1.085, name, fontsize=10.5, color=INK, ha="center", va="bottom", weight="bold")


def importance_picture(importance: Importance, names: Mapping[str, str]) -> Figure:
    """How much each key mattered, as bars.

    Args:
        importance: The keys and their shares.
        names: What each key is called.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    count = len(importance.keys)
    figure = Figure(figsize=(13.6, 1.1 + 0.46 * count), layout="constrained", facecolor="white")
    drawn = figure.add_subplot()
    places = np.arange(count)[::-1]
    widths = np.array(importance.shares)
    spread = np.array(importance.deviations)
    drawn.barh(places, widths, height=0.58, color=[ACCENT if i == 0 else "#9db6ea" for i in range(count)], zorder=2)
    if spread.any():
        drawn.errorbar(widths, places, xerr=spread, fmt="none", ecolor=INK, elinewidth=1.1, capsize=2.5, zorder=3)
    reach = max(float((widths + spread).max()), 0.05)
    for place, width, deviation in zip(places, widths, spread, strict=True):
        drawn.text(width + deviation + 0.012 * reach, place, f"{width:.0%}", va="center", fontsize=10, color=INK)
    drawn.set_yticks(places, [names.get(key, key) for key in importance.keys], fontsize=10.5, color=INK)
    drawn.set_xlim(0, 1.1 * reach)
    drawn.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    drawn.tick_params(axis="x", colors=SOFT, labelsize=9.5, length=0)
    drawn.tick_params(axis="y", length=0)
    drawn.grid(axis="x", color=FAINT, lw=0.8)
    drawn.set_axisbelow(True)
    drawn.spines[["top", "right", "bottom"]].set_visible(False)
    drawn.spines["left"].set_color("#9ca3af")
    return figure
