"""Standard normals, and random bits, of one stream of AES-256 in counter mode."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from lightrail.errors import PluginError

__all__ = ["AesStream", "cipher_library"]

# Numbers that are worked on at once: they fit in a processor's cache.
CACHED = 1 << 15


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
        if out.dtype not in self._blocks:
            # Buffers that were made under inference mode could not be written outside of it.
            with torch.inference_mode(False), torch.device("cpu"):
                self._blocks[out.dtype] = _Block(self._draws, out.dtype)
        block, flat, first = self._blocks[out.dtype], out.view(-1), 0
        while first < flat.numel():
            taken = block.take(flat.numel() - first, self._cipher)
            torch.mul(taken, std, out=flat[first : first + taken.numel()])
            first += taken.numel()


class _Block:
    """Standard normals that were made at once, and how many of them are used."""

    def __init__(self, draws: int, dtype: torch.dtype) -> None:
        is_double = dtype == torch.float64
        pairs = max(256, CACHED // (2 * draws if is_double else draws))
        size = 2 * draws * pairs * dtype.itemsize
        self._zeros = bytes(size)
        # The cipher asks for room for one block of its own more.
        self._bytes = bytearray(size + 16)
        words = torch.int64 if is_double else torch.int32
        self._words = torch.frombuffer(self._bytes, dtype=words, count=size // dtype.itemsize).view(2, draws, pairs)
        self._bits = 8 * dtype.itemsize
        self._uniform = torch.empty(2, draws, pairs, dtype=dtype)
        self._cosine = torch.empty(draws, pairs, dtype=dtype)
        self._normal = torch.empty(2, pairs, dtype=dtype)
        self._used = 2 * pairs

    def take(self, count: int, cipher: Any) -> Tensor:
        """At most ``count`` normals that were never taken before."""
        if self._used == self._normal.numel():
            self._make(cipher)
        taken = self._normal.view(-1)[self._used : self._used + count]
        self._used += taken.numel()
        return taken

    def _make(self, cipher: Any) -> None:
        cipher.update_into(self._zeros, self._bytes)
        bits, (radius, angle) = self._bits, self._uniform
        self._words[0].bitwise_and_((1 << (bits - 1)) - 1)
        self._uniform.copy_(self._words)
        # The half keeps u off 0.
        radius.mul_(2.0 ** (1 - bits)).add_(2.0**-bits).log_().mul_(-2 / radius.shape[0]).sqrt_()
        angle.mul_(2 * math.pi * 2.0**-bits)
        # The two normals of a pair go into two different sums.
        torch.cos(angle, out=self._cosine)
        torch.sum(self._cosine.mul_(radius), 0, out=self._normal[0])
        torch.sum(angle.sin_().mul_(radius), 0, out=self._normal[1])
        self._used = 0
