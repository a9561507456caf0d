"""Where the noise of private training comes from.

A seed that is written in a configuration is known to whoever reads it, and with it the noise could be subtracted again;
so the noise comes from the system, and from a seed only in tests.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from typing import Any

import torch
from torch import Tensor

from lightrail.options import at_least, one_of
from lightrail.privacy.aes_stream import AesStream, cipher_library
from lightrail.privacy.noise_source import DRAWS, NoiseSource

__all__ = ["DeterministicNoise", "NoiseSource", "SystemNoise"]


def _generated(out: Tensor, std: float, draws: int, generator: torch.Generator) -> None:
    """Writes std / √draws times the sum of ``draws`` normals of a generator."""
    out.normal_(generator=generator)
    for _ in range(draws - 1):
        out.add_(torch.empty_like(out).normal_(generator=generator))
    out.mul_(std / math.sqrt(draws))


class SystemNoise(NoiseSource):
    """Noise that nobody can repeat, keyed by the system.

    On a processor it is made of the bytes of AES-256 in counter mode, under a key of 32 bytes of the system's that
    never leaves the memory of the process: u and v of 32 bits (64 for float64) give by Box and Muller the normals

    √(−2 ln |u|) sin πv,  u and v uniform on [−1, 1]

    It neither reads nor moves any generator of torch, numpy or python; a process that is forked, and a copy, take a new
    key. An accelerator draws itself, from a generator (Philox) that 64 bits of the system's seed. Torch's generator
    for the processor is not used: it keeps 32 bits of a seed, which can all be tried.

    Args:
        device: Where the noise of most tensors is wanted; tensors elsewhere get theirs all the same.
        source: ``device`` for the accelerator's own generator; ``system`` for AES on the processor, copied to the
            accelerator, which is slower.
        draws: Normals in a sum, at least 1.

    Raises:
        PluginError: The library ``cryptography`` is not installed.

    Example:
        >>> source = SystemNoise("cpu")
        >>> source.name
        'AES-256-CTR keyed by the system, 4 draws'
        >>> a, b = source.normal_like([torch.zeros(3), torch.zeros(3)], std=2.0)
        >>> bool((a == b).any())
        False

    Reference:
        G. Box and M. Muller (1958), A Note on the Generation of Random Normal Deviates; NIST SP 800-38A (2001), section
        6.5; N. Holohan and S. Braghin (2021), Secure Random Sampling in Differential
        Privacy, section 5.
    """

    is_secret = True

    def __init__(self, device: torch.device | str = "cpu", source: str = "device", draws: int = DRAWS) -> None:
        super().__init__(draws)
        one_of(("device", "system"), source=source)
        self.device = torch.device(device)
        self.source = source
        kind = "AES-256-CTR" if self._is_made_here(self.device) else f"Philox on {self.device.type} (64 bits)"
        self.name = f"{kind} keyed by the system, {draws} draws"
        self._forget()
        cipher_library()

    def _is_made_here(self, device: torch.device) -> bool:
        return device.type == "cpu" or self.source == "system"

    def _forget(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._stream: AesStream | None = None
        self._generators: dict[torch.device, torch.Generator] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"device": self.device, "source": self.source, "draws": self.draws, "name": self.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def _of_this_process(self) -> AesStream:
        if self._process != os.getpid():
            self._forget()
        if self._stream is None:
            self._stream = AesStream(self.draws)
        return self._stream

    def _fill(self, out: Tensor, std: float) -> None:
        stream = self._of_this_process()
        with self._lock:
            if not self._is_made_here(out.device):
                _generated(out, std, self.draws, self._generator(out.device))
            elif out.device.type == "cpu":
                stream.fill(out, std)
            else:
                made = torch.empty(out.shape, dtype=out.dtype, device="cpu")
                stream.fill(made, std)
                out.copy_(made)

    def _add(self, flat: Tensor, std: float) -> None:
        if flat.device.type != "cpu":
            super()._add(flat, std)
            return
        stream = self._of_this_process()
        with self._lock:
            stream.add(flat, std)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            generator = self._generators[device] = torch.Generator(device)
            generator.manual_seed(int.from_bytes(os.urandom(8), "little"))
        return self._generators[device]

    def _digits(self, count: int) -> Tensor:
        stream = self._of_this_process()
        with self._lock:
            return stream.digits(count)


class DeterministicNoise(NoiseSource):
    """Noise from a seed, the same on every device: for tests and for finding errors; a run with it is not private.

    Normals and coins come from two generators, so that neither moves the other.

    Args:
        seed: At least 0.
        rank: Of the process, at least 0.
        draws: Normals in a sum, at least 1.

    Example:
        >>> first, again = (DeterministicNoise(seed=3).normal_like([torch.zeros(2)], std=1.0)[0] for _ in range(2))
        >>> bool((first == again).all())
        True
    """

    is_secret = False

    def __init__(self, seed: int, rank: int = 0, draws: int = DRAWS) -> None:
        super().__init__(draws)
        at_least(0, seed=seed, rank=rank)
        self.name = f"seed {seed}, which anyone can repeat"
        self._normals, self._uniforms = (
            torch.Generator("cpu").manual_seed(_mixed(f"{use} {seed} {rank}")) for use in ("normal", "bernoulli")
        )

    def _fill(self, out: Tensor, std: float) -> None:
        made = out if out.device.type == "cpu" else torch.empty(out.shape, dtype=out.dtype, device="cpu")
        _generated(made, std, self.draws, self._normals)
        if made is not out:
            out.copy_(made)

    def _digits(self, count: int) -> Tensor:
        low, high = -(1 << 31), 1 << 31
        return torch.randint(low, high, (count,), generator=self._uniforms, device="cpu").to(torch.int32)

    def state_dict(self) -> dict[str, Any]:
        """Where the two generators stand."""
        return {"normals": self._normals.get_state(), "uniforms": self._uniforms.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._normals.set_state(state["normals"])
        self._uniforms.set_state(state["uniforms"])


def _mixed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
