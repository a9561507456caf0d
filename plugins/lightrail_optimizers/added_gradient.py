"""A second gradient on top of the one that is there: penalties and constraints."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightrail_optimizers.tensor_lists import add_scaled_, refuse_sparse

__all__ = ["add_gradient_"]


def add_gradient_(method: str, params: Sequence[Tensor], g: Sequence[Tensor], by: float) -> None:
    """``.grad += by g``, in place; what has no gradient gets one only where ``g`` is not zero.

    Args:
        method: The transform's name, for errors.
        params: Parameters, under ``torch.no_grad``.
        g: What ``closure.gradient_of`` gave: one tensor a parameter, zeros where there is nothing.
        by: Its factor.

    Raises:
        ConfigurationError: A gradient is sparse.

    Example:
        >>> import torch
        >>> p, q = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.ones(2)
        >>> add_gradient_("vat", [p, q], [torch.ones(2), torch.zeros(2)], 0.5)
        >>> p.grad.tolist(), q.grad
        ([1.5, 1.5], None)
    """
    there, more = [], []
    for p, g_i in zip(params, g, strict=True):
        for gradient in (p.grad, g_i):
            if gradient is not None and gradient.is_sparse:
                refuse_sparse(method, gradient)
        if p.grad is not None:
            there.append(p.grad)
            more.append(g_i)
        elif p.requires_grad and bool(g_i.any()):
            p.grad = g_i * by
    if there:
        add_scaled_(there, more, by)
