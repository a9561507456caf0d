"""Nothing is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lightrail.federated.compressor import Compressor
from lightrail.traits import Traits
from lightrail_federated.compressors.message import checked_parts, checked_vector

__all__ = ["Identity"]


class Identity(Compressor):
    """Sends the vector as it is, in d numbers.

    Example:
        >>> encoded = Identity().compress(torch.tensor([0.1, 2.0]), torch.Generator())
        >>> encoded.nbytes, encoded.decoded()
        (8, tensor([0.1000, 2.0000]))
    """

    traits: ClassVar[Traits] = Traits(rule="C(x) = x")
    is_unbiased = True
    is_contractive = True

    def encode(self, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {"values": checked_vector(x).clone()}

    def decode(self, parts: Mapping[str, Tensor], size: int, dtype: torch.dtype) -> Tensor:
        (values,) = checked_parts(parts, values=(dtype, size))
        return values.clone()

    def variance(self, size: int) -> float:
        return 0.0

    def contraction(self, size: int) -> float:
        return 1.0
