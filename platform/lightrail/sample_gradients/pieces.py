"""What the gradients of samples are made of: kept as operands, or as the gradients themselves.

For y = x Wᵀ with T places a sample, g_i = Σ_t b_it a_itᵀ where a_i are the rows of x and b_i the gradients of the rows
of y, so that ‖g_i‖² = Σ_tt' (a_it · a_it')(b_it · b_it') without g_i (Goodfellow, 2015; Li et al., 2022), and
Σ_i c_i g_i = Σ_it c_i b_it a_itᵀ is one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightrail.sample_gradients.convolution import Geometry

__all__ = ["ConvolutionPiece", "EmbeddingPiece", "LinearPiece", "Piece", "joined", "squared_norms", "weighted_sum"]

_MOST_AT_ONCE = 2**22  # numbers of samples' gradients that are held for their norms alone
_ROUNDINGS = 8  # of a product of two vectors, relative to their lengths, at most


class Piece:
    """The gradients of all samples with respect to one tensor, ``[B, *shape]``, as they are.

    Args:
        owner: The parameter, or what was made of parameters.
        gradients: One gradient a sample.
    """

    def __init__(self, owner: Tensor, gradients: Tensor) -> None:
        self.owner = owner
        self._gradients = gradients.float() if gradients.dtype in (torch.bfloat16, torch.float16) else gradients

    def per_sample(self, rows: slice = slice(None)) -> Tensor:
        """The gradients themselves, of all or some samples."""
        return self._gradients[rows]

    @property
    def count(self) -> int:
        """How many samples."""
        return len(self._gradients)

    def squared_norms(self) -> Tensor:
        """‖g_i‖², ``[B]``."""
        return _rows(self._gradients).square().sum(1)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Σ_i c_i g_i, in the shape of the owner."""
        gradients = self._gradients
        return (weights.to(gradients.dtype) @ _rows(gradients)).view(self.owner.shape)

    def doubt(self) -> Tensor | float:
        """How much of ‖g_i‖² rounding can have hidden: nothing where the gradients themselves are kept."""
        return 0.0

    def scaled(self, factor: float) -> Piece:
        """The same for another multiple of the loss."""
        return Piece(self.owner, self._gradients * factor)

    def without(self, is_left_out: Tensor) -> Piece:
        """With the gradients of some samples zero, whatever they were."""
        return Piece(self.owner, _emptied(self._gradients, is_left_out))


class _OfOperands(Piece):
    """Gradients that are kept as what they are the product of: ``inputs`` and output gradients ``outputs``."""

    def __init__(self, owner: Tensor, inputs: Tensor, outputs: Tensor) -> None:
        self.owner = owner
        self.inputs = inputs
        self.outputs = outputs

    @property
    def count(self) -> int:
        return len(self.outputs)

    def per_sample(self, rows: slice = slice(None)) -> Tensor:
        raise NotImplementedError

    def squared_norms(self) -> Tensor:
        return _norms_in_chunks(self.per_sample, self.count, self.owner.numel())

    def doubt(self) -> Tensor | float:
        # Products of many places may cancel, in a norm and in a sum differently; none is longer than ‖a_i‖ ‖b_i‖.
        a, b = (_rows(each).square().sum(1) for each in _at_full_precision(self.inputs, self.outputs))
        return _ROUNDINGS * torch.finfo(b.dtype).eps * self._overlaps() * a * b

    def _overlaps(self) -> int:
        """At how many places one number of the inputs is used; 0 where there is one place only, and nothing cancels."""
        return int(self.inputs.shape[1] > 1)

    def _with(self, inputs: Tensor, outputs: Tensor) -> Piece:
        return type(self)(self.owner, inputs, outputs)

    def scaled(self, factor: float) -> Piece:
        return self._with(self.inputs, self.outputs * factor)

    def without(self, is_left_out: Tensor) -> Piece:
        return self._with(_emptied(self.inputs, is_left_out), _emptied(self.outputs, is_left_out))


