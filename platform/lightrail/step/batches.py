"""Batches of any structure: how many samples they hold, and disjoint parts of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightrail.errors import ClosureError

__all__ = ["leading_size", "split_batch"]


def leading_size(batch: Any) -> int | None:
    """The length of the leading axis of a batch's first tensor; ``None`` where there is no tensor with an axis.

    Example:
        >>> leading_size({"x": torch.zeros(5, 2)})
        5
    """
    leaves = pytree.tree_leaves(batch)
    return next((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0), None)


def split_batch(batch: Any, count: int) -> list[Any]:
    """Disjoint parts of a batch, in its own structure; what has no sample axis is in every part.

    Args:
        batch: Tensors in tuples, lists and dictionaries, samples along the leading axis.
        count: How many parts, at most as many as samples.

    Raises:
        ClosureError: There are fewer samples than parts.

    Example:
        >>> [part["x"].tolist() for part in split_batch({"x": torch.arange(4), "name": "a"}, 2)]
        [[0, 1], [2, 3]]
    """
    leaves, structure = pytree.tree_flatten(batch)
    size = leading_size(batch)
    if size is None or size < count:
        raise ClosureError(
            f"the batch cannot be divided into {count} parts",
            found="no batch" if size is None else f"a micro-batch of {size}",
            allowed=f"at least {count} samples in every micro-batch",
            remedy="Raise data.batch_size, or ask the method for fewer groups."
            if size is not None
            else "Pass the batch to lightrail.Closure rather than closing over it.",
        )
    slices = [
        torch.tensor_split(leaf, count)
        if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size
        else [leaf] * count
        for leaf in leaves
    ]
    return [pytree.tree_unflatten([each[part] for each in slices], structure) for part in range(count)]
