"""Gradients at points around the current one, and sums over lists of tensors that wait for nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightrail.step import Closure
from lightrail.step.sharded import is_shard, whole_of
from lightrail_optimizers.closure_answers import answers_for, points_of, wide
from lightrail_optimizers.tensor_lists import refuse_complex, refuse_sparse

__all__ = ["dot", "gradient_at", "put_gradients", "scaled", "with_gradient"]


def with_gradient(method: str, closure: Closure) -> list[Tensor]:
    """The parameters that have a gradient; only these are moved.

    Args:
        method: Its name, for errors.
        closure: Whose parameters.

    Raises:
        ConfigurationError: A parameter is complex, or a gradient sparse.
    """
    x = [p for p in closure.params if p.grad is not None]
    refuse_complex(method, x)
    for p in x:
        if p.grad is not None and p.grad.is_sparse:
            refuse_sparse(method, p.grad)
    return x


def gradient_at(closure: Closure, x: Sequence[Tensor], points: Sequence[Tensor]) -> list[Tensor]:
    """The gradient by ``x`` where x is at ``points``, in single precision at least; ``.grad`` stays as it was."""
    with closure.at(points_of(closure, x, points)):
        _, found = closure.gradient()
    return wide(answers_for(x, closure, found))


def put_gradients(x: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Puts each into its parameter's ``.grad``, in the parameter's dtype."""
    for p, gradient in zip(x, gradients, strict=True):
        p.grad = gradient.to(p.dtype)


def scaled(tensors: list[Tensor], by: Tensor) -> list[Tensor]:
    """Each times a 0-d tensor, as new tensors.

    Example:
        >>> scaled([torch.tensor([1.0, 2.0]), torch.tensor(3.0)], torch.tensor(2.0))
        [tensor([2., 4.]), tensor(6.)]
    """
    if tensors and all(t.device == by.device for t in tensors):
        return list(torch._foreach_mul(tensors, by))
    return [t * by.to(t.device) for t in tensors]


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The inner product of two lists as vectors, as a 0-d tensor on the device of the first; 0 where there is nothing.

    Example:
        >>> dot([torch.tensor([1.0, 2.0]), torch.tensor(3.0)], [torch.tensor([1.0, 1.0]), torch.tensor(2.0)])
        tensor(9.)
    """
    if not a:
        return torch.zeros(())
    parts = [_dot(x, y) for x, y in zip(wide(a), wide(b), strict=True)]
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return whole_of((x * y).sum()) if is_shard(x) else torch.dot(x.flatten(), y.flatten())
