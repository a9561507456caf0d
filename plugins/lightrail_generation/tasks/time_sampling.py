"""At which times a denoiser is trained."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightrail.generation import NoisePath
from lightrail.options import one_of, positive

__all__ = ["TIME_SAMPLINGS", "TimeSampling"]

TIME_SAMPLINGS = ("uniform", "lognormal", "logit_normal")
_DEFAULTS = {"uniform": (0.0, 1.0), "lognormal": (-1.2, 1.2), "logit_normal": (0.0, 1.0)}
_EDGE = 1e-9


class TimeSampling:
    """A distribution of times between two ends of a path, by its quantile function.

    Args:
        path: The noise path.
        kind: ``uniform`` in t; ``lognormal``: log(σ/α) is normal; ``logit_normal``: the logit of the place of t between
            the two ends is normal.
        low: The smallest time.
        high: The largest.
        mean: Of the normal distribution; by default −1.2 for ``lognormal``, 0 for ``logit_normal``.
        std: Its standard deviation, above 0; by default 1.2 and 1.

    Example:
        >>> from lightrail.generation import KarrasVE
        >>> sampling = TimeSampling(KarrasVE(), "lognormal", 0.002, 80.0)
        >>> round(float(sampling.times(torch.tensor([0.5], dtype=torch.float64)).log()), 6)
        -1.2
    """

    def __init__(
        self,
        path: NoisePath,
        kind: str,
        low: float,
        high: float,
        mean: float | None = None,
        std: float | None = None,
    ) -> None:
        one_of(TIME_SAMPLINGS, time_sampling=kind)
        self.path = path
        self.kind = kind
        self.low = low
        self.high = high
        self.mean = _DEFAULTS[kind][0] if mean is None else float(mean)
        self.std = _DEFAULTS[kind][1] if std is None else float(std)
        positive(time_std=self.std)

    def times(self, u: Tensor) -> Tensor:
        """The quantiles of t.

        Args:
            u: Numbers in [0, 1), ``[B]`` in double precision.
        """
        if self.kind == "uniform":
            return self.low + u * (self.high - self.low)
        normal = self.mean + self.std * torch.special.ndtri(u.clamp(_EDGE, 1 - _EDGE))
        if self.kind == "logit_normal":
            return self.low + normal.sigmoid() * (self.high - self.low)
        return self.path.t_of_lam(-normal).clamp(self.low, self.high)

    def density(self, t: Tensor) -> Tensor:
        """p(t) in the units of t, where the ends cut nothing off.

        Args:
            t: Times in double precision.
        """
        width = self.high - self.low
        if self.kind == "uniform":
            return torch.full_like(t, 1 / width)
        if self.kind == "logit_normal":
            place = (t - self.low) / width
            return self._normal(place.logit()) / (place * (1 - place) * width)
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        rate = self.path.sigma_rate(t) / sigma - self.path.alpha_rate(t) / alpha
        return self._normal((sigma / alpha).log()) * rate

    def _normal(self, x: Tensor) -> Tensor:
        return torch.exp(-0.5 * ((x - self.mean) / self.std) ** 2) / (self.std * math.sqrt(2 * math.pi))
