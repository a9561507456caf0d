"""The kernels of convolutions in one, two and three dimensions, and of their transposes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightrail.sample_gradients.operands import samples_first
from lightrail.sample_gradients.pieces import ConvolutionPiece, Piece
from lightrail.sample_gradients.used import Used

__all__ = ["Geometry", "convolution_pieces", "transposed_convolution_pieces"]

_FEW_PLACES = 64  # below this, products of unfolded patches are faster than a convolution with one group a sample
_WORTH = 1.5  # how many times the memory of the operands a second convolution is worth


@dataclass(frozen=True)
class Geometry:
    """How a kernel moves: one number a dimension each."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    def weight_gradient(self, inputs: Tensor, outputs: Tensor, kernel: Tensor) -> Tensor:
        """The kernel's gradient, summed over samples."""
        return torch.ops.aten.convolution_backward(
            outputs,
            inputs,
            kernel.to(outputs.dtype),
            None,
            list(self.stride),
            list(self.padding),
            list(self.dilation),
            False,
            [0] * len(self.stride),
            self.groups,
            [False, True, False],
        )[1]

    def each_gradient(self, inputs: Tensor, outputs: Tensor, kernel: Tensor) -> Tensor:
        """The same for each sample, ``[B, *kernel.shape]``."""
        count = len(inputs)
        if count == 0:
            return kernel.new_zeros(0, *kernel.shape)
        if self.patches_are_cheap(inputs, outputs):
            return torch.bmm(outputs.flatten(2), self.patches(inputs, kernel).mT).view(count, *kernel.shape)
        each = Geometry(self.stride, self.padding, self.dilation, self.groups * count)
        repeated = kernel.expand(count, *kernel.shape).reshape(-1, *kernel.shape[1:])
        found = each.weight_gradient(_in_channels(inputs), _in_channels(outputs), repeated)
        return found.view(count, *kernel.shape)

    def squared_norms(self, inputs: Tensor, outputs: Tensor, kernel: Tensor) -> Tensor | None:
        """The norms without the gradients, where that is cheaper: Σ_tt' (a_t · a_t')(b_t · b_t') over places."""
        places, p, size = outputs[0, 0].numel() if len(outputs) else 0, outputs.shape[1], kernel[0].numel()
        if not self.patches_are_cheap(inputs, outputs) or places * (p + size) > p * size:
            return None
        a, b = self.patches(inputs, kernel), outputs.flatten(2)
        return (torch.bmm(a.mT, a) * torch.bmm(b.mT, b)).sum((1, 2))

    def patches_are_cheap(self, inputs: Tensor, outputs: Tensor) -> bool:
        """Whether a kernel's patches can be laid out side by side, and are few."""
        return inputs.dim() == 4 and self.groups == 1 and outputs[0, 0].numel() <= _FEW_PLACES

    def patches(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        """``[B, c k, L]``: what the kernel sees at each of the L places."""
        size = tuple(kernel.shape[2:])
        return F.unfold(inputs, size, tuple(self.dilation), tuple(self.padding), tuple(self.stride))


def _in_channels(tensor: Tensor) -> Tensor:
    """One sample with the channels of all."""
    return tensor.reshape(1, -1, *tensor.shape[2:])


def convolution_pieces(used: Used) -> list[Piece] | None:
    """Of ``conv1d``, ``conv2d`` and ``conv3d``."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    x, weight, bias, stride, padding, dilation, groups = _by_name(used, names, (None, None, None, 1, 0, 1, 1))
    dimensions = weight.dim() - 2
    stride, dilation = _each(stride, dimensions), _each(dilation, dimensions)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        x = F.pad(x, [end for t in reversed(total) for end in (t // 2, t - t // 2)])
        padding = 0
    geometry = Geometry(stride, _each(0 if padding == "valid" else padding, dimensions), dilation, groups)
    return _pieces(used, weight, bias, geometry, lambda b: (x, b))


def transposed_convolution_pieces(used: Used) -> list[Piece] | None:
    """Of ``conv_transpose1d``, ``2d`` and ``3d``: a convolution with the two sides exchanged."""
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    x, weight, bias, stride, padding, _, groups, dilation = _by_name(used, names, (None, None, None, 1, 0, 0, 1, 1))
    dimensions = weight.dim() - 2
    geometry = Geometry(_each(stride, dimensions), _each(padding, dimensions), _each(dilation, dimensions), groups)
    return _pieces(used, weight, bias, geometry, lambda b: (b, x))


def _pieces(used: Used, weight: Tensor, bias: Tensor | None, geometry: Geometry, sides: Any) -> list[Piece] | None:
    out = used.call.outputs[0]
    is_plain = all(axis is None or (axis.axis == 0 and axis.rows == 1) for axis in (*used.axes.values(), out))
    if not is_plain or out is None or used.gradients[0].dim() != weight.dim():
        return None
    b = used.gradients[0]
    found: list[Piece] = []
    if (owner := used.owner_at(weight)) is not None:
        inputs, outputs = sides(b)
        if inputs is b:
            outputs = outputs.to(b.dtype)
        else:
            inputs = inputs.to(b.dtype)
        piece = ConvolutionPiece(owner, inputs, outputs, geometry)
        kept = inputs.numel() + outputs.numel()
        small = piece.count * owner.numel() < _WORTH * kept
        found.append(Piece(owner, piece.per_sample()) if small else piece)
    if bias is not None and (owner := used.owner_at(bias)) is not None:
        found.append(Piece(owner, samples_first(b, out)[:, 0].flatten(2).sum(2)))
    return found if len(found) == len(used.owners) else None


def _by_name(used: Used, names: Sequence[str], defaults: Sequence[Any]) -> list[Any]:
    args, kwargs = used.arguments()
    given = dict(zip(names, args, strict=False)) | kwargs
    return [given.get(name, default) for name, default in zip(names, defaults, strict=True)]


def _each(value: Any, dimensions: int) -> list[int]:
    values = [value] * dimensions if isinstance(value, int) else list(value)
    return values * dimensions if len(values) == 1 else values
