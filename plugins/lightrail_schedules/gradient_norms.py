"""The norms of the gradients of a run: measured at every step, kept in its checkpoints and in a file of its folder."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightrail.errors import ConfigurationError
from lightrail.files import replace_file

__all__ = ["FILE_NAME", "GradientNorms", "newest_recorded", "norms_of", "read_norms"]

FILE_NAME = "gradient_norms.csv"
_COLUMNS = ("step", "l2", "l1")
_UNKNOWN = -1.0  # in place of a norm, of a step that nothing was measured at
_WAITING_AT_MOST = 256


def norms_of(gradients: Sequence[Tensor]) -> Tensor:
    """The norms ``||g||_2`` and ``||g||_1`` of all tensors as one vector, in single precision at least.

    Returns:
        ``[2]``, on the device of the first; nothing waits for it.

    Example:
        >>> norms_of([torch.tensor([3.0]), torch.tensor(-4.0)]).tolist()
        [5.0, 7.0]
    """
    tensors = [g.coalesce().values() if g.is_sparse else g.detach() for g in gradients]
    tensors = [g.abs() if g.is_complex() else g for g in tensors if g.numel() > 0]
    # One list a dtype: half precision is widened inside, without a copy.
    lists: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        lists.setdefault(torch.promote_types(tensor.dtype, torch.float32), []).append(tensor)
    found: list[list[Tensor]] = [[], []]
    for dtype, each in lists.items():
        for norms, order in zip(found, (2.0, 1.0), strict=True):
            norms.extend(map(_whole, torch._foreach_norm(each, order, dtype=dtype)))
    if not found[0]:
        return torch.zeros(2, dtype=torch.float64)
    l2, l1 = (torch.stack([n.to(norms[0].device, torch.float64) for n in norms]) for norms in found)
    return torch.stack([torch.linalg.vector_norm(l2), l1.sum()])


def _whole(norm: Tensor) -> Tensor:
    """The norm of a sharded gradient is spread over the ranks."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class GradientNorms:
    """The two norms of each step of one run.

    Args:
        total_steps: The length of the run; later steps are not kept.
    """

    def __init__(self, total_steps: int) -> None:
        self._rows = torch.full((total_steps, 2), _UNKNOWN, dtype=torch.float64)
        self._waiting: list[tuple[int, Tensor]] = []
        self.latest: Tensor | None = None

    def put(self, step: int, norms: Tensor) -> None:
        """Takes the norms of a step, counted from 0; they stay on their device for a while."""
        self.latest = norms
        if step >= len(self._rows):
            return
        self._waiting.append((step, norms))
        if len(self._waiting) >= _WAITING_AT_MOST:
            self.rows()

    def rows(self) -> Tensor:
        """``[steps, 2]``, on the CPU, until the last step that was measured."""
        if self._waiting:
            steps, norms = zip(*self._waiting, strict=True)
            self._rows[list(steps)] = torch.stack(norms).cpu().double()
            self._waiting.clear()
        measured = (self._rows[:, 0] != _UNKNOWN).nonzero()
        return self._rows[: int(measured[-1]) + 1 if len(measured) else 0]

    def load(self, rows: Tensor) -> None:
        """Goes on from what :meth:`rows` gave, in a run of any length."""
        self._waiting.clear()
        self._rows.fill_(_UNKNOWN)
        count = min(len(rows), len(self._rows))
        self._rows[:count] = rows[:count]

    def write(self, folder: str) -> None:
        """Writes the file into a run folder, whole or not at all; only the first rank does.

        Raises:
            RunFolderError: It cannot be written.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
            return
        lines = [",".join(_COLUMNS)]
        for step, (l2, l1) in enumerate(self.rows().tolist()):
            if l2 != _UNKNOWN:
                lines.append(f"{step},{l2!r},{l1!r}")
        replace_file(Path(folder) / FILE_NAME, ("\n".join(lines) + "\n").encode())


def newest_recorded(folder: str | None) -> str:
    """The run beside this one that recorded its norms last; a run that is resumed finds the one that it began with.

    Args:
        folder: The folder of this run.

    Raises:
        ConfigurationError: This run has no folder, or none beside it holds norms.
    """
    own = Path(folder or "").resolve()
    note = own / "refined_from.txt"
    if folder is not None and note.is_file():
        return note.read_text(encoding="utf-8").strip()
    beside = [path for path in own.parent.glob(f"*/{FILE_NAME}") if path.parent != own] if folder is not None else []
    if not beside:
        raise _unreadable("latest", f"no */{FILE_NAME} under {own.parent}" if folder is not None else "no run folder")
    newest = str(max(beside, key=lambda path: path.stat().st_mtime_ns).parent)
    replace_file(note, newest.encode())
    return newest


def read_norms(folder: str, norm: str) -> np.ndarray:
    """One of the norms of the run in a folder, ``[steps]``; a step that was not measured is interpolated.

    Args:
        folder: The run folder.
        norm: ``l2`` or ``l1``.

    Raises:
        ConfigurationError: There is no such file, it cannot be read, or it has fewer than two steps.
    """
    path = Path(folder) / FILE_NAME
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [(int(row["step"]), float(row[norm])) for row in csv.DictReader(file)]
    except OSError as error:
        raise _unreadable(folder, f"{path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise _unreadable(folder, f"{path}, which is not a table of {', '.join(_COLUMNS)}") from error
    if len(rows) < 2:
        raise _unreadable(folder, f"{path}, with {len(rows)} steps")
    steps, values = (np.array(column) for column in zip(*sorted(rows), strict=True))
    return np.interp(np.arange(steps[-1] + 1), steps, values)


def _unreadable(folder: str, found: str) -> ConfigurationError:
    return ConfigurationError(
        f"{folder} holds no gradient norms that a schedule could be refined from",
        found=found,
        allowed=f"the folder of a run of at least two steps with schedule=refined, which writes {FILE_NAME}",
        remedy="Train once with schedule=refined and without schedule.from_run, then name the folder of that run.",
    )
