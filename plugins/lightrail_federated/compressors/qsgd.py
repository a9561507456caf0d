"""Levels between zero and the norm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lightrail.federated.compressor import Compressor
from lightrail.options import at_least, between
from lightrail.traits import Traits
from lightrail_federated.compressors.message import checked_parts, checked_vector
from lightrail_federated.compressors.packing import packed, packed_bytes, unpacked

__all__ = ["QSGD", "bucket_norms", "stochastic_levels"]


def bucket_norms(x: Tensor, bucket: int) -> Tensor:
    """‖x‖₂ of each run of so many entries, rounded up, without overflow on the way.

    Args:
        x: ``[d]``, finite.
        bucket: Entries of a bucket, at least 1; the last may have fewer.

    Returns:
        ``[⌈d / bucket⌉]`` in the type of x, none below the true norm.

    Example:
        >>> bucket_norms(torch.tensor([3.0, 4.0, -2.0]), 2)
        tensor([5., 2.])
    """
    rows = torch.nn.functional.pad(x.double(), (0, -len(x) % bucket)).view(-1, bucket)
    largest = rows.abs().amax(1)
    shares = rows / torch.where(largest > 0, largest, 1.0)[:, None]
    exact = largest * torch.linalg.vector_norm(shares, dim=1)
    rounded = exact.to(x.dtype)
    return torch.where(rounded < exact, torch.nextafter(rounded, torch.full_like(rounded, math.inf)), rounded)


def stochastic_levels(x: Tensor, norms: Tensor, s: int, generator: torch.Generator) -> Tensor:
    r"""Rounds s |x_i| / ‖x‖ to a neighbouring whole number, such that the mean is right.

    .. math:: \mathbb{E}\, \ell_i = s \, x_i / \|x\|_2

    Args:
        x: ``[d]``.
        norms: ‖x‖ ``[d]``, the norm that belongs to each entry; where it is 0, so is the level.
        s: Levels above zero, at least 1.
        generator: Where random numbers come from.

    Returns:
        ℓ, int64 ``[d]``, in [-s, s].

    Example:
        >>> stochastic_levels(torch.tensor([1.0, -0.5]), torch.ones(2), 2, torch.Generator()).tolist()
        [2, -1]
    """
    share = torch.where(norms > 0, x.abs().double() / norms.double(), 0.0).clamp(max=1.0) * s
    lower = share.floor()
    up = torch.rand(x.shape, dtype=torch.float64, generator=generator) < share - lower
    return (lower.long() + up) * torch.where(x < 0, -1, 1)


class QSGD(Compressor):
    r"""Rounds each entry at random to one of s levels of the norm, either way.

    .. math:: C(x)_i = \|x\|_2 \operatorname{sign}(x_i) \, \ell_i / s, \qquad
        \mathbb{E} C(x) = x, \qquad \mathbb{E} \|C(x) - x\|^2 \le \min(d/s^2, \sqrt{d}/s) \, \|x\|^2

    Bytes: ⌈d ⌈log₂(2 s + 1)⌉ / 8⌉ for the levels (2 bits an entry with s=1, 4 with s=7, 8 with s=127), without gaps
    between entries, and 4 (8 in float64) for each norm.

    Args:
        levels: s, from 1 to 32767.
        bucket: How many entries share a norm, at least 1; it is the d of the bound. ``None``: all of them.

    Raises:
        ConfigurationError: An option is out of range.

    Deviations:
        Levels are sent with a fixed number of bits, in place of the paper's Elias code. The norm is rounded up to the
        type of the vector before levels are drawn, so that the mean is right and no share is above 1. A norm beyond
        that type is refused with a ValueError.

    Example:
        >>> encoded = QSGD(levels=7).compress(torch.tensor([3.0, -4.0, 0.0]), torch.Generator().manual_seed(0))
        >>> encoded.nbytes, len(encoded.decoded())
        (6, 3)

    Reference:
        D. Alistarh, D. Grubic, J. Li, R. Tomioka and M. Vojnović (2017), QSGD: Communication-Efficient SGD via Gradient
        Quantization and Encoding, NeurIPS, arXiv 1610.02132, section 3.1 and lemma 3.1; buckets: section 4.
    """

    traits: ClassVar[Traits] = Traits(
        rule="C(x)_i = ‖x‖₂ sign(x_i) ℓ_i / s, ℓ_i a neighbour of s |x_i| / ‖x‖₂ with that mean",
        paper="D. Alistarh, D. Grubic, J. Li, R. Tomioka, M. Vojnovic, 2017, QSGD: Communication-Efficient SGD via "
        "Gradient Quantization and Encoding, arXiv 1610.02132",
        is_stochastic=True,
    )
    is_unbiased = True
    is_contractive = False

    def __init__(self, levels: int = 7, bucket: int | None = None) -> None:
        at_least(1, levels=levels)
        between(1, 32767, closed="both", levels=levels)
        if bucket is not None:
            at_least(1, bucket=bucket)
        self.levels, self.bucket = int(levels), bucket
        self.bits = (2 * self.levels).bit_length()

    def encode(self, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        x = checked_vector(x)
        bucket = self._bucket(x.numel())
        norms = bucket_norms(x, bucket)
        if not bool(norms.isfinite().all()):
            raise ValueError(f"the norm of the vector is beyond the range of {x.dtype}")
        levels = stochastic_levels(x, norms.repeat_interleave(bucket)[: x.numel()], self.levels, generator)
        return {"levels": packed(levels + self.levels, self.bits), "norms": norms}

    def decode(self, parts: Mapping[str, Tensor], size: int, dtype: torch.dtype) -> Tensor:
        bucket = self._bucket(size)
        codes, norms = checked_parts(
            parts, levels=(torch.uint8, packed_bytes(size, self.bits)), norms=(dtype, -(-size // bucket))
        )
        levels = unpacked(codes, size, self.bits) - self.levels
        if int(levels.max()) > self.levels:
            raise ValueError(f"a level is {int(levels.max())}, above s = {self.levels}")
        if float(norms.min()) < 0:
            raise ValueError(f"a norm is {float(norms.min())}, below 0")
        return norms.repeat_interleave(bucket)[:size] * (levels.double() / self.levels).to(dtype)

    def variance(self, size: int) -> float:
        d, s = self._bucket(size), self.levels
        return min(d / s**2, math.sqrt(d) / s)

    def _bucket(self, size: int) -> int:
        return size if self.bucket is None else min(self.bucket, size)
