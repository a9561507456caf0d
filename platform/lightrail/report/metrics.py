"""Reading ``metrics.csv``: one row a step, one column a metric."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from lightrail.errors import DataError

__all__ = ["read_metrics", "read_rows"]

KEYS = ("step", "epoch")


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and the rows of a metrics file; a row holds its non-empty cells.

    A last line without its end is what a killed process was about to write; it is left out.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    columns = next(lines, [])
    return columns, [{n: cell for n, cell in zip(columns, cells, strict=False) if cell} for cells in lines if cells]


def read_metrics(path: str | Path) -> dict[str, list[tuple[int, float]]]:
    """The curves in a metrics file.

    Args:
        path: A ``metrics.csv``.

    Returns:
        For each metric, in order of appearance, its ``(step, value)`` pairs in the order of the file.

    Raises:
        DataError: A cell is not a number, or there is no column ``step``.
        OSError: The file cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "metrics.csv")
        ...     _ = path.write_text("step,epoch,loss,accuracy\\n10,0,2.5,\\n20,0,1.25,0.5\\n")
        ...     read_metrics(path)
        {'loss': [(10, 2.5), (20, 1.25)], 'accuracy': [(20, 0.5)]}
    """
    columns, rows = read_rows(Path(path))
    series: dict[str, list[tuple[int, float]]] = {name: [] for name in columns if name not in KEYS}
    for number, row in enumerate(rows, start=1):
        for name in row:
            if name in series:
                series[name].append((int(_number(path, row, "step", number)), _number(path, row, name, number)))
    return series


def _number(path: str | Path, row: dict[str, str], column: str, number: int) -> float:
    cell = row.get(column, "")
    try:
        return float(cell)
    except ValueError:
        raise DataError(
            f"{Path(path).name} has a cell that is not a number",
            found=f"{cell!r} in row {number}, column {column} of {path}",
            allowed="numbers, and empty cells outside the column step",
            remedy="Mend or delete that row.",
        ) from None
