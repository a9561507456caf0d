"""Powers of two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lightrail.federated.compressor import Compressor
from lightrail.traits import Traits
from lightrail_federated.compressors.message import checked_parts, checked_vector
from lightrail_federated.compressors.packing import packed, packed_bytes, unpacked

__all__ = ["Natural", "exponent_codes", "of_exponent_codes"]


class _Format(NamedTuple):
    """How a floating point number is laid out."""

    exponent_bits: int
    fraction_bits: int
    integer: torch.dtype


_FORMATS = {torch.float32: _Format(8, 23, torch.int32), torch.float64: _Format(11, 52, torch.int64)}


def exponent_codes(t: Tensor, generator: torch.Generator) -> Tensor:
    r"""Rounds to a neighbouring power of two, such that the mean is right.

    .. math:: |C(t)| = 2^{\lfloor \log_2 |t| \rfloor} \text{ with probability }
        2 - |t| \, 2^{-\lfloor \log_2 |t| \rfloor}, \text{ else } 2^{\lfloor \log_2 |t| \rfloor + 1}

    Args:
        t: ``[d]``, float32 or float64, finite.
        generator: Where random numbers come from.

    Returns:
        int64 ``[d]``: the sign bit and the exponent bits of the floating point number; the exponent 0 stands for 0,
        and what is below the least normal number is rounded to that or to 0.

    Raises:
        ValueError: A number would be rounded out of the range of its type.

    Example:
        >>> exponent_codes(torch.tensor([1.0, -2.0, 0.0]), torch.Generator()).tolist()
        [127, 384, 0]
    """
    form, tiny = _FORMATS[t.dtype], torch.finfo(t.dtype).tiny
    size = t.abs()
    mantissa, exponent = torch.frexp(size)
    is_small = size < tiny
    # size = mantissa · 2^exponent with mantissa in [1/2, 1).
    up = torch.where(is_small, size / tiny, 2 * mantissa - 1)
    lower = torch.where(is_small, 0, exponent.long() + (2 ** (form.exponent_bits - 1) - 2))
    code = lower + (torch.rand(t.shape, dtype=t.dtype, generator=generator) < up)
    if int(code.max()) >= 2**form.exponent_bits - 1:
        raise ValueError(f"{float(size.max()):g} would be rounded to a power of two beyond the range of {t.dtype}")
    return code + ((t < 0).long() << form.exponent_bits)


def of_exponent_codes(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of such codes.

    Args:
        codes: int64 ``[d]``.
        dtype: float32 or float64.

    Raises:
        ValueError: A code stands for infinity or for no number.

    Example:
        >>> of_exponent_codes(torch.tensor([127, 384, 0]), torch.float32).tolist()
        [1.0, -2.0, 0.0]
    """
    form = _FORMATS[dtype]
    exponent = codes & (2**form.exponent_bits - 1)
    if int(exponent.max()) == 2**form.exponent_bits - 1:
        raise ValueError("an exponent stands for infinity")
    size = (exponent << form.fraction_bits).to(form.integer).view(dtype)
    return torch.where(codes >> form.exponent_bits > 0, -size, size)


class Natural(Compressor):
    r"""Rounds each entry at random to a power of two; sends a sign and an exponent in 9 bits.

    .. math:: \mathbb{E} C(x) = x, \qquad \mathbb{E} \|C(x) - x\|^2 \le \tfrac18 \|x\|^2

    Bytes: ⌈9 d / 8⌉, without gaps between entries; ⌈12 d / 8⌉ in float64, whose exponents have 11 bits.

    Deviations:
        Entries below the least normal number (1.2e-38 in float32) are rounded to it or to 0: their mean is right, but
        the bound 1/8 does not hold for them. A power of two beyond the type's range is refused with a ValueError.

    Example:
        >>> encoded = Natural().compress(torch.tensor([1.0, -0.5, 0.0]), torch.Generator())
        >>> encoded.nbytes, encoded.decoded().tolist()
        (4, [1.0, -0.5, 0.0])

    Reference:
        S. Horváth, C.-Y. Ho, Ľ. Horváth, A. N. Sahu, M. Canini and P. Richtárik (2022), Natural Compression for
        Distributed Deep Learning, MSML, arXiv 1905.10988, definition 1 and theorem 1.
    """

    traits: ClassVar[Traits] = Traits(
        rule="C(t) = sign(t) 2^⌊log₂|t|⌋ or twice that, with mean t",
        paper="S. Horváth, C.-Y. Ho, L. Horváth, A. N. Sahu, M. Canini, P. Richtárik, 2022, Natural Compression for "
        "Distributed Deep Learning, arXiv 1905.10988",
        is_stochastic=True,
    )
    is_unbiased = True
    is_contractive = True

    def encode(self, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        x = checked_vector(x)
        return {"codes": packed(exponent_codes(x, generator), _FORMATS[x.dtype].exponent_bits + 1)}

    def decode(self, parts: Mapping[str, Tensor], size: int, dtype: torch.dtype) -> Tensor:
        bits = _FORMATS[dtype].exponent_bits + 1
        (codes,) = checked_parts(parts, codes=(torch.uint8, packed_bytes(size, bits)))
        return of_exponent_codes(unpacked(codes, size, bits), dtype)

    def variance(self, size: int) -> float:
        return 1 / 8

    def contraction(self, size: int) -> float:
        return 7 / 8
