"""The claims as a picture: one dot a seed, one row a method, one panel a problem."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from lightrail.files import replacing

if TYPE_CHECKING:
    from lightrail.bench.claims.document import Document

__all__ = ["draw"]

_COLOURS = {"reproduces": "#1b7837", "does not reproduce": "#b2182b"}
_GREY = "#777777"


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
    height = 0.22 * max(map(len, shown.values())) + 1.2
    figure, panels = plt.subplots(
        1, len(shown), figsize=(5.2 * len(shown), height), squeeze=False, layout="constrained"
    )
    for panel, (problem, rows) in zip(panels[0], shown.items(), strict=True):
        panel.axvline(0, color="#bbbbbb", linewidth=1)
        for place, row in enumerate(rows):
            assert row.found is not None
            colour = _COLOURS.get(row.verdict, _GREY)
            relative = [100 * value / abs(row.found.baseline) for value in row.found.differences]
            finite = [min(value, 100.0) for value in relative if math.isfinite(value)]
            panel.plot(finite, [place] * len(finite), "o", color=colour, markersize=4, alpha=0.75)
            if len(finite) < len(relative):
                panel.annotate("diverged", (1, place), xycoords=("axes fraction", "data"), ha="right", va="center",
                               fontsize=7, color=colour)  # fmt: skip
        panel.set_yticks(range(len(rows)), [row.measured.method for row in rows], fontsize=8)
        panel.set_ylim(-0.7, len(rows) - 0.3)
        panel.set_xscale("symlog", linthresh=10)
        panel.set_xticks([-10, -5, 0, 5, 10, 100], ["−10%", "−5%", "0", "+5%", "+10%", "≥ +100%"], fontsize=8)
        panel.set_xlim(left=min(-12, panel.get_xlim()[0]), right=115)
        panel.set_title(f"{problem}: final loss beside the baseline", fontsize=9)
        panel.grid(axis="x", color="#eeeeee")
        panel.set_axisbelow(True)
        for side in ("top", "right", "left"):
            panel.spines[side].set_visible(False)
        panel.tick_params(axis="y", length=0)
    figure.supxlabel("green: the claim reproduces   red: it does not   grey: cannot be seen at this size", fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(
            temporary, format=path.suffix.lstrip("."), metadata={"Date": None} if path.suffix == ".svg" else {}
        )
    plt.close(figure)
