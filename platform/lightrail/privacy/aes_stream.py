"""Standard normals, and random bits, of one stream of AES-256 in counter mode."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from lightrail.errors import PluginError

__all__ = ["AesStream", "cipher_library"]

# Numbers that are worked on at once: they fit in a processor's cache, and are enough for several threads.
CACHED = 1 << 17


def cipher_library() -> Any:
    """The module of ciphers of ``cryptography``.

    Raises:
        PluginError: It is not installed.
    """
    try:
        from cryptography.hazmat.primitives import ciphers
    except ImportError as error:
        raise PluginError(
            "the noise of private training needs the library 'cryptography'",
            found="it is not installed",
            allowed="lightrail with its extra 'privacy'",
            remedy="Run: pip install 'lightrail[privacy]'",
        ) from error
    return ciphers


class AesStream:
    """Normals and digits of one AES-256 stream; what a small tensor leaves of a block goes into the next."""

    def __init__(self, draws: int) -> None:
        ciphers = cipher_library()
        key = ciphers.algorithms.AES(os.urandom(32))
        self._cipher = ciphers.Cipher(key, ciphers.modes.CTR(bytes(16))).encryptor()
        self._draws = draws
        self._blocks: dict[torch.dtype, _Block] = {}

    def digits(self, count: int) -> Tensor:
        """Uniform int32 ``[count]`` over all values."""
        if not count:
            return torch.empty(0, dtype=torch.int32, device="cpu")
        return torch.frombuffer(bytearray(self._cipher.update(bytes(4 * count))), dtype=torch.int32)

    def fill(self, out: Tensor, std: float) -> None:
        """Writes N(0, std²) into a contiguous tensor of float32 or float64 on the processor."""
        out.zero_()
        self.add(out, std)

    def add(self, out: Tensor, std: float) -> None:
        """Adds N(0, std²) to a contiguous tensor of float32 or float64 on the processor."""
        if out.dtype not in self._blocks:
            # Buffers that were made under inference mode could not be written outside of it.
            with torch.inference_mode(False), torch.device("cpu"):
                self._blocks[out.dtype] = _Block(self._draws, out.dtype)
        block, flat, first = self._blocks[out.dtype], out.view(-1), 0
        while first < flat.numel():
            taken = block.take(flat.numel() - first, self._cipher)
            flat[first : first + taken.numel()].add_(taken, alpha=std)
            first += taken.numel()


class _Block:
    """Standard normals that were made at once, and how many of them are used.

    Each is √(2 / n) Σ_k erf⁻¹(c_k) with c_k uniform on (-1, 1), from a signed number of 32 bits (64 for float64).
    """

    def __init__(self, draws: int, dtype: torch.dtype) -> None:
        is_double = dtype == torch.float64
        count = max(256, CACHED // (2 * draws if is_double else draws))
        size = draws * count * dtype.itemsize
        self._zeros = bytes(size)
        # The cipher asks for room for one block of its own more.
        self._bytes = bytearray(size + 16)
        words = torch.int64 if is_double else torch.int32
        self._words = torch.frombuffer(self._bytes, dtype=words, count=draws * count).view(draws, count)
        # A number at the very end of its range becomes the last one before 1, whose inverse is finite.
        self._unit = 2.0 ** (1 - 8 * dtype.itemsize) * (1 - torch.finfo(dtype).eps)
        self._uniform = torch.empty(draws, count, dtype=dtype)
        self._normal = torch.empty(count, dtype=dtype)
        self._used = count

    def take(self, count: int, cipher: Any) -> Tensor:
        """At most ``count`` normals that were never taken before."""
        if self._used == self._normal.numel():
            self._make(cipher)
        taken = self._normal[self._used : self._used + count]
        self._used += taken.numel()
        return taken

    def _make(self, cipher: Any) -> None:
        cipher.update_into(self._zeros, self._bytes)
        self._uniform.copy_(self._words).mul_(self._unit).erfinv_()
        torch.sum(self._uniform, 0, out=self._normal)
        self._normal.mul_(math.sqrt(2 / len(self._uniform)))
        self._used = 0
