"""Descent on several objectives at once: a combination of their gradients takes the place of the loss's gradient.

J has one row an objective. Every method here is a rule that reads weights w off the Gramian ``G = J Jᵀ``; the update
follows ``Jᵀ w``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightrail.errors import ClosureError
from lightrail.step import Closure, Transform
from lightrail_optimizers.flat_vector import working_dtype
from lightrail_optimizers.replaced_gradient import raw_gradient
from lightrail_optimizers.tensor_lists import refuse_complex, refuse_sparse

__all__ = [
    "JacobianDescent",
    "ObjectiveRows",
    "Rows",
    "SampleRows",
    "conflicts",
    "gramian",
]

# Entries of J that are widened to double precision at a time: what a CPU's cache holds, or 32 MiB on an accelerator.
_CPU_ENTRIES, _ACCELERATOR_ENTRIES = 1 << 16, 1 << 22


class Rows(ABC):
    """J, kept parameter by parameter and never as one matrix."""

    #: Any one tensor of each parameter's rows: what its device, its layout and its dtype are.
    like: list[Tensor]

    @abstractmethod
    def __len__(self) -> int:
        """How many rows there are."""

    @abstractmethod
    def size(self, k: int) -> int:
        """How many entries the k-th parameter has."""

    @abstractmethod
    def columns(self, k: int, part: slice) -> Tensor:
        """``[m, …]``: some of the columns that belong to the k-th parameter."""

    @abstractmethod
    def combined(self, w: Sequence[float]) -> list[Tensor]:
        """``Jᵀ w``: new tensors, one a parameter, in single precision at least."""

    def touches(self, k: int) -> bool:
        """Whether any objective depends on the k-th parameter, here and now."""
        return any(bool(self.columns(k, part).any()) for part in self.parts(k))

    def parts(self, k: int) -> Iterator[slice]:
        """The columns of the k-th parameter, a few at a time."""
        budget = _CPU_ENTRIES if self.like[k].device.type == "cpu" else _ACCELERATOR_ENTRIES
        length = max(budget // max(len(self), 1), 256)
        return (slice(start, start + length) for start in range(0, self.size(k), length))


class ObjectiveRows(Rows):
    """Rows as ``closure.jacobian()`` and ``closure.groups(count)`` give them.

    Args:
        rows: A list, an objective, of one tensor a parameter.

    Raises:
        ClosureError: There is no objective.
    """

    def __init__(self, rows: Sequence[Sequence[Tensor]]) -> None:
        if not rows:
            raise ClosureError(
                "the task has no objectives to combine",
                found="objectives(batch) returned none",
                allowed="a sequence, a mapping or a 1-d tensor of one loss or more",
                remedy="Return the task's losses from objectives(batch).",
            )
        self.rows = [list(row) for row in rows]
        self.like = self.rows[0]

    def __len__(self) -> int:
        return len(self.rows)

    def size(self, k: int) -> int:
        return self.like[k].numel()

    def columns(self, k: int, part: slice) -> Tensor:
        return torch.stack([row[k].reshape(-1)[part] for row in self.rows])

    def combined(self, w: Sequence[float]) -> list[Tensor]:
        total = [t.to(working_dtype([t])) for t in self.rows[0]]
        total = list(torch._foreach_mul(total, w[0]))
        for weight, row in zip(w[1:], self.rows[1:], strict=True):
            torch._foreach_add_(total, [t.to(s.dtype) for t, s in zip(row, total, strict=True)], alpha=weight)
        return total


class SampleRows(Rows):
    """Rows as ``closure.sample_jacobian()`` gives them.

    Args:
        stacked: One tensor a parameter, ``[N, *shape]``.
    """

    def __init__(self, stacked: Sequence[Tensor]) -> None:
        self.like = list(stacked)

    def __len__(self) -> int:
        return len(self.like[0])

    def size(self, k: int) -> int:
        return self.like[k][0].numel()

    def columns(self, k: int, part: slice) -> Tensor:
        return self._matrix(k)[:, part]

    def combined(self, w: Sequence[float]) -> list[Tensor]:
        found = []
        for k, each in enumerate(self.like):
            matrix = self._matrix(k).to(working_dtype([each]))
            found.append((torch.tensor(w, dtype=matrix.dtype, device=matrix.device) @ matrix).view(each.shape[1:]))
        return found

    def _matrix(self, k: int) -> Tensor:
        return self.like[k].reshape(len(self), self.size(k))


def gramian(rows: Rows) -> Tensor:
    """``G = J Jᵀ`` in double precision, parameter by parameter.

    Returns:
        ``[m, m]``, on the CPU.

    Example:
        >>> gramian(ObjectiveRows([[torch.tensor([-4.0, 1.0]), torch.tensor(1.0)], [torch.tensor([6.0, 1.0]),
        ...                                                                          torch.tensor(1.0)]])).tolist()
        [[18.0, -22.0], [-22.0, 38.0]]
    """
    totals: dict[torch.device, Tensor] = {}
    for k, like in enumerate(rows.like):
        # Apple's GPUs have no double precision.
        dtype = torch.float32 if like.device.type == "mps" else torch.float64
        if like.device not in totals:
            totals[like.device] = torch.zeros(len(rows), len(rows), dtype=dtype, device=like.device)
        for part in rows.parts(k):
            columns = rows.columns(k, part).to(dtype)
            totals[like.device].addmm_(columns, columns.t())
    g = torch.stack([total.cpu().double() for total in totals.values()]).sum(0)
    return (g + g.t()) / 2


def conflicts(g: Tensor) -> dict[str, float]:
    """How many pairs of rows point against each other, and the smallest cosine of any pair.

    Args:
        g: The Gramian.

    Example:
        >>> conflicts(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]))
        {'conflicting_pairs': 1.0, 'smallest_cosine': -0.5}
    """
    count = len(g)
    if count < 2:
        return {}
    norms = g.diagonal().clamp_min(0).sqrt()
    cosines = g / torch.outer(norms, norms).clamp_min(torch.finfo(g.dtype).tiny)
    above = cosines[torch.triu(torch.ones(count, count, dtype=torch.bool), 1)]
    return {"conflicting_pairs": float((above < 0).sum()), "smallest_cosine": float(above.min())}


class JacobianDescent(Transform, ABC):
    """The common part of the methods: asks for the rows, and puts ``Jᵀ w`` where the loss's gradient stood.

    What transforms before it in the chain made of that gradient is kept as a difference:
    ``.grad = Jᵀ w + (g_edited - g)``. To know g, one more evaluation is spent, where something stands before.
    """

    def __init__(self) -> None:
        self._g: Tensor | None = None
        self._w: Tensor | None = None

    def rows(self, closure: Closure) -> Rows:
        """J: one row an objective of the task."""
        return ObjectiveRows(closure.jacobian())

    @abstractmethod
    def weights(self, g: Tensor) -> Tensor:
        """w, ``[m]``, from the Gramian ``[m, m]``, both in double precision on the CPU."""

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        params = closure.params
        refuse_complex(type(self).__name__, params)
        rows = self.rows(closure)
        for like in rows.like:
            if like.is_sparse:
                refuse_sparse(type(self).__name__, like)
        plain = raw_gradient(closure)
        g = gramian(rows)
        # Rows that are not finite have no weights; any of them gives a direction that is not finite, for all to see.
        w = self.weights(g) if bool(g.isfinite().all()) else g.new_full((len(g),), 1 / len(g))
        self._g, self._w = g, _of_first_rank(w, params[0].device)
        direction = rows.combined(self._w.tolist())
        for k, p in enumerate(params):
            if not p.requires_grad:
                continue
            if p.grad is None:
                # The loss may leave out what an objective knows; a transform before this one may have withheld it.
                is_withheld = plain is not None and bool(plain[k].any())
                if is_withheld or not rows.touches(k):
                    continue
            elif plain is not None:
                direction[k] += p.grad - plain[k]
            p.grad = direction[k].to(p.dtype)

    def logged(self) -> dict[str, float]:
        if self._g is None or self._w is None:
            return {}
        return conflicts(self._g) | {"smallest_weight": float(self._w.min()), "largest_weight": float(self._w.max())}


def _of_first_rank(w: Tensor, device: torch.device) -> Tensor:
    """The first rank's weights: ranks that draw or round otherwise must not drift apart."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        w = w.to(device)
        distributed.broadcast(w, src=0)
    return w.cpu()
