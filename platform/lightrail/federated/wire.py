"""What crosses between server and clients: tensors by name, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightrail.federated.compressor import Compressor, Encoded

__all__ = ["FORGET", "Payload", "Wire", "compressed_names", "decoded", "nbytes", "packed", "unpacked"]

Wire = dict[str, Tensor]
"""Tensors by name, on the processor."""

Payload = Mapping[str, Tensor | Encoded]
"""What a method sends: vectors by name, as they are or compressed."""

FORGET = "forget"
"""In a message: the server has nothing of what it is told the changes of."""

_PART = ":"


def packed(payload: Payload) -> Wire:
    """The tensors of a payload, those of a compressed vector under its name.

    Example:
        >>> list(packed({"update": torch.zeros(2)}))
        ['update']
    """
    wire: Wire = {}
    for name, value in payload.items():
        if isinstance(value, Encoded):
            wire |= {f"{name}{_PART}{part}": tensor for part, tensor in value.parts.items()}
        else:
            wire[name] = value.detach().cpu()
    return wire


def unpacked(wire: Wire, compressor: Compressor | None, size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The vectors of a payload that arrived.

    Args:
        wire: What arrived.
        compressor: Whose parts they are.
        size: Entries of a compressed vector.
        dtype: Of a compressed vector.

    Raises:
        ValueError: Parts that no compressor made, or that do not make a vector.
    """
    vectors = {name: value for name, value in wire.items() if _PART not in name}
    encoded: dict[str, Wire] = {}
    for name in wire.keys() - vectors.keys():
        vector, _, part = name.partition(_PART)
        encoded.setdefault(vector, {})[part] = wire[name]
    for name, parts in encoded.items():
        if compressor is None:
            raise ValueError(f"'{name}' is compressed, and this run compresses nothing")
        try:
            vectors[name] = compressor.decode(parts, size, dtype)
        except (KeyError, RuntimeError, IndexError, TypeError) as error:
            raise ValueError(f"'{name}' cannot be decoded: {error}") from error
    return vectors


def compressed_names(wire: Wire) -> frozenset[str]:
    """Which vectors of a payload are compressed."""
    return frozenset(name.partition(_PART)[0] for name in wire if _PART in name)


def decoded(payload: Payload) -> dict[str, Tensor]:
    """The vectors of a payload, as who receives it finds them."""
    return {name: value.decoded() if isinstance(value, Encoded) else value for name, value in payload.items()}


def nbytes(wire: Wire) -> int:
    """Bytes of the tensors; names and framing, which depend on who carries them, are not counted."""
    return sum(tensor.nbytes for tensor in wire.values())