class LinearPiece(_OfOperands):
    """Of y = x Wᵀ: ``inputs [B, T, d]``, ``outputs [B, T, p]``, owner ``[p, d]``; transposed for y = x W."""

    is_transposed = False

    def per_sample(self, rows: slice = slice(None)) -> Tensor:
        a, b = _at_full_precision(self.inputs[rows], self.outputs[rows])
        return torch.bmm(a.mT, b) if self.is_transposed else torch.bmm(b.mT, a)

    def squared_norms(self) -> Tensor:
        _, places, d = self.inputs.shape
        p = self.outputs.shape[-1]
        a, b = _at_full_precision(self.inputs, self.outputs)
        if places == 1:
            return a[:, 0].square().sum(1) * b[:, 0].square().sum(1)
        if places * (p + d) <= p * d:
            return (torch.bmm(a, a.mT) * torch.bmm(b, b.mT)).sum((1, 2))
        return super().squared_norms()

    def weighted_sum(self, weights: Tensor) -> Tensor:
        a, b = _at_full_precision(self.inputs, self.outputs)
        a, b = _weighted(a, b, weights)
        a, b = a.flatten(0, 1), b.flatten(0, 1)
        return a.mT @ b if self.is_transposed else b.mT @ a


class TransposedLinearPiece(LinearPiece):
    """Of y = x W."""

    is_transposed = True


class EmbeddingPiece(_OfOperands):
    """Of a table looked up: ``inputs [B, T]`` row numbers, ``outputs [B, T, d]``, owner ``[V, d]``."""

    def per_sample(self, rows: slice = slice(None)) -> Tensor:
        tokens, (b,) = self.inputs[rows], _at_full_precision(self.outputs[rows])
        found = b.new_zeros(len(tokens), *self.owner.shape)
        return found.scatter_add_(1, tokens[..., None].expand_as(b), b)

    def squared_norms(self) -> Tensor:
        (b,) = _at_full_precision(self.outputs)
        if self.inputs.shape[1] == 1:
            return b[:, 0].square().sum(1)
        is_same = self.inputs[:, :, None] == self.inputs[:, None, :]
        return (torch.bmm(b, b.mT) * is_same).sum((1, 2))

    def doubt(self) -> Tensor | float:
        (b,) = _at_full_precision(self.outputs)
        places = self.inputs.shape[1]
        return _ROUNDINGS * torch.finfo(b.dtype).eps * (places if places > 1 else 0) * _rows(b).square().sum(1)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        (b,) = _at_full_precision(self.outputs)
        found = b.new_zeros(self.owner.shape)
        return found.index_add_(0, self.inputs.flatten(), (b * weights.to(b.dtype)[:, None, None]).flatten(0, 1))

    def without(self, is_left_out: Tensor) -> Piece:
        return self._with(self.inputs, _emptied(self.outputs, is_left_out))


