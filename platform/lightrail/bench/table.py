"""A table of measurements."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from lightrail.errors import PluginError

__all__ = ["Row", "Table", "Tables", "measured_apart"]


@dataclass(frozen=True)
class Row:
    """One thing that was measured.

    Args:
        name: What was measured.
        samples: Each round's value, in the table's unit.
        peer: The row that it is compared with; ratios are taken round by round.
        bound: The greatest ratio (or, without a peer, value) that was aimed at.
        beside: The peer's samples of the same rounds, where it is not a row or was measured again for this one.
    """

    name: str
    samples: tuple[float, ...]
    peer: str | None = None
    bound: float | None = None
    beside: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        return median(self.samples)


@dataclass
class Table:
    """Rows, with how they were made.

    Args:
        title: What the table shows.
        unit: Of the samples.
        note: How it was measured.
    """

    title: str
    unit: str
    note: str
    rows: list[Row] = field(default_factory=list)

    def add(
        self,
        name: str,
        samples: Sequence[float],
        peer: str | None = None,
        bound: float | None = None,
        beside: Sequence[float] = (),
    ) -> None:
        """Adds a row."""
        self.rows.append(Row(name, tuple(samples), peer, bound, tuple(beside)))

    def ratio(self, row: Row) -> float | None:
        """The median over rounds of the row's value over its peer's in the same round."""
        peer = next((other for other in self.rows if other.name == row.peer), None)
        if not row.beside and peer is None:
            return None
        beside = row.beside or peer.samples  # type: ignore[union-attr]
        return median(mine / theirs for mine, theirs in zip(row.samples, beside, strict=True))

    def text(self) -> str:
        """The table for a terminal."""
        width = max(len(row.name) for row in self.rows)
        lines = [self.title, ""]
        for row in self.rows:
            ratio = self.ratio(row)
            spread = f"{min(row.samples):.4g} to {max(row.samples):.4g}"
            line = f"{row.name:<{width}}  {row.median:9.4g} {self.unit}  ({spread})"
            if ratio is not None:
                line += f"  {ratio:5.{2 if ratio >= 0.1 else 3}f} x {row.peer}"
            if row.bound is not None:
                value = row.median if ratio is None else ratio
                line += f"  [{'within' if value <= row.bound else 'OVER'} {row.bound}]"
            lines.append(line)
        return "\n".join([*lines, "", self.note])

    def to_dict(self) -> dict[str, object]:
        """The table as plain values."""
        return {
            "title": self.title,
            "unit": self.unit,
            "note": self.note,
            "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "rows": [{**asdict(row), "median": row.median, "ratio": self.ratio(row)} for row in self.rows],
        }


@dataclass
class Tables:
    """Several tables of one bench.

    Args:
        tables: In the order in which they are shown.
        left_out: What could not be measured, with the reason.
    """

    tables: list[Table] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The tables for a terminal."""
        return "\n\n\n".join([*(table.text() for table in self.tables), *self.left_out])

    def to_dict(self) -> dict[str, object]:
        """The tables as plain values."""
        return {"tables": [table.to_dict() for table in self.tables], "left_out": self.left_out}


def measured_apart(
    module: str, words: Sequence[str], environment: Mapping[str, str], *, what: str, remedy: str, python: str = ""
) -> dict[str, Any]:
    """What a program that measures in a process of its own says in its last line of JSON.

    Args:
        module: Run as ``python -m module``.
        words: Its arguments.
        environment: Variables beside those of this process.
        what: What cannot be done where it fails, for the error.
        remedy: What to do then.
        python: The interpreter; this one where none is given.

    Raises:
        PluginError: It failed; its last words are in the error.
    """
    command = [python or sys.executable, "-W", "ignore", "-m", module, *words]
    finished = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if finished.returncode:
        lines = [line for line in finished.stderr.splitlines() if line and not line.startswith(" ")]
        found = (lines or ["no reason"])[-1][:160]
        raise PluginError(what, found=found, allowed="a way that trains it", remedy=remedy)
    return json.loads(next(line for line in reversed(finished.stdout.splitlines()) if line.startswith("{")))
