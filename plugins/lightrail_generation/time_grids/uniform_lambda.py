"""Uniform in the logarithm of the signal-to-noise ratio."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from lightrail.generation import NoisePath, TimeGrid
from lightrail.traits import Traits

__all__ = ["UniformLambda"]


class UniformLambda(TimeGrid):
    """Equal steps in λ = log(α/σ), in which exponential integrators are written.

    λ_i = λ_start + i/n (λ_stop − λ_start)

    Args:
        start: Where sampling starts; ``None`` for the noisy end of the path, where α is above 0.
        stop: The last time at which the network is asked; ``None`` for the path's own.
        end: ``zero``, ``minimum`` or ``denoise``, see :class:`lightrail.TimeGrid`.

    Example:
        >>> from lightrail.generation import KarrasVE
        >>> [round(level.t, 4) for level in UniformLambda(end="minimum").grid(KarrasVE(0.01, 100.0), 2)]
        [100.0, 1.0, 0.01]

    Reference:
        C. Lu, Y. Zhou, F. Bao, J. Chen, C. Li and J. Zhu (2022), DPM-Solver: A Fast ODE Solver for Diffusion
        Probabilistic Model Sampling in Around 10 Steps, arXiv 2206.00927, section 3.3.
    """

    traits: ClassVar[Traits] = Traits(rule="λ uniform")

    def times(self, path: NoisePath, start: float, stop: float, count: int) -> np.ndarray:
        ends = path.lam(torch.tensor([min(start, path.t_finite), stop], dtype=torch.float64))
        lams = torch.from_numpy(np.linspace(float(ends[0]), float(ends[1]), count))
        times = path.t_of_lam(lams).numpy().copy()
        times[0], times[-1] = start, stop  # as asked, not as the inverse rounds
        return times
