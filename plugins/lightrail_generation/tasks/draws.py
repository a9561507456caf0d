"""Where the random numbers of a batch come from."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Draws"]


class Draws:
    """The random numbers of one batch, all from one generator.

    Args:
        generator: Decides every number.
        device: Where they are wanted.
        evaluates: Whether they are for validation or test: times are then spread evenly, and no label is dropped.
    """

    def __init__(self, generator: torch.Generator, device: torch.device, *, evaluates: bool = False) -> None:
        self.generator = generator
        self.device = device
        self.evaluates = evaluates

    @classmethod
    def for_training(cls, device: torch.device, rank: int) -> Draws:
        """Numbers that one draw from torch's global generator decides, so that a repeated step repeats them.

        Ranks share the state of that generator; without their number they would all see the same noise.
        """
        seed = int(torch.randint(2**62, (), dtype=torch.int64)) + rank
        return cls(torch.Generator(device).manual_seed(seed), device)

    @classmethod
    def for_evaluation(cls, batch: int, rank: int, device: torch.device) -> Draws:
        """The same numbers at every evaluation of the same batch, on every device."""
        # Of a seed, torch's generator on the CPU takes the lower 32 bits alone.
        return cls(torch.Generator().manual_seed((1_000_003 * rank + batch) % 2**32), device, evaluates=True)

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers in the shape and type of ``like``, in single precision at least."""
        wide = torch.promote_types(like.dtype, torch.float32)
        return self._moved(torch.randn(like.shape, generator=self.generator, device=self.generator.device, dtype=wide))

    def uniform(self, count: int) -> Tensor:
        """Numbers in [0, 1), ``[count]`` in double precision."""
        drawn = torch.rand(count, generator=self.generator, device=self.generator.device, dtype=torch.float64)
        return self._moved(drawn)

    def places(self, count: int) -> Tensor:
        """One number in [0, 1) a sample, ``[count]``: independent in training, one in each of ``count`` equal parts of
        [0, 1) in evaluation."""
        if not self.evaluates:
            return self.uniform(count)
        order = torch.randperm(count, generator=self.generator, device=self.generator.device)
        return (self._moved(order) + self.uniform(count)) / count

    def _moved(self, drawn: Tensor) -> Tensor:
        return drawn.to(self.device)
