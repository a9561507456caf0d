"""Windows over compressed gradients: of their largest entries, or of factors of low rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightrail_optimizers.error_feedback import largest, power_iteration, share
from lightrail_optimizers.gradient_window import DenseWindow, row_parts
from lightrail_optimizers.sophia_rule import draw_directions

__all__ = ["LowRankWindow", "TopKWindow"]


class TopKWindow:
    """The entries of greatest magnitude of each gradient: values and indices.

    Args:
        values: m × k.
        indices: m × k, integers.
        lengths: Of the parts of the vector that are searched one by one.
        counts: How many entries of each part are kept; k in all.
    """

    def __init__(self, values: Tensor, indices: Tensor, lengths: Sequence[int], counts: Sequence[int]) -> None:
        self.values, self.indices = values, indices
        self._lengths, self._counts = list(lengths), counts

    @classmethod
    def of(
        cls, kept: dict[str, Any], m: int, lengths: Sequence[int], density: float, like: Tensor, dtype: torch.dtype
    ) -> TopKWindow:
        """The window in a state, where it is allocated if it is not there yet.

        Args:
            kept: State; ``values`` and ``indices``.
            m: How many rows.
            lengths: As above.
            density: The share of entries to keep, in (0, 1].
            like: A vector on the device of the window.
            dtype: Of the values.
        """
        counts = [share(length, density) for length in lengths]
        if "values" not in kept:
            integers = torch.int32 if sum(lengths) < 2**31 else torch.int64
            kept["values"] = torch.zeros(m, sum(counts), dtype=dtype, device=like.device)
            kept["indices"] = torch.zeros(m, sum(counts), dtype=integers, device=like.device)
        return cls(kept["values"], kept["indices"], lengths, counts)

    def put(self, j: int, a: Tensor) -> Tensor:
        found, start = [], 0
        for part, length, k in zip(a.split(self._lengths), self._lengths, self._counts, strict=True):
            found.append(largest(part, k).add_(start))
            start += length
        where = found[0] if len(found) == 1 else torch.cat(found)
        self.indices[j].copy_(where)
        self.values[j].copy_(a[where])
        return torch.zeros_like(a).scatter_(0, where, self.values[j].to(a.dtype))

    def gram_row(self, n: int, j: int, c: Tensor) -> Tensor:
        return self.products(n, c)

    def products(self, n: int, x: Tensor) -> Tensor:
        k = self.values.shape[1]
        out = torch.empty(n, dtype=x.dtype, device=x.device)
        for part in row_parts(n, k, x.device):
            entries = x.index_select(0, self.indices[part].view(-1)).view(-1, k)
            torch.linalg.vecdot(entries, self.values[part].to(x.dtype), out=out[part])
        return out

    def combination(self, w: Tensor) -> Tensor:
        out = torch.zeros(sum(self._lengths), dtype=w.dtype, device=w.device)
        for part in row_parts(len(w), self.values.shape[1], w.device):
            scaled = self.values[part].to(w.dtype) * w[part].unsqueeze(1)
            out.scatter_add_(0, self.indices[part].view(-1).long(), scaled.view(-1))
        return out


class LowRankWindow:
    """Factors of each gradient: a matrix is ``left^T right`` with r rows each, found by one step of power iteration.

    A tensor counts as the matrix of its first dimension and all others together. Those whose factors would be no
    smaller than themselves, as vectors', are kept whole.

    Args:
        kept: State: ``left`` and ``right``, of one tensor a matrix, and ``window`` of all the rest. It is allocated if
            it is not there yet.
        m: How many rows.
        params: Those of the group.
        rank: r, >= 1.
        like: A vector on the device of the window.
        dtype: Of what is kept.
    """

    def __init__(
        self, kept: dict[str, Any], m: int, params: Sequence[Tensor], rank: int, like: Tensor, dtype: torch.dtype
    ) -> None:
        self._m = m
        self._matrices: list[tuple[slice, int, int]] = []
        self._whole: list[slice] = []
        start = 0
        for p in params:
            part = slice(start, start + p.numel())
            a, b = (p.shape[0], p.numel() // max(p.shape[0], 1)) if p.ndim else (1, 1)
            if rank * (a + b) < a * b:
                self._matrices.append((part, a, b))
            else:
                self._whole.append(part)
            start += p.numel()
        self._length = start
        if "window" not in kept:
            self._allocate(kept, rank, like, dtype)
        self.left: list[Tensor] = kept["left"]
        self.right: list[Tensor] = kept["right"]
        self._rest = DenseWindow(kept["window"])

    def _allocate(self, kept: dict[str, Any], rank: int, like: Tensor, dtype: torch.dtype) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(self._m, *shape, dtype=dtype, device=like.device)

        kept["left"] = [zeros(rank, a) for _, a, _ in self._matrices]
        kept["right"] = [zeros(rank, b) for _, _, b in self._matrices]
        kept["window"] = zeros(sum(part.stop - part.start for part in self._whole))
        # Power iteration starts from the factor of the step before: that of the first step is random.
        before = [right[-1] for right in kept["right"]]
        if before:
            torch._foreach_copy_(before, draw_directions(before, "gaussian"))

    def put(self, j: int, a: Tensor) -> Tensor:
        c = torch.empty_like(a)
        for (part, rows, columns), left, right in zip(self._matrices, self.left, self.right, strict=True):
            p, q = power_iteration(a[part].view(rows, columns), right[(j - 1) % self._m].to(a.dtype).t())
            left[j].copy_(p.t())
            right[j].copy_(q.t())
            torch.mm(left[j].to(a.dtype).t(), right[j].to(a.dtype), out=c[part].view(rows, columns))
        rest = self._rest.put(j, self._gather(a))
        self._scatter(c, rest)
        return c

    def gram_row(self, n: int, j: int, c: Tensor) -> Tensor:
        out = self._rest.products(n, self._gather(c))
        for left, right in zip(self.left, self.right, strict=True):
            # Tr (L_i^T R_i)^T (L_j^T R_j), in O(rows + columns): the inner products of factors, multiplied. They are
            # products of a matrix and a vector, which stay exact where products of matrices may be in TF32.
            out += (self._inner(left, n, j, c) * self._inner(right, n, j, c)).sum((0, 2))
        return out

    @staticmethod
    def _inner(factors: Tensor, n: int, j: int, c: Tensor) -> Tensor:
        """Of each line of row j with each line of the first n rows: r × n × r."""
        lines = DenseWindow(factors.view(-1, factors.shape[-1]))
        r = factors.shape[1]
        return torch.stack([lines.products(n * r, line.to(c.dtype)).view(n, r) for line in factors[j]])

    def products(self, n: int, x: Tensor) -> Tensor:
        out = self._rest.products(n, self._gather(x))
        for (part, rows, columns), left, right in zip(self._matrices, self.left, self.right, strict=True):
            matrix = x[part].view(rows, columns)
            for i in row_parts(n, max(rows, columns) * left.shape[1], x.device):
                out[i] += torch.einsum("ira,ab,irb->i", left[i].to(x.dtype), matrix, right[i].to(x.dtype))
        return out

    def combination(self, w: Tensor) -> Tensor:
        out = torch.empty(self._length, dtype=w.dtype, device=w.device)
        n = len(w)
        for (part, rows, columns), left, right in zip(self._matrices, self.left, self.right, strict=True):
            scaled = (left[:n].to(w.dtype) * w.view(-1, 1, 1)).view(-1, rows)
            torch.mm(scaled.t(), right[:n].to(w.dtype).reshape(-1, columns), out=out[part].view(rows, columns))
        self._scatter(out, self._rest.combination(w))
        return out

    def _gather(self, vector: Tensor) -> Tensor:
        if not self._matrices:
            return vector
        return torch.cat([vector[part] for part in self._whole]) if self._whole else vector[:0]

    def _scatter(self, vector: Tensor, rest: Tensor) -> None:
        start = 0
        for part in self._whole:
            vector[part] = rest[start : start + part.stop - part.start]
            start += part.stop - part.start
