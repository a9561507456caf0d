"""Means that the server learns without learning what went into them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightrail.federated.fixed_point import weighted_mean, with_weight
from lightrail.federated.secure_sum import secure_sum

__all__ = ["secure_mean"]

_MODULUS_BITS = 31


def secure_mean(vectors: Sequence[Tensor], weights: Sequence[float], largest: float) -> Tensor:
    """Σ_k w_k x_k / Σ_k w_k, by masked sums of numbers in fixed point.

    Args:
        vectors: One ``[d]`` a client.
        weights: w_k, in [0, 1].
        largest: Entries of w_k x_k beyond it are clipped to it.

    Returns:
        ``[d]``, in the type of the vectors; one client alone has nobody to hide among, and is its own mean.

    Example:
        >>> import torch
        >>> [round(each, 4) for each in secure_mean([torch.ones(2), torch.zeros(2)], [1.0, 1.0], 8.0).tolist()]
        [0.5, 0.5]
    """
    if len(vectors) == 1:
        return vectors[0]
    bits = _MODULUS_BITS - len(vectors).bit_length()
    sums = [with_weight(x.double(), w) for x, w in zip(vectors, weights, strict=True)]
    threshold = max(2, len(vectors) // 2 + 1)
    total = secure_sum(sums, threshold=threshold, clip=max(largest, 1.0), bits=bits)
    return weighted_mean(total).to(vectors[0].dtype)
