"""Karras' spacing of noise levels."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from lightrail.generation import NoisePath, TimeGrid
from lightrail.options import positive
from lightrail.traits import Traits

__all__ = ["Karras"]


class Karras(TimeGrid):
    """Equal steps in ρ^{1/r}, ρ = σ/α, which are short where little noise is left.

    ρ_i = (ρ_start^{1/r} + i/n (ρ_stop^{1/r} − ρ_start^{1/r}))^r

    Args:
        start: Where sampling starts; ``None`` for the noisy end of the path, where α is above 0.
        stop: The last time at which the network is asked; ``None`` for the path's own.
        end: ``zero``, ``minimum`` or ``denoise``, see :class:`lightrail.TimeGrid`.
        rho: r, above 0; 1 is uniform in ρ, a large one approaches uniform in λ.

    Raises:
        ConfigurationError: An option is out of range.

    Example:
        >>> from lightrail.generation import KarrasVE
        >>> [round(level.t, 3) for level in Karras().grid(KarrasVE(), 4)]
        [80.0, 9.723, 0.47, 0.002, 0.0]

    Reference:
        T. Karras, M. Aittala, T. Aila and S. Laine (2022), Elucidating the Design Space of Diffusion-Based Generative
        Models, arXiv 2206.00364, equation 5.
    """

    traits: ClassVar[Traits] = Traits(rule="ρ^{1/r} uniform")

    def __init__(
        self, start: float | None = None, stop: float | None = None, end: str = "zero", rho: float = 7.0
    ) -> None:
        super().__init__(start, stop, end)
        positive(rho=rho)
        self.rho = rho

    def times(self, path: NoisePath, start: float, stop: float, count: int) -> np.ndarray:
        ends = path.lam(torch.tensor([min(start, path.t_finite), stop], dtype=torch.float64))
        high, low = (float((-end / self.rho).exp()) for end in ends)
        levels = torch.from_numpy(np.linspace(high, low, count))
        times = path.t_of_lam(-self.rho * levels.log()).numpy().copy()
        times[0], times[-1] = start, stop  # as asked, not as the inverse rounds
        return times
