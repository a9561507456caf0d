"""What every sample's loss has in common: a penalty on the parameters, which no sample enters."""

from __future__ import annotations

import torch
from torch import Tensor

from lightrail.sample_gradients.pieces import Piece

__all__ = ["SharedPiece"]


class SharedPiece(Piece):
    """One gradient that is part of each sample's.

    Args:
        owner: The parameter.
        gradient: In its shape.
        count: How many samples.
    """

    def __init__(self, owner: Tensor, gradient: Tensor, count: int) -> None:
        self.owner = owner
        self._gradient = gradient
        self._count = count

    @property
    def count(self) -> int:
        return self._count

    def per_sample(self, rows: slice = slice(None)) -> Tensor:
        return self._gradient.expand(len(range(self._count)[rows]), *self._gradient.shape)

    def squared_norms(self) -> Tensor:
        return self._gradient.square().sum().expand(self._count)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return self._gradient * weights.sum().to(self._gradient.dtype)

    def scaled(self, factor: float) -> Piece:
        return SharedPiece(self.owner, self._gradient * factor, self._count)

    def without(self, is_left_out: Tensor) -> Piece:
        kept = ~is_left_out.view(-1, *[1] * self._gradient.dim())
        return Piece(self.owner, torch.where(kept, self._gradient, self._gradient.new_zeros(())))
