"""The gradients that a transform edits."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from lightrail_optimizers.tensor_lists import refuse_sparse

__all__ = ["dense_gradients"]


def dense_gradients(method: str, params: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that have entries and a gradient, and these gradients.

    Args:
        method: The transform's name, for the error.
        params: All parameters.

    Raises:
        ConfigurationError: A gradient is sparse.

    Example:
        >>> import torch
        >>> w, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
        >>> (w * 3).sum().backward()
        >>> dense_gradients("mine", [w, unused])[1]
        [tensor([3., 3.])]
    """
    moving: list[Tensor] = []
    gradients: list[Tensor] = []
    for p in params:
        g = p.grad
        if g is None or g.numel() == 0:
            continue
        if g.is_sparse:
            refuse_sparse(method, g)
        moving.append(p)
        gradients.append(g)
    return moving, gradients
