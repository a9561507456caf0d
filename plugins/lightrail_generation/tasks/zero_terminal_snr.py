"""Noise paths whose noisy end holds no data at all."""

from __future__ import annotations

import torch
from torch import Tensor

from lightrail.generation import NoisePath, VariancePreserving

__all__ = ["ZeroTerminalSNR"]


class ZeroTerminalSNR(NoisePath):
    """A variance-preserving path with α moved to 0 at its noisy end and kept at 1 at the data.

    α' = (α − α_T)/(1 − α_T), σ' = √(1 − α'²)

    Args:
        path: With α² + σ² = 1.

    Reference:
        S. Lin, B. Liu, J. Li and X. Yang (2024), Common Diffusion Noise Schedules and Sample Steps are Flawed,
        arXiv 2305.08891, algorithm 1.
    """

    def __init__(self, path: VariancePreserving | NoisePath) -> None:
        assert isinstance(path, VariancePreserving)
        self.path = path
        self.t_max, self.t_min, self.t_zero = path.t_max, path.t_min, path.t_zero
        self._last = float(path.alpha(torch.tensor(path.t_max, dtype=torch.float64)))

    def alpha(self, t: Tensor) -> Tensor:
        return (self.path.alpha(t) - self._last).clamp(min=0) / (1 - self._last)

    def sigma(self, t: Tensor) -> Tensor:
        # 1 − α' without cancellation near the data.
        missing = -torch.expm1(self.path.log_alpha(t)) / (1 - self._last)
        return (missing.clamp(max=1) * (1 + self.alpha(t))).sqrt()

    def alpha_rate(self, t: Tensor) -> Tensor:
        return self.path.alpha_rate(t) / (1 - self._last)

    def sigma_rate(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.alpha_rate(t) / self.sigma(t)

    def starting_scale(self, level: object) -> float:
        return 1.0
