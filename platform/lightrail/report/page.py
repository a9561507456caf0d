"""``report.html``: one file that opens offline, with everything that a run has to show."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from lightrail.files import replace_file
from lightrail.report import federated, privacy, sections
from lightrail.report.pictures import curve_pictures, figure_pictures
from lightrail.report.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_report"]

# A browser then fetches nothing and runs nothing, whatever a name or a configuration holds.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
LINKED = (
    "metrics.csv", "summary.json", "config.yaml", "lock.json", "privacy.json", "federated.json", "samples.png",
    "texts.txt",
)  # fmt: skip


def write_report(folder: str | Path, *, figures: Mapping[str, Figure] | None = None) -> Path:
    """Writes ``report.html`` into a run folder, from what stands there.

    It reads ``metrics.csv``, ``config.yaml``, ``lock.json``, ``summary.json``, ``privacy.json`` and ``federated.json``;
    what is missing is said in its place. Pictures are inside the page, which needs no other file and no network.

    Args:
        folder: The run folder.
        figures: A task's own figures by name, such as a confusion matrix.

    Returns:
        The path of the page.

    Raises:
        RunFolderError: The page cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as run:
        ...     _ = Path(run, "metrics.csv").write_text("step,train_loss\\n1,2.0\\n2,1.0\\n")
        ...     write_report(run).name
        'report.html'
    """
    record = RunRecord.read(Path(folder))
    path = record.folder / "report.html"
    replace_file(path, _page(record, figures or {}).encode())
    return path


def _page(record: RunRecord, figures: Mapping[str, Figure]) -> str:
    style = files("lightrail.report").joinpath("style.css").read_text(encoding="utf-8")
    parts = [
        sections.heading(record),
        privacy.banner(record),
        sections.notes(record),
        sections.cards(record),
        _section("Privacy", privacy.account(record)),
        _section("Rounds", federated.account(record)),
        _section("Curves", "" if record.is_generation else curve_pictures(record)),
        _section("Samples" if record.is_generation else "Figures", figure_pictures(figures)),
        _section("Texts", sections.texts(record)),
        _section("Composition", sections.composition(record)),
        _section("The run", sections.facts(record)),
        _section("Configuration", sections.configuration(record)),
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(record.name)} – lightrail</title>
<style>
{style}</style>
</head>
<body>
<main>
{"".join(parts)}</main>
{_footer(record)}
</body>
</html>
"""


def _section(name: str, content: str) -> str:
    return f"<section><h2>{name}</h2>\n{content}</section>\n" if content else ""


def _footer(record: RunRecord) -> str:
    links = "".join(f'<a href="{name}">{name}</a>' for name in LINKED if (record.folder / name).exists())
    return f"<footer>{links}</footer>" if links else ""
