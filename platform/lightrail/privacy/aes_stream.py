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

    Each is Σ_k √(-2 ln |u_k|) sin π v_k / √K with u, v uniform on [-1, 1], from signed numbers of 32 bits (64 for
    float64). A pair of Box and Muller's holds two normals, whose sum is √2 times one of them at another angle: K pairs
    are 2 K draws, at the price of K sines.
    """

    def __init__(self, draws: int, dtype: torch.dtype) -> None:
        is_double = dtype == torch.float64
        pairs = -(-draws // 2)
        count = max(256, CACHED // (2 * pairs if is_double else pairs))
        size = 2 * pairs * count * dtype.itemsize
        self._zeros = bytes(size)
        # The cipher asks for room for one block of its own more.
        self._bytes = bytearray(size + 16)
        words = torch.int64 if is_double else torch.int32
        self._words = torch.frombuffer(self._bytes, dtype=words, count=2 * pairs * count).view(2, pairs, count)
        self._unit = 2.0 ** (1 - 8 * dtype.itemsize)
        self._uniform = torch.empty(2, pairs, count, dtype=dtype)
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
        radius, angle = self._uniform
        # An odd number is never 0, whose logarithm is infinite.
        torch.mul(self._words[0].bitwise_or_(1), self._unit, out=radius)
        torch.mul(self._words[1], math.pi * self._unit, out=angle)
        radius.mul_(radius).log_().mul_(-1 / len(radius)).sqrt_()
        angle.sin_()
        torch.mul(radius[0], angle[0], out=self._normal)
        for r, sine in zip(radius[1:], angle[1:], strict=True):
            self._normal.addcmul_(r, sine)
        self._used = 0
