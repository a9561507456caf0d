"""What compressors share: the vector that goes in, and the parts that come from a stranger."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["checked_parts", "checked_vector", "kept_entries"]


def checked_vector(x: Tensor) -> Tensor:
    """The vector on the processor, apart from autograd.

    Args:
        x: ``[d]``, float32 or float64.

    Raises:
        ValueError: It is no such vector, is empty, or holds numbers that are not finite.

    Example:
        >>> checked_vector(torch.ones(2, requires_grad=True))
        tensor([1., 1.])
    """
    if x.ndim != 1 or x.numel() < 1 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"a vector of float32 or float64 is compressed, not {x.dtype} of shape {list(x.shape)}")
    if not bool(x.isfinite().all()):
        raise ValueError("a vector with numbers that are not finite cannot be compressed")
    return x.detach().cpu()


def checked_parts(parts: Mapping[str, Tensor], **expected: tuple[torch.dtype, int]) -> list[Tensor]:
    """The parts of a message, each of the type and length that it must have.

    Args:
        parts: Tensors by name, from a stranger.
        expected: The type and length of each, by name.

    Returns:
        The parts, in the order of ``expected``.

    Raises:
        ValueError: A part is missing, one too many, of another type or length, or not finite.

    Example:
        >>> checked_parts({"values": torch.ones(2)}, values=(torch.float32, 2))
        [tensor([1., 1.])]
        >>> checked_parts({"values": torch.ones(2)}, values=(torch.float32, 3))
        Traceback (most recent call last):
        ValueError: part 'values' is torch.float32 [2], not torch.float32 [3]
    """
    if set(parts) != set(expected):
        raise ValueError(f"the message has the parts {sorted(parts)}, not {sorted(expected)}")
    for name, (dtype, length) in expected.items():
        part = parts[name]
        if not isinstance(part, Tensor) or part.layout != torch.strided:
            raise ValueError(f"part '{name}' is no dense tensor")
        if part.dtype != dtype or list(part.shape) != [length]:
            raise ValueError(f"part '{name}' is {part.dtype} {list(part.shape)}, not {dtype} [{length}]")
        if not bool(part.isfinite().all()):
            raise ValueError(f"part '{name}' holds numbers that are not finite")
    return [parts[name] for name in expected]


def kept_entries(ratio: float, size: int) -> int:
    """k: the share ``ratio`` of d entries, rounded, and at least one.

    Example:
        >>> kept_entries(0.1, 30), kept_entries(0.01, 30)
        (3, 1)
    """
    return min(size, max(1, round(ratio * size)))
