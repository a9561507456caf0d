"""The parameters of a group as one vector, for methods whose matrices run over all of them together.

The vector holds every parameter of the group in row-major order, whether it has a gradient at this step or not, so
that its entries mean the same from step to step. Half-precision parameters make a vector in single precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightrail_optimizers.tensor_lists import refuse_sparse

__all__ = [
    "blocks",
    "clear_missing_",
    "flatten",
    "gradient_vector",
    "move_",
    "state_holder",
    "unflatten",
    "working_dtype",
]


# Of a CPU's cache a core has room for a few vectors of this length, or for a few dozen rows of such a matrix.
_BLOCK = 1 << 16


def blocks(size: int, device: torch.device) -> list[slice]:
    """The indices 0 … ``size`` - 1 in parts that a CPU's cache can hold; one part on an accelerator.

    A chain of operations on one part after the other is one pass over memory, and its temporaries are small.

    Example:
        >>> blocks(100_000, torch.device("cpu"))
        [slice(0, 65536, None), slice(65536, 100000, None)]
    """
    length = _BLOCK if device.type == "cpu" else max(size, 1)
    return [slice(start, min(start + length, size)) for start in range(0, size, length)]


def working_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype to calculate in: the widest among them, and single precision at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """All entries of all tensors as one new vector, on the device of the first.

    Args:
        tensors: Any shapes, strides and dtypes; at least one.

    Returns:
        A vector in :func:`working_dtype`.

    Example:
        >>> flatten([torch.tensor([[1.0, 2.0]]), torch.tensor(3.0)]).tolist()
        [1.0, 2.0, 3.0]
    """
    dtype, device = working_dtype(tensors), tensors[0].device
    out = torch.empty(sum(t.numel() for t in tensors), dtype=dtype, device=device)
    torch._foreach_copy_(_views(out, tensors), [t.detach() for t in tensors])
    return out


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of :func:`flatten`: tensors in the shapes, dtypes and devices of ``like``.

    Those whose dtype and device are the vector's are views of it.

    Example:
        >>> [t.tolist() for t in unflatten(torch.tensor([1.0, 2.0, 3.0]), [torch.zeros(1, 2), torch.zeros(())])]
        [[[1.0, 2.0]], 3.0]
    """
    return [view.to(t.device, t.dtype) for view, t in zip(_views(vector, like), like, strict=True)]


def gradient_vector(method: str, params: Sequence[Tensor]) -> Tensor:
    """The gradients of all parameters as one new vector; zeros stand for a gradient that is missing.

    Args:
        method: The optimizer's name, for errors.
        params: All parameters of a group, at least one.

    Raises:
        ConfigurationError: A gradient is sparse.
    """
    out = torch.empty(sum(p.numel() for p in params), dtype=working_dtype(params), device=params[0].device)
    views, gradients = [], []
    for view, p in zip(_views(out, params), params, strict=True):
        if p.grad is None:
            view.zero_()
        elif p.grad.is_sparse:
            refuse_sparse(method, p.grad)
        else:
            views.append(view)
            gradients.append(p.grad.detach())
    if views:
        torch._foreach_copy_(views, gradients)
    return out


@torch.no_grad()
def clear_missing_(vector: Tensor, params: Sequence[Tensor]) -> None:
    """Zeros, in place, in a vector's entries for parameters without a gradient."""
    for view, p in zip(_views(vector, params), params, strict=True):
        if p.grad is None:
            view.zero_()


@torch.no_grad()
def move_(params: Sequence[Tensor], u: Tensor, by: float) -> None:
    """``x += by u``, in place, for every parameter that has a gradient; the others stay, whatever ``u`` says there.

    Args:
        params: All parameters of a group.
        u: A vector over all of them.
        by: Its factor.
    """
    moving = [(p, view) for p, view in zip(params, _views(u, params), strict=True) if p.grad is not None]
    if moving:
        x = [p for p, _ in moving]
        torch._foreach_add_(x, [view.to(p.device, p.dtype) for p, view in moving], alpha=by)


def state_holder(params: Sequence[Tensor]) -> Tensor:
    """The parameter under which the state of a whole group is kept: the first of the widest dtype.

    ``Optimizer.load_state_dict`` casts state to the dtype of its parameter. Which parameters have a gradient makes no
    difference, so the state is found again when that changes.
    """
    widest = params[0].dtype
    for p in params:
        widest = torch.promote_types(widest, p.dtype)
    return next((p for p in params if p.dtype == widest), params[0])


def _views(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = vector.split([t.numel() for t in like])
    return [part.view(t.shape) for part, t in zip(parts, like, strict=True)]
