"""The gradients of all samples of a micro-batch, as far as one may ask: norms, weighted sums, or one by one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from lightrail.sample_gradients.pieces import Piece, joined, squared_norms, weighted_sum

__all__ = ["SampleGradients"]


class SampleGradients:
    """g_1, …, g_B, one a sample, over all parameters.

    A sample whose gradient is not finite is left out of everything: its norm is 0 and so is its share of any sum.

    Args:
        params: The parameters.
        pieces: For each, what the gradients are the sum of.
        scale: What they are multiplied by: the number of samples of which the loss is the mean.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> gradients = SampleGradients([w], [[Piece(w, torch.tensor([[3.0, 4.0], [0.0, float("inf")]]))]])
        >>> gradients.norms().tolist(), gradients.weighted_sum(torch.tensor([0.5, 1.0]))[0].tolist()
        ([5.0, 0.0], [1.5, 2.0])
    """

    def __init__(self, params: Sequence[Tensor], pieces: Sequence[Sequence[Piece]], scale: float = 1.0) -> None:
        self.params = list(params)
        self._scale = scale
        self._pieces = [joined(each) if len(each) > 1 else list(each) for each in pieces]
        count = next((each[0].count for each in self._pieces if each), 0)
        device = self.params[0].device if self.params else None
        self._zeros = torch.zeros(count, device=device)
        self._squares = [squared_norms(each) if each else self._zeros for each in self._pieces]
        total = self._total()
        self.is_left_out = ~torch.isfinite(total * scale**2)
        if bool(self.is_left_out.any()):
            self._pieces = [[piece.without(self.is_left_out) for piece in each] for each in self._pieces]
            self._squares = [torch.where(self.is_left_out, each.new_zeros(()), each) for each in self._squares]

    def __len__(self) -> int:
        return len(self._zeros)

    def _total(self) -> Tensor:
        return torch.stack([each.to(self._squares[0].dtype) for each in self._squares]).sum(0)

    def norms(self) -> Tensor:
        """‖g_i‖ over all parameters, ``[B]``."""
        return self._total().clamp_min(0).sqrt() * self._scale

    def norms_by_parameter(self) -> Tensor:
        """‖g_i^l‖ of each parameter, ``[P, B]``."""
        return torch.stack([each.clamp_min(0).sqrt() for each in self._squares]) * self._scale

    def weighted_sum(self, weights: Tensor) -> list[Tensor]:
        """Σ_i c_i g_i.

        Args:
            weights: c, one number a sample ``[B]``, or one for each parameter and sample ``[P, B]``.

        Returns:
            One tensor a parameter, in its shape, in float32 at least.
        """
        scaled = weights * self._scale
        rows = scaled if scaled.dim() == 2 else scaled.expand(len(self.params), -1)
        return [
            weighted_sum(each, row) if each and each[0].count else torch.zeros_like(p, dtype=_accumulated(p.dtype))
            for p, each, row in zip(self.params, self._pieces, rows, strict=True)
        ]

    def sum(self) -> list[Tensor]:
        """Σ_i g_i."""
        return self.weighted_sum(torch.ones_like(self._zeros))

    def per_sample(self) -> list[Tensor]:
        """g_i themselves, ``[B, *shape]`` for each parameter: as many copies of the model as there are samples."""
        found = []
        for p, pieces in zip(self.params, self._pieces, strict=True):
            total = torch.zeros(len(self), *p.shape, dtype=_accumulated(p.dtype), device=p.device)
            for piece in pieces:
                total = total + piece.per_sample()
            found.append(total * self._scale)
        return found

    def minus(self, other: SampleGradients) -> SampleGradients:
        """g_i - g'_i of the same samples elsewhere.

        Close gradients cancel, so that their difference's norm is taken of the difference itself, never of products.
        """
        pieces = [
            [_Difference(p, mine, others)] if mine or others else []
            for p, mine, others in zip(self.params, self._pieces, other._pieces, strict=True)
        ]
        return SampleGradients(self.params, pieces, self._scale)


class _Difference(Piece):
    """The difference of two sums of pieces, computed anew, some samples at a time, wherever it is asked for."""

    def __init__(self, owner: Tensor, plus: Sequence[Piece], minus: Sequence[Piece]) -> None:
        self.owner = owner
        self._plus, self._minus = list(plus), list(minus)

    @property
    def count(self) -> int:
        return (self._plus or self._minus)[0].count

    def per_sample(self, rows: slice = slice(None)) -> Tensor:
        parts = [each.per_sample(rows) for each in self._plus] + [-each.per_sample(rows) for each in self._minus]
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total

    @cached_property
    def _step(self) -> int:
        return max(1, 2**24 // max(self.owner.numel(), 1))

    def squared_norms(self) -> Tensor:
        chunks = [slice(i, i + self._step) for i in range(0, self.count, self._step)]
        return torch.cat([self.per_sample(rows).reshape(-1, self.owner.numel()).square().sum(1) for rows in chunks])

    def weighted_sum(self, weights: Tensor) -> Tensor:
        total: Tensor | None = None
        for i in range(0, self.count, self._step):
            rows = slice(i, i + self._step)
            gradients = self.per_sample(rows).reshape(-1, self.owner.numel())
            part = weights[rows].to(gradients.dtype) @ gradients
            total = part if total is None else total + part
        assert total is not None
        return total.view(self.owner.shape)

    def without(self, is_left_out: Tensor) -> Piece:
        return _Difference(
            self.owner,
            [each.without(is_left_out) for each in self._plus],
            [each.without(is_left_out) for each in self._minus],
        )


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
