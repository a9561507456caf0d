"""A random choice of entries, whose places are not sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lightrail.federated.compressor import Compressor
from lightrail.options import between
from lightrail.traits import Traits
from lightrail_federated.compressors.message import checked_parts, checked_vector, kept_entries

__all__ = ["RandK", "random_places"]

_SEEDS = 2**63 - 1


def random_places(seed: int, size: int, k: int) -> Tensor:
    """k different places among d, each choice as likely as another; the same for sender and receiver.

    Args:
        seed: From -2⁶³ to 2⁶³ - 1.
        size: d.
        k: At most d.

    Returns:
        int64 ``[k]``.

    Example:
        >>> sorted(random_places(7, 3, 3).tolist())
        [0, 1, 2]
    """
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:k]


class RandK(Compressor):
    r"""Keeps k random entries, enlarged so that the mean is right; sends k numbers and a seed of 8 bytes.

    .. math:: C(x)_i = \tfrac{d}{k} x_i \text{ for } i \in S, \text{ else } 0, \qquad
        \mathbb{E} \|C(x) - x\|^2 = \big(\tfrac{d}{k} - 1\big) \|x\|^2

    with S of size k, uniform among all such sets. The receiver draws S again from the seed.

    Args:
        ratio: k/d, in (0, 1]; k is rounded, and at least 1.

    Raises:
        ConfigurationError: The ratio is out of range.

    Deviations:
        An entry that would leave the range of the type once it is multiplied by d/k is refused with a ValueError.

    Example:
        >>> encoded = RandK(ratio=0.5).compress(torch.ones(4), torch.Generator().manual_seed(0))
        >>> encoded.nbytes, sorted(encoded.decoded().tolist())
        (16, [0.0, 0.0, 2.0, 2.0])

    Reference:
        J. Konečný and P. Richtárik (2018), Randomized Distributed Mean Estimation: Accuracy vs. Communication,
        Frontiers in Applied Mathematics and Statistics 4, arXiv 1611.07555; ω as in A. Beznosikov, S. Horváth,
        P. Richtárik and M. Safaryan (2023), On Biased Compression for Distributed Learning, JMLR 24, arXiv 2002.12410.
    """

    traits: ClassVar[Traits] = Traits(
        rule="C(x)_i = (d/k) x_i on k random places",
        paper="J. Konečný, P. Richtárik, 2018, Randomized Distributed Mean Estimation: Accuracy vs. Communication, "
        "arXiv 1611.07555",
        is_stochastic=True,
        example={"ratio": 0.25},
    )
    is_unbiased = True
    is_contractive = False

    def __init__(self, ratio: float = 0.1) -> None:
        between(0.0, 1.0, closed="right", ratio=ratio)
        self.ratio = ratio

    def encode(self, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        x = checked_vector(x)
        size, k = x.numel(), kept_entries(self.ratio, x.numel())
        seed = torch.randint(_SEEDS, (1,), generator=generator)
        values = x[random_places(int(seed), size, k)] * (size / k)
        return {"values": checked_vector(values), "seed": seed}

    def decode(self, parts: Mapping[str, Tensor], size: int, dtype: torch.dtype) -> Tensor:
        k = kept_entries(self.ratio, size)
        values, seed = checked_parts(parts, values=(dtype, k), seed=(torch.int64, 1))
        out = torch.zeros(size, dtype=dtype)
        out[random_places(int(seed), size, k)] = values
        return out

    def variance(self, size: int) -> float:
        return size / kept_entries(self.ratio, size) - 1
