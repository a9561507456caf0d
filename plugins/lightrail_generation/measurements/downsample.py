"""Downsampling: images at a lower resolution."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightrail.errors import CompositionError
from lightrail.generation import Measurement
from lightrail.options import at_least
from lightrail.traits import Traits

__all__ = ["Downsample"]


class Downsample(Measurement):
    """Means over blocks of f by f pixels: y = P x + s z.

    P Pᵀ = I/f², so that A⁺ = f² Pᵀ, which repeats every mean over its block.

    Args:
        factor: f, at least 1; it divides both sides.
        noise: s, at least 0, in the units of the samples.

    Raises:
        ConfigurationError: An option is out of range.
        CompositionError: The samples are no images, or f does not divide their sides.

    Example:
        >>> operator = Downsample(factor=2)
        >>> operator.prepare((1, 2, 2))
        >>> operator.apply(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])).tolist()
        [[[[2.5]]]]
    """

    traits: ClassVar[Traits] = Traits(rule="y = mean of f × f pixels + s z", example={"factor": 2})

    def __init__(self, factor: int = 2, noise: float = 0.0) -> None:
        super().__init__(noise)
        at_least(1, factor=factor)
        self.factor = factor

    def prepare(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 3 or shape[1] % self.factor or shape[2] % self.factor:
            raise CompositionError(
                "the samples do not divide into blocks",
                found=f"factor={self.factor}, and samples of shape {tuple(shape)}",
                allowed=f"(channels, height, width) with sides that {self.factor} divides",
                remedy="Choose a factor of both sides, or measurement=inpaint, which measures points too.",
            )

    def apply(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.factor)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.pseudo_inverse(y) / self.factor**2

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        return torch.repeat_interleave(torch.repeat_interleave(y, self.factor, -1), self.factor, -2)

    def picture(self, y: Tensor) -> Tensor:
        """The means, each over its block."""
        return self.pseudo_inverse(y)
