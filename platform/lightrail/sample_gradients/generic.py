"""From the uses of parameters to pieces: the common operations by their formulas, any other sample by sample."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lightrail.sample_gradients.convolution import convolution_pieces, transposed_convolution_pieces
from lightrail.sample_gradients.operands import RECURRENT, Axis, cannot_separate, samples_first
from lightrail.sample_gradients.pieces import EmbeddingPiece, LinearPiece, Piece, TransposedLinearPiece
from lightrail.sample_gradients.used import Used

__all__ = ["RULES", "Used", "pieces_of"]


def pieces_of(used: Used) -> list[Piece]:
    """What the gradients of a use's samples are, for each parameter in it.

    Raises:
        CompositionError: The samples cannot be told apart.
    """
    used.check_untouched()
    rule = RULES.get(used.call.func)
    found = rule(used) if rule is not None else None
    return _sample_by_sample(used) if found is None else found


def _front(tensor: Tensor, axis: Axis) -> Tensor:
    """``[B, T, d]``: the places of each sample in a row, the last axis kept."""
    first = samples_first(tensor, axis)
    return first.reshape(first.shape[0], -1, first.shape[-1])


def _linear(used: Used) -> list[Piece] | None:
    args, kwargs = used.arguments()
    operands: list[Any] = [*args, *(kwargs.get(name) for name in ("input", "weight", "bias")[len(args) :])]
    x, weight, bias = operands
    axis, out = used.axis_of(x), used.call.outputs[0]
    if axis is None or out is None or axis.axis == x.dim() - 1:
        return None
    b = _front(used.gradients[0], out)
    found: list[Piece] = []
    if (owner := used.owner_at(weight)) is not None:
        found.append(smaller(LinearPiece(owner, _front(x, axis), b)))
    if bias is not None and (owner := used.owner_at(bias)) is not None:
        found.append(Piece(owner, b.sum(1)))
    return found if len(found) == len(used.owners) else None


def _matmul(used: Used) -> list[Piece] | None:
    x, weight = used.arguments()[0]
    axis, out = used.axis_of(x), used.call.outputs[0]
    owner = used.owner_at(weight)
    if axis is None or out is None or owner is None or owner.dim() != 2 or axis.axis == x.dim() - 1 or x.dim() < 2:
        return None
    return [smaller(TransposedLinearPiece(owner, _front(x, axis), _front(used.gradients[0], out)))]


def _embedding(used: Used) -> list[Piece] | None:
    args, kwargs = used.arguments()
    weight, tokens = args[0], args[1]
    padding = args[2] if len(args) > 2 else kwargs.get("padding_idx", -1)
    by_frequency = args[3] if len(args) > 3 else kwargs.get("scale_grad_by_freq", False)
    axis, out, owner = used.axis_of(tokens), used.call.outputs[0], used.owner_at(weight)
    if by_frequency:
        raise cannot_separate("an embedding with scale_grad_by_freq, which counts tokens over the whole batch")
    if axis is None or out is None or owner is None:
        return None
    index, b = samples_first(tokens, axis), samples_first(used.gradients[0], out)
    index, b = index.reshape(len(index), -1), b.reshape(len(b), -1, b.shape[-1])
    if padding is not None and padding >= 0:
        b = torch.where((index == padding)[..., None], b.new_zeros(()), b)
    return [EmbeddingPiece(owner, index, b)]


def _normalisation(used: Used, *, weight: int, bias: int | None, is_of_channels: bool) -> list[Piece] | None:
    """y = x̂ ⊙ w + β: the gradients are sums over places of b ⊙ x̂ and of b.

    Args:
        used: The use.
        weight: Which argument w is.
        bias: Which argument β is.
        is_of_channels: Whether w has one number a channel (the axis after the samples), else one for each of the last
            axes.
    """
    args = list(used.arguments()[0])
    axis, out = used.axis_of(args[0]), used.call.outputs[0]
    w = args[weight]
    if axis is None or out is None or axis.axis != 0 or out.axis != 0:
        return None
    beta = None if bias is None else args[bias]
    args[weight] = None
    if bias is not None:
        args[bias] = None
    # Groups of one sample never see another, except where statistics of the batch were asked for: those are refused.
    normalised = used.func(*args)
    b = used.gradients[0]

    def gradient(of: Tensor, owner: Tensor) -> Piece:
        found = samples_first(of, out)
        if is_of_channels:
            return Piece(owner, found.movedim(2, -1).flatten(1, -2).sum(1))
        kept = owner.dim()
        return Piece(owner, found.flatten(1, found.dim() - kept - 1).sum(1))

    found: list[Piece] = []
    if w is not None and (owner := used.owner_at(w)) is not None:
        product = normalised.mul_(b) if normalised.dtype == b.dtype else b * normalised
        found.append(gradient(product, owner))
    if beta is not None and (owner := used.owner_at(beta)) is not None:
        found.append(gradient(b, owner))
    return found if len(found) == len(used.owners) else None


def _batch_norm(used: Used) -> list[Piece] | None:
    if used.arguments()[0][5]:
        raise cannot_separate("a BatchNorm in training mode, which normalises each sample by the others")
    return None


def _spread(used: Used) -> list[Piece] | None:
    """A parameter that is repeated along the samples: each has its own copy."""
    ((owner,), out) = used.owners.values(), used.call.outputs[0]
    if out is None or len(used.call.outputs) != 1:
        return None
    b = samples_first(used.gradients[0], out).movedim(1, out.axis + 1)
    try:
        return [Piece(owner, torch.stack([each.sum_to_size(owner.shape) for each in b]))]
    except RuntimeError as error:
        raise cannot_separate(f"{used.name}, which repeats a parameter for every sample") from error


def smaller(piece: LinearPiece) -> Piece:
    """The piece, or the gradients themselves where they take less memory than what they are the product of."""
    kept = piece.inputs.numel() + piece.outputs.numel()
    return Piece(piece.owner, piece.per_sample()) if piece.count * piece.owner.numel() < kept else piece


def _sample_by_sample(used: Used) -> list[Piece]:
    """Differentiates the operation itself, for all samples at once with :func:`torch.func.vmap`."""
    outputs = used.call.outputs
    where = [i for i, axis in used.axes.items() if axis is not None]
    if not where:
        found = _spread(used) if len(used.owners) == 1 else None
        if found is None:
            raise cannot_separate(f"{used.name}, where a parameter meets no sample and yet gives one result for each")
        return found
    differentiable = [j for j, (_, dtype) in enumerate(used.outputs) if dtype.is_floating_point]
    if any(outputs[j] is None for j in differentiable):
        raise cannot_separate(f"{used.name}, which joins the samples")
    axes = {i: axis for i in where if (axis := used.axes[i]) is not None}
    out_axes = [axis for j in differentiable if (axis := outputs[j]) is not None]
    owners = list(used.owners)
    grads = [_gradient_or_zeros(used, j) for j in differentiable]

    def of_one(samples: Sequence[Tensor], received: Sequence[Tensor]) -> tuple[Tensor, ...]:
        def evaluate(*params: Tensor) -> tuple[Tensor, ...]:
            leaves = list(used.leaves)
            for i, p in zip(owners, params, strict=True):
                leaves[i] = p
            for i, sample in zip(axes, samples, strict=True):
                leaves[i] = sample
            args, kwargs = used.arguments(leaves)
            found = pytree.tree_leaves(used.func(*args, **kwargs))
            return tuple(found[j] for j in differentiable)

        _, pull_back, *_ = torch.func.vjp(evaluate, *(used.leaves[i] for i in owners))
        return pull_back(tuple(received))

    samples = [samples_first(used.leaves[i], axis).movedim(1, axis.axis + 1) for i, axis in axes.items()]
    received = [samples_first(b, axis).movedim(1, axis.axis + 1) for b, axis in zip(grads, out_axes, strict=True)]
    try:
        with torch.no_grad(), _kernels_for_many(used.call.func):
            gradients = torch.func.vmap(of_one)(samples, received)
    except RuntimeError as error:
        raise cannot_separate(f"{used.name}: {str(error).splitlines()[0][:160]}") from error
    return [Piece(used.owners[i], gradient) for i, gradient in zip(owners, gradients, strict=True)]


@contextmanager
def _kernels_for_many(func: Any) -> Iterator[None]:
    """The fused kernels of recurrent layers cannot be evaluated for many samples at once; the plain ones can."""
    if func not in RECURRENT:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*TF32.*")  # setting one flag sets others, which warn
        with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False):
            yield


def _gradient_or_zeros(used: Used, index: int) -> Tensor:
    received = used.gradients.get(index)
    shape, dtype = used.outputs[index]
    device = next(iter(used.gradients.values())).device
    return torch.zeros(shape, dtype=dtype, device=device) if received is None else received


_layer_norm = partial(_normalisation, weight=2, bias=3, is_of_channels=False)
_rms_norm = partial(_normalisation, weight=2, bias=None, is_of_channels=False)
_group_norm = partial(_normalisation, weight=2, bias=3, is_of_channels=True)
_instance_norm = partial(_normalisation, weight=1, bias=2, is_of_channels=True)

RULES: dict[Any, Callable[[Used], list[Piece] | None]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    torch.embedding: _embedding,
    torch.layer_norm: _layer_norm,
    torch.rms_norm: _rms_norm,
    torch.group_norm: _group_norm,
    torch.instance_norm: _instance_norm,
    torch.batch_norm: _batch_norm,
    torch.conv1d: convolution_pieces,
    torch.conv2d: convolution_pieces,
    torch.conv3d: convolution_pieces,
    torch.conv_transpose1d: transposed_convolution_pieces,
    torch.conv_transpose2d: transposed_convolution_pieces,
    torch.conv_transpose3d: transposed_convolution_pieces,
}
