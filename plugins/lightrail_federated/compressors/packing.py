"""Whole numbers in as many bits as they need."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["packed", "packed_bytes", "unpacked"]

# Numbers that are worked on at once: a multiple of eight, so that each lot ends with a byte.
_LOT = 1 << 17


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that so many numbers take: ⌈count · bits / 8⌉.

    Example:
        >>> packed_bytes(3, 9)
        4
    """
    return -(-count * bits // 8)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Numbers one behind the other without gaps, the highest bit first; zeros fill the last byte.

    Args:
        codes: ``[n]``, whole numbers in [0, 2^bits), n ≥ 1.
        bits: Of one number, from 1 to 16.

    Returns:
        uint8 ``[⌈n · bits / 8⌉]``.

    Example:
        >>> packed(torch.tensor([1, 0, 1, 1]), 1).tolist(), packed(torch.tensor([3, 1]), 4).tolist()
        ([176], [49])
    """
    shifts = np.arange(bits - 1, -1, -1)
    numbers = codes.numpy()
    lots = []
    for first in range(0, len(numbers), _LOT):
        digits = numbers[first : first + _LOT, None] >> shifts & 1
        lots.append(np.packbits(digits.astype(np.uint8)))
    return torch.from_numpy(np.concatenate(lots))


def unpacked(packed: Tensor, count: int, bits: int) -> Tensor:
    """The numbers that were packed.

    Args:
        packed: uint8 ``[⌈n · bits / 8⌉]``.
        count: n.
        bits: Of one number, from 1 to 16.

    Returns:
        int64 ``[n]``.

    Raises:
        ValueError: The bits that fill the last byte are not zero.

    Example:
        >>> unpacked(torch.tensor([49], dtype=torch.uint8), 2, 4).tolist()
        [3, 1]
    """
    weights = 1 << np.arange(bits - 1, -1, -1)
    data, lot_bytes = packed.numpy(), _LOT * bits // 8
    if len(packed) * 8 > count * bits and data[-1] & ((1 << (len(packed) * 8 - count * bits)) - 1):
        raise ValueError("the bits behind the last number are not zero")
    lots = []
    for lot, first in enumerate(range(0, len(data), lot_bytes)):
        here = min(_LOT, count - lot * _LOT)
        digits = np.unpackbits(data[first : first + lot_bytes], count=here * bits)
        lots.append(digits.reshape(here, bits) @ weights)
    return torch.from_numpy(np.concatenate(lots))
