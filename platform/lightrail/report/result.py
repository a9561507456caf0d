"""What stands at the end of a run in the terminal: the final metrics, and where everything is."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lightrail.report.privacy import spending
from lightrail.report.wording import by_base, monitored, number, size

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

__all__ = ["ResultTable", "result_table"]

STATUS_STYLES = {
    "finished": "bold green",
    "stopped early": "bold green",
    "stopped": "bold yellow",
    "failed": "bold red",
}


@dataclass(frozen=True)
class ResultTable:
    """The end of a run; plain text as a string, and coloured where a rich console prints it.

    Args:
        summary: The contents of ``summary.json``.
        folder: The run folder.
    """

    summary: Mapping[str, Any]
    folder: Path

    @property
    def cells(self) -> list[list[str]]:
        """The table: a heading, then a row for each thing measured, with a column for each stage that has a value."""
        rows = by_base(self.summary)
        given = {stage for values in rows.values() for stage in values}
        stages = [stage for stage in ("train", "val", "test", "guided", "unguided", "") if stage in given]
        table = [[base, *(number(row[s]) if s in row else "" for s in stages)] for base, row in rows.items()]
        return [["", *stages], *table] if table else []

    @property
    def facts(self) -> str:
        """How the run ended and how large it was, in one line."""
        status = [str(self.summary["status"])] if self.summary.get("status") else []
        return " · ".join(status + size(self.summary))

    @property
    def privacy(self) -> str:
        """What was spent of the privacy of the data, in one line; empty where none was asked for."""
        if "privacy" not in self.summary:
            return ""
        values = self.summary["privacy"] or {}
        # The file knows the accountant too, and on what the guarantee rests.
        with contextlib.suppress(OSError, ValueError, TypeError):
            values = {**values, **json.loads((self.folder / "privacy.json").read_text(encoding="utf-8"))}
        return f"privacy  {spending(values)}" if values else "privacy  not known: the run ended before it was planned"

    @property
    def paths(self) -> list[str]:
        """The run folder and, if there is one, its report."""
        folder = self.folder.resolve()
        report = folder / "report.html"
        return [str(folder), *([str(report)] if report.exists() else [])]

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.cells, strict=True)]
        lines = []
        for name, *values in self.cells:
            texts = (value.rjust(width) for value, width in zip(values, widths[1:], strict=True))
            lines.append("   ".join([name.ljust(widths[0]), *texts]).rstrip())
        notes = [str(note) for note in self.summary.get("notes") or ()]
        blocks = ["\n".join(block) for block in (lines, [self.privacy], [self.facts], notes, self.paths) if any(block)]
        return "\n\n".join(blocks)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        if self.cells:
            yield self._table()
            yield Text()
        if self.privacy:
            yield Text(self.privacy, style="bold red" if "NOT private" in self.privacy else "bold")
            yield Text()
        status = str(self.summary.get("status", ""))
        line = Text(self.facts, style="dim")
        line.stylize(f"not dim {STATUS_STYLES.get(status, 'bold')}", 0, len(status))
        yield line
        for note in self.summary.get("notes") or ():
            yield Text(str(note), style="yellow")
        yield Text()
        for path in self.paths:
            yield Text(path, style=f"cyan link {Path(path).as_uri()}", no_wrap=True, overflow="ignore")

    def _table(self) -> RenderableType:
        from rich.table import Table

        heading, *rows = self.cells
        table = Table(box=None, header_style="dim", padding=(0, 3, 0, 0))
        table.add_column(no_wrap=True)
        for stage in heading[1:]:
            table.add_column(stage, justify="right", no_wrap=True)
        chosen = monitored(self.summary)
        for row in rows:
            table.add_row(*row, style="bold" if row[0] == chosen else None)
        return table

    def print(self, file: IO[str] | None = None) -> None:
        """Prints it: in colour on a terminal, else as plain text of which nothing is cut or wrapped.

        Args:
            file: Where to; by default the standard output.
        """
        stream = sys.stdout if file is None else file
        if stream.isatty():
            from rich.console import Console

            # A path that is cut or broken into lines could not be clicked.
            Console(file=stream).print(self, soft_wrap=True)
        else:
            stream.write(f"{self}\n")
            stream.flush()


def result_table(summary: Mapping[str, Any], folder: str | Path) -> ResultTable:
    """The table that ends a run.

    Args:
        summary: The contents of ``summary.json``.
        folder: The run folder.

    Returns:
        What ``print`` shows as plain text and a rich console in colour; its own method ``print`` chooses.

    Example:
        >>> summary = {"status": "finished", "steps": 1080, "metrics": {"val_loss": 0.25, "test_loss": 0.5}}
        >>> print(str(result_table(summary, "/")).splitlines()[1])
        loss   0.2500   0.5000
    """
    return ResultTable(summary, Path(folder))
