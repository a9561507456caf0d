"""The curves of a run: which series share one axes, and how they are drawn."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lightrail.report.wording import monitored, number, stage_and_base, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Chart", "charts", "draw"]

COLOURS = {"train": "#3866d6", "val": "#e07a1f", "test": "#1f9d76", "": "#3866d6"}
MORE_COLOURS = ("#3866d6", "#e07a1f", "#1f9d76", "#a04fb8", "#c43d5a", "#6b7280", "#2a9bb5", "#97852a")
EPSILON = "epsilon"
EXACT = ("learning_rate", EPSILON)  # set by a formula: a mean over it would only blur it
INK, FAINT = "#374151", "#e5e7eb"
SMOOTH_FROM = 150  # points; shorter series are shown as they are
DRAWN_AT_MOST = 4000  # points a line: more than the picture has columns
_SHARED = re.compile(r"([^:]+/[^:]+):(.+)")
_LEARNING_RATE = re.compile(r"(?:lr|learning_rate)(?:[-_/.](.*))?")


@dataclass(frozen=True)
class Series:
    """One line: its label, its stage, its steps and values."""

    label: str
    stage: str
    steps: np.ndarray
    values: np.ndarray
    is_exact: bool = False

    @property
    def is_smoothed(self) -> bool:
        return len(self.steps) >= SMOOTH_FROM and not self.is_exact


@dataclass(frozen=True)
class Chart:
    """The series that share one axes.

    Args:
        base: What is measured.
        series: The lines.
        best: The ``(step, value)`` that a monitor held to be best, and its stage.
        limit: A value that the curve is to stay below.
    """

    base: str
    series: Sequence[Series]
    best: tuple[str, int, float] | None = None
    limit: float | None = None

    @property
    def title(self) -> str:
        return title(self.base)

    @property
    def remark(self) -> str:
        """One line for under the picture."""
        parts = []
        if self.best is not None:
            stage, step, value = self.best
            parts.append(f"best {stage} {number(value)} at step {step:,}")
        if any(line.is_smoothed for line in self.series):
            parts.append("bold: running mean")
        if self.limit is not None:
            parts.append(f"dashed: the target {self.limit:g}")
        return " · ".join(parts)

    @property
    def alt(self) -> str:
        """The picture in words."""
        lines = []
        for line in self.series:
            first, last = number(float(line.values[0])), number(float(line.values[-1]))
            lines.append(f"{line.label or self.title}: from {first} at step {line.steps[0]:,} to {last} at step "
                         f"{line.steps[-1]:,}")  # fmt: skip
        return f"Curves of {self.title} over steps. " + "; ".join(lines)


def charts(metrics: Mapping[str, Sequence[tuple[int, float]]], summary: Mapping[str, Any]) -> list[Chart]:
    """Groups the curves: one chart for each thing measured, with its stages as lines; learning rates share one.

    The monitored metric comes first, then the loss, then the others in order of appearance, the learning rate after
    them and what transforms and other plugins say of themselves (names with a slash) last. Of these,
    ``plugin/chart:series`` names a line of a chart that several share.

    Example:
        >>> points = [(1, 2.0), (2, 1.0)]
        >>> [chart.base for chart in charts({"lr": points, "train_loss": points, "val_loss": points}, {})]
        ['loss', 'learning_rate']
    """
    groups: dict[str, list[Series]] = {}
    account = summary.get("privacy") or {}
    for name, points in metrics.items():
        stage, base = stage_and_base(name)
        label = stage or base
        if match := _LEARNING_RATE.fullmatch(base):
            base, label = "learning_rate", match[1] or ""
        elif fork := re.fullmatch(r"(.+)_(step|epoch)", base):  # what Lightning makes of on_step with on_epoch
            base, label = fork[1], f"{label} ({fork[2]})"
        elif line := _SHARED.fullmatch(base):
            base, label = line[1], line[2].replace("_", " ")
        kept = [(step, value) for step, value in points if math.isfinite(value)]
        if name == EPSILON:
            kept = _to_the_end(kept, account.get("epsilon"), summary.get("steps"))
        if kept:
            steps, values = np.array([p[0] for p in kept]), np.array([p[1] for p in kept], dtype=float)
            groups.setdefault(base, []).append(Series(label, stage, steps, values, base in EXACT))
    # A test is one point at the end: its place is among the final metrics.
    drawn = {base: [s for s in lines if s.stage != "test" or len(s.steps) > 1] for base, lines in groups.items()}
    shown = {base: lines for base, lines in drawn.items() if any(len(line.steps) > 1 for line in lines)}
    limits = {EPSILON: account.get("target_epsilon")}
    return [
        Chart(base, shown[base], _best(base, shown[base], summary), limits.get(base))
        for base in _in_order(shown, summary)
    ]


def _to_the_end(points: list[tuple[int, float]], spent: object, steps: object) -> list[tuple[int, float]]:
    """A curve of what was spent, with what it came to: it is told only now and then on the way."""
    if not points or not isinstance(spent, int | float) or not isinstance(steps, int):
        return points
    last = max(points[-1][0], steps - 1)
    return [*(point for point in points if point[0] < last), (last, float(spent))]


def _in_order(bases: Mapping[str, object], summary: Mapping[str, Any]) -> list[str]:
    first = (monitored(summary), "loss")

    def rank(base: str) -> int:
        if base in first:
            return first.index(base)
        return 4 if "/" in base else 3 if base in EXACT else 2

    return sorted(bases, key=rank)


def _best(base: str, lines: Sequence[Series], summary: Mapping[str, Any]) -> tuple[str, int, float] | None:
    monitor = summary.get("monitor")
    if not isinstance(monitor, Mapping) or monitored(summary) != base:
        return None
    stage = stage_and_base(str(monitor.get("name")))[0]
    for line in lines:
        if line.stage == stage:
            at = int(line.values.argmin() if monitor.get("mode") == "min" else line.values.argmax())
            return stage, int(line.steps[at]), float(line.values[at])
    return None


def draw(chart: Chart) -> Figure:
    """The chart as a picture."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(6.4, 3.5), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    is_staged = any(line.stage for line in chart.series)
    for index, line in enumerate(chart.series):
        colour = COLOURS[line.stage] if is_staged else MORE_COLOURS[index % len(MORE_COLOURS)]
        _draw_line(axes, line, colour)
        if chart.best is not None and line.stage == chart.best[0]:
            axes.plot(*chart.best[1:], "o", ms=8, mfc="none", mec=colour, mew=1.6, zorder=5)
    values = np.concatenate([line.values for line in chart.series])
    if chart.base not in EXACT and values.min() > 0 and values.max() > 200 * values.min():
        axes.set_yscale("log")
    if chart.base == EPSILON:
        axes.set_ylim(0, 1.08 * max(values.max(), chart.limit or 0.0))
    if chart.limit is not None:
        axes.axhline(chart.limit, color=INK, lw=1.2, ls=(0, (4, 3)))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_xlabel("step", color=INK, fontsize=10)
    axes.tick_params(colors=INK, labelsize=10, length=0, which="both")
    axes.grid(color=FAINT, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#9ca3af")
    if any(line.label for line in chart.series) and (len(chart.series) > 1 or is_staged):
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=4, frameon=False, fontsize=10,
                    labelcolor=INK, handlelength=1.4, columnspacing=1.4, borderaxespad=0.1)  # fmt: skip
    return figure


def _draw_line(axes: Axes, line: Series, colour: str) -> None:
    stride = math.ceil(len(line.steps) / DRAWN_AT_MOST)
    steps, values, label = line.steps[::stride], line.values[::stride], line.label or None
    if not line.is_smoothed:
        marker = "o" if len(steps) <= 40 else None
        axes.plot(steps, values, color=colour, lw=1.8, label=label, marker=marker, ms=3.5)
        return
    axes.plot(steps, values, color=colour, lw=0.8, alpha=0.28)
    axes.plot(steps, _running_mean(line.values)[::stride], color=colour, lw=1.8, label=label)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """The mean over a window of a fortieth of the series, centred, and shorter towards both ends."""
    window = max(3, len(values) // 40) | 1
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")
