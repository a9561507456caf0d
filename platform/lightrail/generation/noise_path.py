"""The noise path: how much data and how much noise a state holds at each time."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightrail.options import positive

__all__ = ["KarrasVE", "Level", "LinearFlow", "NoisePath"]

# alpha is at least this where a solver needs a finite signal-to-noise ratio; what is left out of x_T is below what
# float32 can show.
SMALLEST_ALPHA = 2.0**-12
KEPT_LEVELS = 4096


@dataclass(frozen=True)
class Level:
    """One level of noise, x = α x0 + σ z: numbers in double precision, or one a sample as ``[B, 1, …]`` tensors.

    Args:
        t: The time on the path.
        alpha: α(t), the share of the data.
        sigma: σ(t), the share of the noise.
        alpha_rate: dα/dt.
        sigma_rate: dσ/dt.
    """

    t: float
    alpha: float
    sigma: float
    alpha_rate: float = math.nan
    sigma_rate: float = math.nan

    @functools.cached_property
    def lam(self) -> float:
        """λ = log(α/σ), half the logarithm of the signal-to-noise ratio; grows while sampling."""
        if isinstance(self.alpha, Tensor):
            return self.alpha.log() - torch.as_tensor(self.sigma).log()  # type: ignore[return-value]
        if self.sigma == 0:
            return math.inf
        return -math.inf if self.alpha == 0 else math.log(self.alpha) - math.log(self.sigma)

    @functools.cached_property
    def rho(self) -> float:
        """ρ = σ/α = exp(−λ), the noise of x/α."""
        if not isinstance(self.alpha, Tensor) and self.alpha == 0:
            return math.inf
        return self.sigma / self.alpha

    @property
    def is_clean(self) -> bool:
        """Whether no noise is left."""
        return not isinstance(self.sigma, Tensor) and self.sigma == 0


class NoisePath(ABC):
    """x_t = α(t) x0 + σ(t) z with z standard normal; α falls and σ/α grows with t, so that sampling runs back in time.

    Methods take and return double-precision tensors of any shape; :meth:`level` is for one time.

    Attributes:
        t_max: Where sampling starts.
        t_min: The smallest time at which a network is asked.
        t_zero: Where σ = 0: the data.
    """

    t_max: float = 1.0
    t_min: float = 1e-3
    t_zero: float = 0.0

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """α(t)."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """σ(t)."""

    def lam(self, t: Tensor) -> Tensor:
        """λ(t) = log(α/σ)."""
        return self.alpha(t).log() - self.sigma(t).log()

    def t_of_lam(self, lam: Tensor) -> Tensor:
        """The time at which λ(t) is ``lam``, by bisection where a path knows no better; clipped to the path."""
        low = torch.full_like(lam, self.t_zero)
        high = torch.full_like(lam, self.t_max)
        for _ in range(80):
            middle = (low + high) / 2
            is_noisier = self.lam(middle) < lam
            low, high = torch.where(is_noisier, low, middle), torch.where(is_noisier, middle, high)
        return (low + high) / 2

    def alpha_rate(self, t: Tensor) -> Tensor:
        """dα/dt."""
        return _derivative(self.alpha, t)

    def sigma_rate(self, t: Tensor) -> Tensor:
        """dσ/dt."""
        return _derivative(self.sigma, t)

    def starting_scale(self, level: Level) -> float:
        """The standard deviation of the noise that sampling starts from at ``level``."""
        return level.sigma

    def level(self, t: float) -> Level:
        """The level at one time; kept, because every batch of a generation visits the same ones."""
        if t not in self._visited:
            if len(self._visited) >= KEPT_LEVELS:
                self._visited.clear()
            time = torch.tensor(t, dtype=torch.float64)
            shares = (1.0, 0.0) if t == self.t_zero else (float(self.alpha(time)), float(self.sigma(time)))
            self._visited[t] = Level(float(t), *shares, *self._rates(time))
        return self._visited[t]

    @functools.cached_property
    def _visited(self) -> dict[float, Level]:
        return {}

    @functools.cached_property
    def _times(self) -> dict[float, float]:
        return {}

    def _rates(self, time: Tensor) -> tuple[float, float]:
        return float(self.alpha_rate(time)), float(self.sigma_rate(time))

    def level_at_lam(self, lam: float) -> Level:
        """The level whose λ is ``lam``."""
        if lam not in self._times:
            if len(self._times) >= KEPT_LEVELS:
                self._times.clear()
            self._times[lam] = float(self.t_of_lam(torch.tensor(lam, dtype=torch.float64)))
        return self.level(self._times[lam])

    def levels(self, t: Tensor, dims: int) -> Level:
        """One level a sample.

        Args:
            t: Times ``[B]``.
            dims: Dimensions of a batch of states; the level's tensors are ``[B, 1, …]`` with as many.
        """
        time = t.double().view(-1, *[1] * (dims - 1))
        found = (time, self.alpha(time), self.sigma(time), self.alpha_rate(time), self.sigma_rate(time))
        return Level(*found)  # type: ignore[arg-type]

    @functools.cached_property
    def t_finite(self) -> float:
        """The largest time at which α ≥ 2⁻¹², where solvers that divide by α start."""
        ends = torch.tensor([self.t_max, self.t_zero], dtype=torch.float64)
        high, low = float(ends[0]), float(ends[1])
        if float(self.alpha(ends)[0]) >= SMALLEST_ALPHA:
            return high
        for _ in range(80):
            middle = (low + high) / 2
            enough = float(self.alpha(torch.tensor(middle, dtype=torch.float64))) >= SMALLEST_ALPHA
            low, high = (middle, high) if enough else (low, middle)
        return low


def _derivative(function: object, t: Tensor) -> Tensor:
    with torch.enable_grad():
        time = t.detach().double().requires_grad_()
        value: Tensor = function(time)  # type: ignore[operator]
        (rate,) = torch.autograd.grad(value.sum(), time, allow_unused=True)
    return torch.zeros_like(t) if rate is None else rate


class KarrasVE(NoisePath):
    """α = 1, σ = t.

    Args:
        sigma_min: The smallest level at which a network is asked, above 0.
        sigma_max: The level that sampling starts from.

    Reference:
        T. Karras, M. Aittala, T. Aila and S. Laine (2022), Elucidating the Design Space of Diffusion-Based Generative
        Models, arXiv 2206.00364, table 1.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        positive(sigma_min=sigma_min, sigma_max=sigma_max)
        self.t_min = sigma_min
        self.t_max = sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def alpha_rate(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def sigma_rate(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def t_of_lam(self, lam: Tensor) -> Tensor:
        return torch.exp(-lam)


class LinearFlow(NoisePath):
    """α = 1 − t, σ = t: straight lines from noise at t = 1 to data at t = 0.

    Args:
        t_min: The smallest time at which a solver in λ asks the network, above 0.

    Reference:
        X. Liu, C. Gong and Q. Liu (2023), Flow Straight and Fast: Learning to Generate and Transfer Data with
        Rectified Flow, arXiv 2209.03003.
    """

    def __init__(self, t_min: float = 1e-3) -> None:
        positive(t_min=t_min)
        self.t_min = t_min

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def alpha_rate(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def sigma_rate(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def t_of_lam(self, lam: Tensor) -> Tensor:
        return torch.sigmoid(-lam)
