"""Compressors: a vector in fewer bytes, in the wire format that the bytes are counted in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["Compressor", "Encoded"]


class Compressor:
    """C: R^d → R^d, as a sender and a receiver: subclass it, and override :meth:`encode` and :meth:`decode`.

    What is encoded is all that crosses the wire, so that the bytes that are counted are those that are sent. The
    receiver knows the compressor, d and the type of the vector.

    Example:
        >>> class Halves(Compressor):
        ...     is_unbiased = is_contractive = False
        ...     def encode(self, x, generator):
        ...         return {"values": x.half()}
        ...     def decode(self, parts, size, dtype):
        ...         return parts["values"].to(dtype)
        >>> encoded = Halves().compress(torch.tensor([0.1, 2.0]), torch.Generator())
        >>> encoded.nbytes, encoded.decoded()[1].item()
        (4, 2.0)
    """

    is_unbiased: ClassVar[bool]
    """Whether E C(x) = x."""
    is_contractive: ClassVar[bool]
    """Whether E ‖C(x) - x‖² ≤ (1 - δ)‖x‖² with some δ > 0."""

    def encode(self, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """What is sent for a vector.

        Args:
            x: Finite, ``[d]`` with d ≥ 1, float32 or float64.
            generator: Where random numbers come from, on the processor.

        Returns:
            Tensors by name, in the types that they are sent in.
        """
        raise NotImplementedError

    def decode(self, parts: Mapping[str, Tensor], size: int, dtype: torch.dtype) -> Tensor:
        """The vector that was sent.

        Args:
            parts: What :meth:`encode` gave; from a stranger, who may lie: indices are checked.
            size: d.
            dtype: Of the vector.

        Raises:
            ValueError: The parts do not make a vector of this size.
        """
        raise NotImplementedError

    def compress(self, x: Tensor, generator: torch.Generator) -> Encoded:
        """Encodes a vector, and keeps what is needed to decode it."""
        return Encoded(self.encode(x, generator), x.numel(), x.dtype, self)

    def variance(self, size: int) -> float:
        """ω in E ‖C(x) - x‖² ≤ ω‖x‖², of one that is unbiased."""
        raise NotImplementedError

    def contraction(self, size: int) -> float:
        """δ in E ‖C(x) - x‖² ≤ (1 - δ)‖x‖², of one that is contractive; in (0, 1]."""
        raise NotImplementedError


@dataclass(frozen=True)
class Encoded:
    """A vector on its way.

    Args:
        parts: What crosses the wire.
        size: Entries of the vector.
        dtype: Of the vector.
        compressor: Who decodes it.
    """

    parts: Mapping[str, Tensor]
    size: int
    dtype: torch.dtype
    compressor: Compressor

    @property
    def nbytes(self) -> int:
        """Bytes on the wire, without names."""
        return sum(part.nbytes for part in self.parts.values())

    def decoded(self) -> Tensor:
        """C(x), ``[d]``."""
        return self.compressor.decode(self.parts, self.size, self.dtype)
