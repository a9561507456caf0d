"""Figures as HTML: PNG pictures inside the page itself."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

from lightrail.report.curves import charts, draw
from lightrail.report.record import RunRecord
from lightrail.report.wording import title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["curve_pictures", "figure_pictures"]

DOTS_PER_INCH = 150  # sharp on dense screens: a page shows them at about half of that
CHARTS_AT_MOST = 40


def curve_pictures(record: RunRecord) -> str:
    """The curves of a run, one picture for each thing measured."""
    every = charts(record.metrics, record.summary)
    if not every:
        why = record.missing.get("metrics.csv", "No metric was logged at more than one step.")
        return f'<p class="absent">{escape(why)}</p>'
    pictures = [_picture(draw(c), name=c.title, remark=c.remark, alt=c.alt) for c in every[:CHARTS_AT_MOST]]
    rest = ", ".join(chart.base for chart in every[CHARTS_AT_MOST:])
    more = f'<p class="absent">Not drawn, but in metrics.csv: {escape(rest)}.</p>' if rest else ""
    return f'<div class="pictures curves">{"".join(pictures)}</div>{more}'


def figure_pictures(figures: Mapping[str, Figure]) -> str:
    """A task's own figures; one that cannot be drawn says so in its place."""
    pictures = []
    for name, figure in figures.items():
        try:
            pictures.append(_picture(figure, name=title(name), alt=_alt(title(name), figure)))
        except Exception as error:  # a task's figure must not cost the user the report
            why = f"{title(name)} could not be drawn: {type(error).__name__}: {error}"
            pictures.append(f'<p class="absent">{escape(why)}</p>')
    return f'<div class="pictures">{"".join(pictures)}</div>' if pictures else ""


def _alt(name: str, figure: Figure) -> str:
    titles = [figure.get_suptitle(), *(axes.get_title() for axes in figure.axes[:12])]
    labels = [text for text in titles if text]
    return f"{name}. {'; '.join(labels)}" if labels else name


def _picture(figure: Figure, *, name: str, alt: str, remark: str = "") -> str:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Text that a model wrote may hold any character; one that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        # Without the metadata the same run gives the same bytes whatever version drew it.
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, facecolor="white", metadata={"Software": None})
    width, height = (round(inches * DOTS_PER_INCH / 2) for inches in figure.get_size_inches())
    kind = ' class="wide"' if width > 1.4 * 6.4 * DOTS_PER_INCH / 2 else ""
    small = f"<small>{escape(remark)}</small>" if remark else ""
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return (
        f"<figure{kind}><figcaption>{escape(name)}{small}</figcaption>"
        f'<img alt="{escape(alt)}" width="{width}" height="{height}" src="data:image/png;base64,{data}"></figure>\n'
    )