class ConvolutionPiece(_OfOperands):
    """Of a convolution or its transpose: ``inputs [B, c, …]``, ``outputs [B, p, …]``.

    Args:
        owner: The kernel.
        inputs: What was convolved; for a transpose, the gradients of what came out.
        outputs: The gradients of what came out; for a transpose, what went in.
        geometry: How the kernel moves.
    """

    def __init__(self, owner: Tensor, inputs: Tensor, outputs: Tensor, geometry: Geometry) -> None:
        super().__init__(owner, inputs, outputs)
        self._geometry = geometry

    def per_sample(self, rows: slice = slice(None)) -> Tensor:
        a, b = _at_full_precision(self.inputs[rows], self.outputs[rows])
        return self._geometry.each_gradient(a, b, self.owner.detach())

    def squared_norms(self) -> Tensor:
        a, b = _at_full_precision(self.inputs, self.outputs)
        found = self._geometry.squared_norms(a, b, self.owner)
        return super().squared_norms() if found is None else found

    def _overlaps(self) -> int:
        return self.owner[0, 0].numel()

    def weighted_sum(self, weights: Tensor) -> Tensor:
        a, b = _at_full_precision(self.inputs, self.outputs)
        return self._geometry.weight_gradient(*_weighted(a, b, weights), self.owner.detach())

    def _with(self, inputs: Tensor, outputs: Tensor) -> Piece:
        return ConvolutionPiece(self.owner, inputs, outputs, self._geometry)


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Fewer pieces with the same sum: uses of one matrix are one use with the places of both."""
    groups: dict[tuple[type, Any], list[Piece]] = {}
    for piece in pieces:
        kind: Any = type(piece)
        is_mergeable = isinstance(piece, LinearPiece | EmbeddingPiece)
        groups.setdefault((kind, None if is_mergeable or kind is Piece else id(piece)), []).append(piece)
    found: list[Piece] = []
    for (kind, _), group in groups.items():
        if len(group) == 1:
            found.append(group[0])
        elif kind is Piece:
            total = group[0].per_sample().clone()
            for piece in group[1:]:
                total += piece.per_sample()
            found.append(Piece(group[0].owner, total))
        else:
            operands: Any = group
            inputs = torch.cat([each.inputs for each in operands], 1)
            found.append(kind(group[0].owner, inputs, torch.cat([each.outputs for each in operands], 1)))
    return found


def squared_norms(pieces: Sequence[Piece]) -> Tensor:
    """‖Σ_k g_i^k‖² of pieces with one owner, ``[B]``: never less than it is, since too little would be clipped then."""
    total = _measured(pieces)
    for piece in pieces:
        total = total + len(pieces) * piece.doubt()
    return total


def _measured(pieces: Sequence[Piece]) -> Tensor:
    if len(pieces) == 1:
        return pieces[0].squared_norms()
    if len(pieces) == 2 and {type(each) for each in pieces} == {EmbeddingPiece, LinearPiece}:
        looked_up, projected = sorted(pieces, key=lambda each: isinstance(each, LinearPiece))
        return looked_up.squared_norms() + projected.squared_norms() + 2 * _inner(looked_up, projected)

    def total(rows: slice) -> Tensor:
        found = pieces[0].per_sample(rows).clone()
        for piece in pieces[1:]:
            found += piece.per_sample(rows)
        return found

    return _norms_in_chunks(total, pieces[0].count, pieces[0].owner.numel())


def _inner(looked_up: Any, projected: Any) -> Tensor:
    """⟨g_i, g'_i⟩ of a table that is looked up and the same table as a projection (tied embeddings)."""
    a, b = _at_full_precision(projected.inputs, projected.outputs)
    (d,) = _at_full_precision(looked_up.outputs)
    # b at the rows that were looked up, [B, T', T], against the products of the hidden states.
    at_tokens = b.gather(2, looked_up.inputs[:, None, :].expand(-1, b.shape[1], -1))
    return (at_tokens * torch.bmm(a, d.mT)).sum((1, 2))


def weighted_sum(pieces: Sequence[Piece], weights: Tensor) -> Tensor:
    """Σ_i c_i Σ_k g_i^k of pieces with one owner."""
    total = pieces[0].weighted_sum(weights)
    for piece in pieces[1:]:
        total = total + piece.weighted_sum(weights)
    return total


def _norms_in_chunks(gradients: Callable[[slice], Tensor], count: int, size: int) -> Tensor:
    step = max(1, _MOST_AT_ONCE // max(size, 1))
    parts = [_rows(gradients(slice(i, i + step))).square().sum(1) for i in range(0, count, step)]
    return torch.cat(parts)


def _rows(gradients: Tensor) -> Tensor:
    """``[B, n]``: each sample's numbers in a row."""
    return gradients.reshape(len(gradients), gradients[0].numel() if len(gradients) else 0)


def _at_full_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In float32 at least: half a norm's digits would be lost in half precision."""
    dtypes = {each.dtype for each in tensors}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    return tuple(each.to(dtype) for each in tensors)


def _weighted(a: Tensor, b: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The operands of a product, the smaller of which carries the weights of the samples."""
    is_first = a.numel() < b.numel()
    smaller = a if is_first else b
    weighted = smaller * weights.to(smaller.dtype).view(-1, *[1] * (smaller.dim() - 1))
    return (weighted, b) if is_first else (a, weighted)


def _emptied(tensor: Tensor, is_left_out: Tensor) -> Tensor:
    # Not a product: zero times infinity is not a number.
    return torch.where(is_left_out.view(-1, *[1] * (tensor.dim() - 1)), tensor.new_zeros(()), tensor)
