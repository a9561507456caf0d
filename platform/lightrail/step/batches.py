"""Batches of any structure: how many samples they hold, and disjoint parts of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightrail.errors import ClosureError

__all__ = ["leading_size", "split_batch", "split_by_cluster"]


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


def split_by_cluster(batch: Any, clusters: Tensor, count: int) -> list[Any]:
    """The samples of each cluster, in the batch's own structure; what has no sample axis is in every part.

    Args:
        batch: Tensors in tuples, lists and dictionaries, samples along the leading axis.
        clusters: The cluster of each sample, whole numbers from 0 to ``count - 1``.
        count: How many clusters there are.

    Returns:
        ``count`` batches, empty for a cluster without samples here.

    Raises:
        ClosureError: There are not as many clusters as samples, or a number is out of range.

    Example:
        >>> split_by_cluster(torch.tensor([5, 6, 7]), torch.tensor([1, 0, 1]), 2)
        [tensor([6]), tensor([5, 7])]
    """
    size = leading_size(batch)
    if clusters.shape != (size,) or not all(0 <= number < count for number in clusters.tolist()):
        raise ClosureError(
            "the task's clusters do not number the samples of the batch",
            found=f"clusters of shape {tuple(clusters.shape)}, {sorted(set(clusters.flatten().tolist()))[:8]}, "
            f"for a batch of {size}",
            allowed=f"one whole number from 0 to {count - 1} a sample",
            remedy="Set the method's number of clusters to the task's, or mend clusters(batch) of the task.",
        )
    members = [(clusters == cluster).nonzero().flatten() for cluster in range(count)]
    leaves, structure = pytree.tree_flatten(batch)
    has_samples = [isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size for leaf in leaves]
    return [
        pytree.tree_unflatten([x[where] if own else x for x, own in zip(leaves, has_samples, strict=True)], structure)
        for where in members
    ]
