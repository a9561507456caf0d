"""The errors of samplers over their evaluations, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightrail.bench.sampler_errors import Found
from lightrail.files import replacing

__all__ = ["draw"]

COLORS = {"lightrail": "#1b6ca8", "diffusers": "#b5541c"}
NAMED = 4


def draw(best: Sequence[Found], budgets: Sequence[int], path: Path) -> None:
    """Draws one panel for each library, with both lower bounds in each, on logarithmic axes.

    Args:
        best: The best of each method under each budget.
        budgets: Where the axis is marked.
        path: An ``.svg``, written whole or not at all.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    libraries = [name for name in COLORS if any(each.library == name for each in best)]
    figure = Figure(figsize=(5.4 * len(libraries), 4.4), layout="constrained")
    FigureCanvasSVG(figure)
    panels = figure.subplots(1, len(libraries), sharey=True, squeeze=False)[0]
    for axes, library in zip(panels, libraries, strict=True):
        _draw_methods(axes, [each for each in best if each.library == library], COLORS[library])
        for other in libraries:
            least = [min(each.error for each in best if (each.library, each.budget) == (other, n)) for n in budgets]
            axes.plot(budgets, least, color=COLORS[other], linewidth=2.4, label=f"best of {other}")
        axes.set(xscale="log", yscale="log", title=library, xlabel="evaluations of the network")
        axes.set_xticks(budgets, [str(each) for each in budgets])
        axes.set_xticks([], minor=True)
        axes.set_xlim(min(budgets) / 1.05, max(budgets) * 2.1)
        axes.legend(loc="lower left", frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("distance from the exact solution")
    # Without a date and with fixed names, so that the same figures give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "samplers"}), replacing(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def _draw_methods(axes: Any, best: Sequence[Found], color: str) -> None:
    ends = []
    for method in sorted({each.method for each in best}):
        found = sorted((each for each in best if each.method == method), key=lambda each: each.budget)
        axes.plot([each.budget for each in found], [each.error for each in found], color=color, alpha=0.35, linewidth=1)
        ends.append(found[-1])
    # Names stand beside the ends of the lowest lines, in turn above and below where they would meet.
    last = None
    for end in sorted(ends, key=lambda each: each.error)[:NAMED]:
        height = end.error if last is None else max(end.error, last * 1.5)
        axes.annotate(
            end.method.removesuffix("Scheduler"),
            (end.budget, end.error),
            xytext=(end.budget * 1.05, height),
            fontsize=7,
            va="center",
            color=color,
        )
        last = height
