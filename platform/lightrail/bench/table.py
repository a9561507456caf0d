"""A table of measurements."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median

__all__ = ["Row", "Table"]


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
                line += f"  {ratio:5.2f} x {row.peer}"
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
