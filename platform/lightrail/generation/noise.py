"""Random numbers that belong to a sample: the same whatever batch, device or process it is drawn in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Noise"]

_LOW_32 = 0xFFFFFFFF


def _mixed(value: int) -> int:
    """A permutation of the 64-bit numbers that spreads neighbours far apart."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


def _mixed_32(value: int) -> int:
    """The same for 32 bits: two samples never share the key of one draw."""
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & _LOW_32
    value = ((value ^ (value >> 15)) * 0x846CA68B) & _LOW_32
    return value ^ (value >> 16)


class Noise:
    """Standard normal and uniform numbers, a function of the seed, the sample, the step and the draw, with no state.

    A sample therefore gets the same numbers alone and in any batch, and a step can be repeated or run backwards. They
    are drawn on the CPU, so they are the same on every device.

    Args:
        seed: Of the whole generation.
        indices: Which samples these are, one whole number from 0 each.
        shape: Of one sample.
        dtype: Of what is drawn; drawn in float32 at least, so that a half-precision run sees the same noise.
        device: Where it is wanted.

    Example:
        >>> both = Noise(seed=1, indices=[0, 1], shape=(3,)).normal(step=4)
        >>> second = Noise(seed=1, indices=[1], shape=(3,)).normal(step=4)
        >>> bool((both[1] == second[0]).all())
        True
    """

    def __init__(
        self,
        seed: int,
        indices: Sequence[int],
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.seed = seed
        self.indices = tuple(int(i) for i in indices)
        self.shape = tuple(shape)
        self.dtype = dtype
        self.device = torch.device(device)
        self._generator = torch.Generator()

    def __len__(self) -> int:
        return len(self.indices)

    def normal(self, step: int, draw: int = 0) -> Tensor:
        """Standard normal numbers ``[B, *shape]``.

        Args:
            step: The step that they are for; −1 for the starting noise.
            draw: Which draw within the step.
        """
        return self._drawn(step, draw, self.shape, uniform=False)

    def uniform(self, step: int, draw: int = 0, shape: Sequence[int] = ()) -> Tensor:
        """Numbers in [0, 1), ``[B, *shape]``; by default one a sample."""
        return self._drawn(step, draw, tuple(shape), uniform=True)

    def _drawn(self, step: int, draw: int, shape: tuple[int, ...], *, uniform: bool) -> Tensor:
        wide = torch.promote_types(self.dtype, torch.float32)
        drawn = torch.empty((len(self.indices), *shape), dtype=wide)
        of_draw = _mixed(_mixed(_mixed(self.seed) ^ (step & _LOW_32)) ^ (2 * draw + uniform)) & _LOW_32
        fill = torch.rand if uniform else torch.randn
        for row, index in enumerate(self.indices):
            self._generator.manual_seed(_mixed_32((index & _LOW_32) ^ of_draw))
            fill(shape, generator=self._generator, dtype=wide, out=drawn[row])
        return drawn.to(self.device, self.dtype)
