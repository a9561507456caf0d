"""The largest entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lightrail.federated.compressor import Compressor
from lightrail.options import between
from lightrail.traits import Traits
from lightrail_federated.compressors.message import checked_parts, checked_vector, kept_entries

__all__ = ["TopK", "largest_places"]

_MOST_ENTRIES = 2**31


def largest_places(x: Tensor, k: int) -> Tensor:
    """The places of the k entries that are largest in size; among equal ones those that come first.

    Args:
        x: ``[d]``, finite.
        k: From 1 to d.

    Returns:
        int64 ``[k]``, rising.

    Example:
        >>> largest_places(torch.tensor([1.0, -2.0, 1.0, 1.0]), 3).tolist()
        [0, 1, 2]
    """
    sizes = x.abs()
    smallest = sizes.topk(k, sorted=False).values.min()
    above = sizes > smallest
    ties = (sizes == smallest).nonzero().flatten()[: k - int(above.sum())]
    above[ties] = True
    return above.nonzero().flatten()


class TopK(Compressor):
    r"""Keeps the k entries that are largest in size; sends their places in 4 bytes each, and k numbers.

    .. math:: \|C(x) - x\|^2 \le \big(1 - \tfrac{k}{d}\big) \|x\|^2

    Args:
        ratio: k/d, in (0, 1]; k is rounded, and at least 1.

    Raises:
        ConfigurationError: The ratio is out of range.

    Example:
        >>> encoded = TopK(ratio=0.5).compress(torch.tensor([1.0, -3.0, 0.5, 2.0]), torch.Generator())
        >>> encoded.nbytes, encoded.decoded().tolist()
        (16, [0.0, -3.0, 0.0, 2.0])

    Reference:
        D. Alistarh, T. Hoefler, M. Johansson, S. Khirirat, N. Konstantinov and C. Renggli (2018), The Convergence of
        Sparsified Gradient Methods, NeurIPS, arXiv 1809.10505; δ = k/d as in S. U. Stich, J.-B. Cordonnier and
        M. Jaggi (2018), Sparsified SGD with Memory, NeurIPS, arXiv 1809.07599, lemma A.1.
    """

    traits: ClassVar[Traits] = Traits(
        rule="C(x)_i = x_i on the k places with the largest |x_i|",
        paper="S. U. Stich, J.-B. Cordonnier, M. Jaggi, 2018, Sparsified SGD with Memory, arXiv 1809.07599",
        example={"ratio": 0.25},
    )
    is_unbiased = False
    is_contractive = True

    def __init__(self, ratio: float = 0.1) -> None:
        between(0.0, 1.0, closed="right", ratio=ratio)
        self.ratio = ratio

    def encode(self, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        x = checked_vector(x)
        if x.numel() > _MOST_ENTRIES:
            raise ValueError(f"places are sent in 32 bits, which do not tell {x.numel()} entries apart")
        places = largest_places(x, kept_entries(self.ratio, x.numel()))
        return {"values": x[places], "places": places.to(torch.int32)}

    def decode(self, parts: Mapping[str, Tensor], size: int, dtype: torch.dtype) -> Tensor:
        k = kept_entries(self.ratio, size)
        values, places = checked_parts(parts, values=(dtype, k), places=(torch.int32, k))
        if int(places[0]) < 0 or int(places[-1]) >= size or not bool((places[1:] > places[:-1]).all()):
            raise ValueError(f"the places are not rising from 0 to {size - 1}")
        out = torch.zeros(size, dtype=dtype)
        out[places.long()] = values
        return out

    def contraction(self, size: int) -> float:
        return kept_entries(self.ratio, size) / size
