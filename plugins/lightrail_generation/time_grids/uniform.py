"""Uniform in time."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from lightrail.generation import NoisePath, TimeGrid
from lightrail.options import positive
from lightrail.traits import Traits

__all__ = ["Uniform"]


class Uniform(TimeGrid):
    """Equal steps in time, from the noisy end to the data; shifted toward the noise where that is wanted.

    t_i = k u_i / (1 + (k − 1) u_i),  u_i uniform from ``start`` to ``stop``

    Args:
        start: Where sampling starts; ``None`` for the noisy end of the path.
        stop: The last time at which the network is asked; ``None`` for the data themselves, one step away.
        end: ``zero``, ``minimum`` or ``denoise``, see :class:`lightrail.TimeGrid`.
        shift: k, above 0; above 1 it spends more steps at the noisy end, as large images want. Times are shifted as
            shares of the path.

    Raises:
        ConfigurationError: An option is out of range.

    Example:
        >>> from lightrail.generation import LinearFlow
        >>> [round(level.t, 3) for level in Uniform().grid(LinearFlow(), 4, finite=False)]
        [1.0, 0.75, 0.5, 0.25, 0.0]

    Reference:
        P. Esser et al. (2024), Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, arXiv
        2403.03206, section 5.3.2, for the shift.
    """

    traits: ClassVar[Traits] = Traits(rule="t_i = k u_i/(1 + (k − 1) u_i), u uniform")
    reaches_zero: ClassVar[bool] = True

    def __init__(
        self, start: float | None = None, stop: float | None = None, end: str = "zero", shift: float = 1.0
    ) -> None:
        super().__init__(start, stop, end)
        positive(shift=shift)
        self.shift = shift

    def times(self, path: NoisePath, start: float, stop: float, count: int) -> np.ndarray:
        low, length = path.t_zero, path.t_max - path.t_zero
        shares = np.linspace(
            _unshifted((start - low) / length, self.shift), _unshifted((stop - low) / length, self.shift), count
        )
        times = low + length * self.shift * shares / (1 + (self.shift - 1) * shares)
        times[0], times[-1] = start, stop
        return times


def _unshifted(share: float, shift: float) -> float:
    return share / (shift - (shift - 1) * share)
