"""Quadratic in time, or another power."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from lightrail.generation import NoisePath, TimeGrid
from lightrail.options import positive
from lightrail.traits import Traits

__all__ = ["Quadratic"]


class Quadratic(TimeGrid):
    """Equal steps in t^{1/power}, which are short near the data.

    t_i = (t_start^{1/p} + i/n (t_stop^{1/p} − t_start^{1/p}))^p, with times counted from the data

    Args:
        start: Where sampling starts; ``None`` for the noisy end of the path.
        stop: The last time at which the network is asked; ``None`` for the path's own.
        end: ``zero``, ``minimum`` or ``denoise``, see :class:`lightrail.TimeGrid`.
        power: p, above 0.

    Raises:
        ConfigurationError: An option is out of range.

    Example:
        >>> from lightrail.generation import LinearFlow
        >>> [round(level.t, 3) for level in Quadratic(start=0.81, stop=0.01, end="minimum").grid(LinearFlow(), 2)]
        [0.81, 0.25, 0.01]

    Reference:
        J. Song, C. Meng and S. Ermon (2021), Denoising Diffusion Implicit Models, arXiv 2010.02502, appendix D.2.
    """

    traits: ClassVar[Traits] = Traits(rule="t^{1/p} uniform")

    def __init__(
        self, start: float | None = None, stop: float | None = None, end: str = "zero", power: float = 2.0
    ) -> None:
        super().__init__(start, stop, end)
        positive(power=power)
        self.power = power

    def times(self, path: NoisePath, start: float, stop: float, count: int) -> np.ndarray:
        first, last = ((t - path.t_zero) ** (1 / self.power) for t in (start, stop))
        times = np.linspace(first, last, count) ** self.power + path.t_zero
        times[0], times[-1] = start, stop  # as asked, not as the power rounds
        return times
