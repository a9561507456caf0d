"""The metrics of a run as one CSV file: the logger ``csv``."""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightrail.errors import RunFolderError
from lightrail.files import replace_file, tells_unwritable
from lightrail.report.metrics import KEYS, read_metrics, read_rows

__all__ = ["MetricsFile", "read_metrics"]


class MetricsFile(Logger):
    """Writes ``metrics.csv``: one row a step, one column a metric, floats that read back as the same floats.

    Each call reaches the file before it returns, so a killed process loses nothing. Consecutive calls become one row
    as long as they agree on the step, the epoch and every metric that they share. A file that is already there is
    continued. Under DDP only rank zero writes.

    Args:
        folder: Where the file goes: the run folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     logger = MetricsFile(folder)
        ...     logger.log_metrics({"train_loss": 0.1, "epoch": 0}, step=50)
        ...     logger.log_metrics({"val_loss": 0.25, "epoch": 0}, step=50)
        ...     print(logger.path.read_text(), end="")
        step,epoch,train_loss,val_loss
        50,0,0.1,0.25
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__()
        self.folder = folder
        self._columns: list[str] | None = None  # until the file was looked at
        self._num_rows = 0
        self._last: dict[str, str] = {}  # the last row stays open for calls that agree with it
        self._last_start = self._end = 0  # bytes

    @property
    def path(self) -> Path:
        """The file.

        Raises:
            RunFolderError: There is no folder to put it in.
        """
        if self.folder is None:
            raise RunFolderError(
                "the logger csv has no folder to write to",
                found="folder=None",
                allowed="the path of a folder",
                remedy="Give it one: MetricsFile(folder=PATH); the platform fills in the run folder.",
            )
        return Path(self.folder) / "metrics.csv"

    @property
    def save_dir(self) -> str | None:
        return self.folder

    # Lightning puts checkpoints without a folder of their own at save_dir/name/version/checkpoints.
    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the run folder holds the whole configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds the metrics to the row of this step.

        Args:
            metrics: Numbers by name; ``epoch`` has a column of its own.
            step: The step that they belong to; by default ``metrics["step"]``, else that of the last row.

        Raises:
            RunFolderError: The disk is full, or the folder cannot be written.
        """
        columns = self._continue()
        if step is None:
            step = int(metrics.get("step", self._last.get("step", 0)))
        cells = {"step": str(int(step))} | {n: _cell(n, value) for n, value in metrics.items() if n != "step"}
        if all(name in KEYS for name in cells):
            return
        is_same_row = self._num_rows > 0 and all(self._last.get(n, cell) == cell for n, cell in cells.items())
        row = self._last | cells if is_same_row else cells
        if new := [name for name in cells if name not in columns]:
            rows = self._rows()
            self._rewrite([*columns, *new], [*(rows[:-1] if is_same_row else rows), row])
        else:
            self._write(row, replaces_last=is_same_row)

    @rank_zero_only
    def truncate(self, step: int) -> None:
        """Drops the rows after a step, and the columns that only they filled.

        Args:
            step: The last step that stays.
        """
        columns = self._continue()
        rows = [row for row in self._rows() if int(row["step"]) <= step]
        filled = set(KEYS).union(*rows)
        self._rewrite([name for name in columns if name in filled], rows)

    def state_dict(self) -> dict[str, Any]:
        """What the file holds now, in plain values: its columns, its number of rows and its last row."""
        if rank_zero_only.rank != 0:
            return {}
        return {"columns": list(self._continue()), "rows": self._num_rows, "last": dict(self._last)}

    @rank_zero_only
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Cuts the file to what it held when the state was taken, so that a resumed run continues it exactly.

        A file that lacks those rows belongs to another folder than the state does; it is left alone.
        """
        self._continue()
        if not state or self._num_rows < state["rows"] - 1:
            return
        # Later calls may have filled cells of the row that was the last one then: it comes from the state.
        earlier = self._rows()[: max(state["rows"] - 1, 0)]
        self._rewrite(list(state["columns"]), [*earlier, dict(state["last"])] if state["rows"] else [])

    def _continue(self) -> list[str]:
        """The columns of the file; takes up what an earlier process left there, without a line cut short."""
        if self._columns is not None:
            return self._columns
        path = self.path
        with tells_unwritable(path):
            columns, rows = read_rows(path) if path.exists() else ([], [])
        if not columns:
            self._columns = list(KEYS)
            return self._columns
        return self._rewrite(columns, rows)

    def _rows(self) -> list[dict[str, str]]:
        if not self._num_rows:
            return []
        with tells_unwritable(self.path):
            return read_rows(self.path)[1]

    def _write(self, row: dict[str, str], *, replaces_last: bool) -> None:
        assert self._columns is not None
        start = self._last_start if replaces_last else self._end
        line, path = _line(self._columns, row), self.path
        # A row that replaces the last one has all of its cells and more, so nothing of the old one sticks out.
        with tells_unwritable(path), open(path, "r+b") as file:
            file.seek(start)
            file.write(line)
        self._num_rows += not replaces_last
        self._last, self._last_start, self._end = row, start, start + len(line)

    def _rewrite(self, columns: list[str], rows: Sequence[dict[str, str]]) -> list[str]:
        header = io.StringIO()
        csv.writer(header, lineterminator="\n").writerow(columns)
        lines = [header.getvalue().encode(), *(_line(columns, row) for row in rows)]
        if rows:
            replace_file(self.path, b"".join(lines))
        else:
            with tells_unwritable(self.path):
                self.path.unlink(missing_ok=True)
            columns = list(KEYS)
        self._columns, self._num_rows, self._last = columns, len(rows), dict(rows[-1]) if rows else {}
        self._end = sum(map(len, lines))
        self._last_start = self._end - len(lines[-1])
        return columns


def _line(columns: Sequence[str], row: Mapping[str, str]) -> bytes:
    return (",".join(row.get(name, "") for name in columns) + "\n").encode()


def _cell(name: str, value: Any) -> str:
    number = value if isinstance(value, int) else float(value)
    is_whole = isinstance(number, int) or (name == "epoch" and number.is_integer())
    return str(int(number)) if is_whole else repr(number)
