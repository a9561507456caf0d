"""The claims as a picture: one dot a seed, one row a method, one panel a problem."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import NullLocator

from lightrail.files import replacing

if TYPE_CHECKING:
    from lightrail.bench.claims.document import Document, Row

__all__ = ["draw"]

_COLOURS = {"reproduces": "#1b7837", "does not reproduce": "#b2182b"}
_GREY = "#777777"
_MANY = 12  # rows that fill a column of their own
_HEAD = 2.5  # rows that a title and an axis take


def draw(document: Document, path: Path) -> None:
    """Draws how far each method ends from its baseline, relative to it.

    Args:
        document: What was measured.
        path: The picture, by its suffix SVG or PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # Rows stay where they are from one run to the next, so that a change of the picture is a change of a figure.
    matplotlib.rcParams["svg.hashsalt"] = "lightrail"
    shown = {
        problem: [row for row in reversed(rows) if row.found is not None and row.claim.sentence]
        for problem, rows in document.rows.items()
    }
    shown = {problem: rows for problem, rows in shown.items() if rows}
    if not shown:
        return
    columns = _columns({problem: len(rows) for problem, rows in shown.items()})
    height = 0.2 * max(sum(rows + _HEAD for rows in column.values()) for column in columns) + 0.6
    figure = plt.figure(figsize=(4.6 * len(columns), height), layout="constrained")
    grid = figure.add_gridspec(1, len(columns))
    for place, column in enumerate(columns):
        heights = [rows + _HEAD for rows in column.values()]
        parts = grid[place].subgridspec(len(column), 1, height_ratios=heights)
        for part, problem in enumerate(column):
            _panel(figure.add_subplot(parts[part]), problem, shown[problem])
    figure.suptitle("outcome beside the baseline, one dot a seed; left is better", fontsize=9, x=0.01, ha="left")
    figure.supxlabel("green: the claim reproduces   red: it does not   grey: cannot be seen at this size", fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(
            temporary, format=path.suffix.lstrip("."), metadata={"Date": None} if path.suffix == ".svg" else {}
        )
    plt.close(figure)


def _columns(rows: Mapping[str, int]) -> list[dict[str, int]]:
    """Problems with many methods have a column each; the others share one."""
    large = [{problem: count} for problem, count in rows.items() if count > _MANY]
    small = {problem: count for problem, count in rows.items() if count <= _MANY}
    return [*large, small] if small else large


def _panel(panel: Any, problem: str, rows: Sequence[Row]) -> None:
    panel.axvline(0, color="#bbbbbb", linewidth=1)
    for place, row in enumerate(rows):
        assert row.found is not None
        colour = _COLOURS.get(row.verdict, _GREY)
        relative = [100 * value / abs(row.found.baseline) for value in row.found.differences]
        finite = [max(-100.0, min(value, 100.0)) for value in relative if math.isfinite(value)]
        panel.plot(finite, [place] * len(finite), "o", color=colour, markersize=4, alpha=0.75, clip_on=False)
        if len(finite) < len(relative):
            where = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "center"}
            panel.annotate("diverged", (1, place), fontsize=7, color=colour, **where)
    panel.set_yticks(range(len(rows)), [row.measured.method for row in rows], fontsize=8)
    panel.set_ylim(-0.7, len(rows) - 0.3)
    panel.set_xscale("symlog", linthresh=10)
    panel.set_xlim(-110, 115)
    panel.set_xticks([-100, -10, 0, 10, 100], ["−100%", "−10%", "0", "+10%", "≥ +100%"], fontsize=7)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_title(problem, fontsize=9, loc="left")
    panel.grid(axis="x", color="#eeeeee")
    panel.set_axisbelow(True)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    panel.tick_params(axis="y", length=0)
