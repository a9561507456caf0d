"""One look for all figures here; no global state of matplotlib is touched."""

from __future__ import annotations

from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

__all__ = ["ACCENT", "BLUES", "FAINT", "GREEN", "INK", "RED", "new_figure", "titled"]

INK, FAINT = "#374151", "#e5e7eb"
ACCENT, GREEN, RED = "#3866d6", "#1f9d76", "#c43d5a"
BLUES = LinearSegmentedColormap.from_list("lightrail", ["#ffffff", "#dbe5fb", "#7f9fe8", "#3866d6", "#1e3a8a"])

_RC: Any = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9ca3af",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",
}


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure outside pyplot, so that nothing keeps it alive and no display is asked for.

    Args:
        width: In inches.
        height: In inches.
        rows: Of axes.
        columns: Of axes.

    Returns:
        The figure, and its axes row by row.
    """
    with rc_context(_RC):
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def titled(axes: Axes, title: str) -> None:
    """Puts a title above the left edge."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
