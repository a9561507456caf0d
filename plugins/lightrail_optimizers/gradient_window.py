"""A window over the last m gradients, the rows of a matrix G, and the matrices ``G G^T`` that methods invert."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["DenseWindow", "Window", "eigh", "insert", "newest_row", "row_parts", "solve_shifted"]

# How many numbers of a window to work on at once: on a CPU a part and its copy in single precision stay in its cache.
_CPU_PART, _DEVICE_PART = 1 << 19, 1 << 26


class Window(Protocol):
    """m rows of d numbers, in whatever form; the first n of them are filled."""

    def put(self, j: int, a: Tensor) -> Tensor:
        """Keeps a vector, or what the form can hold of it, as row j; returns what it keeps, as a vector."""
        ...

    def gram_row(self, n: int, j: int, c: Tensor) -> Tensor:
        """``G g`` over the first n rows, where g is row j, which is the vector c."""
        ...

    def products(self, n: int, x: Tensor) -> Tensor:
        """``G x`` over the first n rows, for any vector x."""
        ...

    def combination(self, w: Tensor) -> Tensor:
        """``G^T w`` over as many rows as w has numbers."""
        ...


class DenseWindow:
    """Whole gradients, in a tensor of one row a gradient.

    Args:
        rows: m × d, of any floating dtype; calculations are in the dtype of the vectors.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def put(self, j: int, a: Tensor) -> Tensor:
        self.rows[j].copy_(a)
        return a if self.rows.dtype == a.dtype else self.rows[j].to(a.dtype)

    def gram_row(self, n: int, j: int, c: Tensor) -> Tensor:
        return self.products(n, c)

    def products(self, n: int, x: Tensor) -> Tensor:
        if self.rows.dtype == x.dtype:
            return torch.mv(self.rows[:n], x)
        out = torch.zeros(n, dtype=x.dtype, device=x.device)
        for part in self._columns(n):
            out.addmv_(self.rows[:n, part].to(x.dtype), x[part])
        return out

    def combination(self, w: Tensor) -> Tensor:
        n = len(w)
        if self.rows.dtype == w.dtype:
            return torch.mv(self.rows[:n].t(), w)
        out = torch.empty(self.rows.shape[1], dtype=w.dtype, device=w.device)
        for part in self._columns(n):
            torch.mv(self.rows[:n, part].to(w.dtype).t(), w, out=out[part])
        return out

    def _columns(self, n: int) -> Iterator[slice]:
        return _parts(self.rows.shape[1], n, self.rows.device)


def row_parts(n: int, width: int, device: torch.device) -> Iterator[slice]:
    """The first n rows in parts that a CPU's cache can hold, where a row has ``width`` numbers."""
    return _parts(n, width, device)


def _parts(length: int, width: int, device: torch.device) -> Iterator[slice]:
    size = max(1, (_CPU_PART if device.type == "cpu" else _DEVICE_PART) // max(width, 1))
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def insert(window: Window, kept: dict[str, Any], m: int, a: Tensor) -> Tensor:
    """Puts a vector in the place of the oldest, and brings ``G G^T`` up to date by one row and one column.

    Args:
        window: Of m rows.
        kept: State; ``inserted`` counts vectors, ``gram`` is ``G G^T`` of the rows filled so far.
        m: How many rows there are.
        a: The vector.

    Returns:
        What the window keeps of it.
    """
    inserted = kept.get("inserted", 0)
    j, n = inserted % m, min(inserted + 1, m)
    c = window.put(j, a)
    row = window.gram_row(n, j, c)
    gram = kept.get("gram")
    if gram is None:
        gram = row.new_zeros(n, n)
    elif len(gram) < n:
        gram = F.pad(gram, (0, 1, 0, 1))
    gram[j] = row
    gram[:, j] = row
    kept["gram"], kept["inserted"] = gram, inserted + 1
    return c


def newest_row(kept: dict[str, Any], m: int) -> int:
    """The row of the vector that :func:`insert` put in last."""
    return (kept["inserted"] - 1) % m


def solve_shifted(gram: Tensor, shift: float, r: Tensor) -> Tensor:
    """``(shift I + K)^-1 r`` for K, a positive semidefinite matrix, found in double precision.

    Where rounding has left K with eigenvalues below ``-shift``, they count as zero.

    Example:
        >>> solve_shifted(torch.tensor([[3.0]]), 1.0, torch.tensor([8.0])).tolist()
        [2.0]
    """
    k, b = gram.double(), r.double().unsqueeze(1)
    factor, failed = torch.linalg.cholesky_ex(k + shift * torch.eye(len(k), dtype=k.dtype, device=k.device))
    if not failed:
        return torch.cholesky_solve(b, factor).squeeze(1).to(r.dtype)
    s, v = eigh(k)
    return (v @ ((v.t() @ b) / (s + shift).unsqueeze(1))).squeeze(1).to(r.dtype)


def eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, at least 0, and eigenvectors in double precision of a matrix that is positive semidefinite."""
    k = gram.double()
    if not bool(k.isfinite().all()):  # LAPACK would raise; a NaN shall go on to where NaNs are looked for
        return k.new_full((len(k),), torch.nan), torch.full_like(k, torch.nan)
    s, v = torch.linalg.eigh(k)
    return s.clamp_(min=0), v
