"""Noise paths that keep the variance of the state, α² + σ² = 1: linear, cosine, or by a table of training times."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from lightrail.generation.noise_path import Level, NoisePath
from lightrail.options import positive

__all__ = ["CosineVP", "LinearVP", "TableVP", "VariancePreserving"]


class VariancePreserving(NoisePath):
    """α² + σ² = 1, given by log α."""

    @abstractmethod
    def log_alpha(self, t: Tensor) -> Tensor:
        """log α(t), at most 0."""

    @abstractmethod
    def log_alpha_rate(self, t: Tensor) -> Tensor:
        """d log α/dt."""

    def alpha(self, t: Tensor) -> Tensor:
        return self.log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self.log_alpha(t))).clamp(min=0).sqrt()

    def lam(self, t: Tensor) -> Tensor:
        log_alpha = self.log_alpha(t)
        return log_alpha - 0.5 * (-torch.expm1(2 * log_alpha)).log()

    def alpha_rate(self, t: Tensor) -> Tensor:
        return self.alpha(t) * self.log_alpha_rate(t)

    def sigma_rate(self, t: Tensor) -> Tensor:
        return -(self.alpha(t) ** 2) * self.log_alpha_rate(t) / self.sigma(t)

    def starting_scale(self, level: Level) -> float:
        return 1.0


class LinearVP(VariancePreserving):
    """log α = −β_min t/2 − (β_max − β_min) t²/4 for t in [0, 1].

    Args:
        beta_min: The rate of noising at t = 0, above 0.
        beta_max: At t = 1.

    Reference:
        Y. Song, J. Sohl-Dickstein, D. P. Kingma, A. Kumar, S. Ermon and B. Poole (2021), Score-Based Generative
        Modeling through Stochastic Differential Equations, arXiv 2011.13456, appendix C.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        positive(beta_min=beta_min, beta_max=beta_max)
        self.beta_min = beta_min
        self.beta_max = beta_max

    def log_alpha(self, t: Tensor) -> Tensor:
        return -t * (self.beta_min / 2 + t * (self.beta_max - self.beta_min) / 4)

    def log_alpha_rate(self, t: Tensor) -> Tensor:
        return -self.beta_min / 2 - t * (self.beta_max - self.beta_min) / 2

    def t_of_lam(self, lam: Tensor) -> Tensor:
        # log α = −softplus(−2λ)/2, then the root of the quadratic that does not cancel.
        height = torch.nn.functional.softplus(-2 * lam) / 2
        slope, curvature = self.beta_min / 2, (self.beta_max - self.beta_min) / 4
        return 2 * height / (slope + (slope**2 + 4 * curvature * height).sqrt())


class CosineVP(VariancePreserving):
    """α = cos(π/2 (t + s)/(1 + s)) / cos(π/2 s/(1 + s)) for t in [0, 1].

    Args:
        offset: s, at least 0; keeps the first steps from being too small.

    Reference:
        A. Nichol and P. Dhariwal (2021), Improved Denoising Diffusion Probabilistic Models, arXiv 2102.09672,
        equation 17.
    """

    # Beyond it α is below 2⁻¹², which a network can hardly tell from nothing.
    t_max = 0.9998

    def __init__(self, offset: float = 0.008) -> None:
        positive(offset=offset)
        self.offset = offset

    def _angle(self, t: Tensor) -> Tensor:
        return (t + self.offset) / (1 + self.offset) * (math.pi / 2)

    def log_alpha(self, t: Tensor) -> Tensor:
        return self._angle(t).cos().log() - math.log(math.cos(self.offset / (1 + self.offset) * math.pi / 2))

    def log_alpha_rate(self, t: Tensor) -> Tensor:
        return -self._angle(t).tan() * (math.pi / 2) / (1 + self.offset)


class TableVP(VariancePreserving):
    """A path of a network that was trained at whole times 0, 1, …, T − 1; log α is linear between them.

    The data lie at t = −1, one step below the first entry.

    Args:
        alphas_cumprod: ᾱ = α² at each training time, ``[T]``, falling, in (0, 1).
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        half_logs = alphas_cumprod.detach().cpu().double().log() / 2
        self.table = torch.cat((half_logs.new_zeros(1), half_logs))
        self.t_max = float(len(half_logs) - 1)
        self.t_min = 0.0
        self.t_zero = -1.0

    def level(self, t: float) -> Level:
        # A network that takes whole times would cut 398.9999 to 398.
        whole = round(t)
        return super().level(whole if abs(t - whole) < 1e-6 else t)

    def _place(self, t: Tensor) -> tuple[Tensor, Tensor]:
        place = (t.double() + 1).clamp(0, len(self.table) - 1)
        index = place.floor().long().clamp(max=len(self.table) - 2)
        return index, place - index

    def log_alpha(self, t: Tensor) -> Tensor:
        index, share = self._place(t)
        table = self.table.to(t.device)
        return table[index] * (1 - share) + table[index + 1] * share

    def log_alpha_rate(self, t: Tensor) -> Tensor:
        index, _ = self._place(t)
        table = self.table.to(t.device)
        return table[index + 1] - table[index]

    def t_of_lam(self, lam: Tensor) -> Tensor:
        wanted = -torch.nn.functional.softplus(-2 * lam) / 2
        rising = -self.table.to(lam.device)
        index = (torch.searchsorted(rising, -wanted) - 1).clamp(0, len(rising) - 2)
        share = (-wanted - rising[index]) / (rising[index + 1] - rising[index])
        return index + share.clamp(0, 1) - 1
