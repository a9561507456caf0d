"""Signs, and one number for their size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lightrail.federated.compressor import Compressor
from lightrail.traits import Traits
from lightrail_federated.compressors.message import checked_parts, checked_vector
from lightrail_federated.compressors.packing import packed, packed_bytes, unpacked

__all__ = ["Sign", "mean_size"]


def mean_size(x: Tensor) -> Tensor:
    """‖x‖₁ / d, ``[1]`` in the type of x, without overflow on the way.

    Example:
        >>> mean_size(torch.tensor([1.0, -3.0]))
        tensor([2.])
    """
    largest = x.abs().max()
    return (largest * (x.abs() / largest).double().mean()).to(x.dtype).reshape(1) if largest else x.new_zeros(1)


class Sign(Compressor):
    r"""Sends a bit for each sign, and the mean size of the entries.

    .. math:: C(x) = \frac{\|x\|_1}{d} \operatorname{sign}(x), \qquad
        \|C(x) - x\|^2 = \Big(1 - \frac{\|x\|_1^2}{d \|x\|_2^2}\Big) \|x\|^2

    with sign(0) = 1, so that one bit is enough. Bytes: ⌈d/8⌉, and 4 (8 in float64) for the mean size. No vector does
    worse than δ = 1/d, which is that of a vector with one entry that is not zero.

    Example:
        >>> encoded = Sign().compress(torch.tensor([1.0, -3.0, 2.0]), torch.Generator())
        >>> encoded.nbytes, encoded.decoded().tolist()
        (5, [2.0, -2.0, 2.0])

    Reference:
        S. P. Karimireddy, Q. Rebjock, S. U. Stich and M. Jaggi (2019), Error Feedback Fixes SignSGD and other Gradient
        Compression Schemes, ICML, arXiv 1901.09847, algorithm 1 and lemma 8.
    """

    traits: ClassVar[Traits] = Traits(
        rule="C(x) = (‖x‖₁ / d) sign(x)",
        paper="S. P. Karimireddy, Q. Rebjock, S. U. Stich, M. Jaggi, 2019, Error Feedback Fixes SignSGD and other "
        "Gradient Compression Schemes, arXiv 1901.09847",
    )
    is_unbiased = False
    is_contractive = True

    def encode(self, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        x = checked_vector(x)
        return {"signs": packed((x >= 0).long(), 1), "size": mean_size(x)}

    def decode(self, parts: Mapping[str, Tensor], size: int, dtype: torch.dtype) -> Tensor:
        signs, scale = checked_parts(parts, signs=(torch.uint8, packed_bytes(size, 1)), size=(dtype, 1))
        if float(scale) < 0:
            raise ValueError(f"the mean size of entries is {float(scale)}, below 0")
        return torch.where(unpacked(signs, size, 1).bool(), scale, -scale)

    def contraction(self, size: int) -> float:
        return 1 / size
