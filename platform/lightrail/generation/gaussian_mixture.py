"""A mixture of Gaussians whose denoiser is known exactly: the test bed of samplers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lightrail.errors import ConfigurationError
from lightrail.generation.denoiser import Condition, Denoiser, Generated
from lightrail.generation.noise import Noise
from lightrail.generation.noise_path import KarrasVE, LinearFlow, NoisePath
from lightrail.generation.prediction import Prediction
from lightrail.generation.variance_preserving import CosineVP, LinearVP, TableVP
from lightrail.options import one_of
from lightrail.traits import Traits

__all__ = ["PATHS", "GaussianMixture"]


def _ddpm_table() -> NoisePath:
    return TableVP(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0))


PATHS = {"linear": LinearVP, "cosine": CosineVP, "edm": KarrasVE, "flow": LinearFlow, "ddpm": _ddpm_table}

MEANS = ((1.0, 0.5), (-1.0, -0.3), (0.2, -1.2))
WEIGHTS = (0.40, 0.35, 0.25)
VARIANCES = (0.25, 0.16, 0.36)


class GaussianMixture(Denoiser):
    """The exact denoiser of a mixture Σ w_k N(m_k, v_k I), so that what a sampler gets wrong is its own.

    With x = α x0 + σ z, each component is seen as N(α m_k, (α² v_k + σ²) I) and

    D(x) = Σ_k r_k(x) (m_k + α v_k (x − α m_k)/(α² v_k + σ²)),  r_k the posterior weights.

    As a class-conditional model, label k is component k.

    Args:
        means: One point a component.
        weights: Positive, one a component; they are normalised.
        variances: Positive, one a component.
        path: ``linear`` (β from 0.1 to 20), ``cosine``, ``edm``, ``flow``, or ``ddpm`` (1000 steps, β from 1e-4 to
            0.02), or a :class:`NoisePath`.
        dtype: ``float64``, ``float32`` or ``bfloat16``.
        form: What it answers with, from which the others are converted: data, noise, velocity, flow or score.

    Raises:
        ConfigurationError: The components do not match, or a weight or variance is not positive.

    Example:
        >>> mixture = GaussianMixture(means=[[0.0]], weights=[1.0], variances=[1.0])
        >>> level = mixture.path.level(0.5)
        >>> x = torch.ones(1, 1, dtype=torch.float64)
        >>> bool(torch.isclose(mixture.predict(x, level).data, level.alpha * x))
        True
    """

    traits: ClassVar[Traits] = Traits(rule="D(x) = Σ r_k(x) (m_k + α v_k (x − α m_k)/(α² v_k + σ²))")

    def __init__(
        self,
        means: Sequence[Sequence[float]] = MEANS,
        weights: Sequence[float] = WEIGHTS,
        variances: Sequence[float] = VARIANCES,
        path: str | NoisePath = "linear",
        dtype: str = "float64",
        form: str = "data",
    ) -> None:
        one_of(("float64", "float32", "bfloat16"), dtype=dtype)
        if isinstance(path, str):
            one_of(PATHS, path=path)
        self.path = PATHS[path]() if isinstance(path, str) else path
        self.dtype = getattr(torch, dtype)
        self.form = form
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        self.variances = torch.as_tensor(variances, dtype=torch.float64)
        count = len(self.weights)
        are_matched = self.means.ndim == 2 and len(self.means) == count == len(self.variances)
        if not are_matched or not bool((self.weights > 0).all() and (self.variances > 0).all()):
            raise ConfigurationError(
                "the components do not make a mixture",
                found=f"means {tuple(self.means.shape)}, {count} weights, {len(self.variances)} variances",
                allowed="as many points as positive weights and positive variances",
                remedy="Give denoiser.means, denoiser.weights and denoiser.variances one entry a component.",
            )
        self.weights = self.weights / self.weights.sum()
        self.shape = tuple(self.means.shape[1:])
        self.classes = count

    def condition(self, request: object, indices: Sequence[int]) -> Condition | None:
        """All components together, unless a label is asked for."""
        if not isinstance(request, dict) or request.get("label") is None:
            return None
        return super().condition(request, indices)

    def output(self, x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        level = self.path.levels(t, x.ndim)
        data = self._data(x.double(), level.alpha, level.sigma, condition)  # type: ignore[arg-type]
        return Prediction(x.double(), level, "data", data).get(self.form)

    def _data(self, x: Tensor, alpha: Tensor, sigma: Tensor, condition: Condition | None) -> Tensor:
        m, w, v = (each.to(x.device) for each in (self.means, self.weights, self.variances))
        variances = alpha**2 * v + sigma**2  # [B, K]
        offsets = x[:, None] - alpha[:, :, None] * m  # [B, K, n]
        log_weights = (
            w.log() - 0.5 * offsets.square().sum(-1) / variances - 0.5 * m.shape[1] * (2 * math.pi * variances).log()
        )
        if condition is not None:
            chosen = torch.nn.functional.one_hot(condition["label"], self.classes).bool()
            log_weights = log_weights.masked_fill(~chosen, -math.inf)
        means = m + (alpha * v / variances)[..., None] * offsets
        return (log_weights.softmax(-1)[..., None] * means).sum(1)

    def log_density(self, x: Tensor, t: float) -> Tensor:
        """log p_t(x), ``[B]``."""
        level = self.path.level(t)
        variances = level.alpha**2 * self.variances + level.sigma**2
        squares = (x.double()[:, None] - level.alpha * self.means).square().sum(-1)
        logs = self.weights.log() - 0.5 * squares / variances
        return (logs - 0.5 * self.means.shape[1] * (2 * math.pi * variances).log()).logsumexp(-1)

    def exact(self, start: Tensor, begin: float, times: Sequence[float], condition: Condition | None = None) -> Tensor:
        """The exact solution of the probability-flow equation, by an eighth-order method at tolerance 1e-12.

        Args:
            start: States ``[B, n]`` at ``begin``.
            begin: A time with α > 0.
            times: Falling times at which the solution is wanted; σ = 0 is allowed.
            condition: What steers it.

        Returns:
            States ``[len(times), B, n]`` in double precision.
        """
        from scipy.integrate import solve_ivp

        first = self.path.level(begin)
        levels = [self.path.level(t) for t in times]

        one = torch.ones(len(start), 1, dtype=torch.float64)

        def rate(log_rho: float, flat: np.ndarray) -> np.ndarray:
            # y = x/α over log ρ: dy/d log ρ = ρ ε = y − D, smooth down to ρ = 0. In y the path is α = 1, σ = ρ.
            y = torch.from_numpy(flat).view(start.shape)
            return (y - self._data(y, one, math.exp(log_rho) * one, condition)).flatten().numpy()

        smallest = math.log(1e-9)
        ends = [smallest if level.is_clean else math.log(level.rho) for level in levels]
        y0 = (start.double() / first.alpha).flatten().numpy()
        solution = solve_ivp(
            rate, (math.log(first.rho), ends[-1]), y0, method="DOP853", t_eval=ends, rtol=1e-12, atol=1e-12
        )
        states = torch.from_numpy(solution.y.T.copy()).view(len(levels), *start.shape)
        return torch.stack([level.alpha * state for level, state in zip(levels, states, strict=True)])

    def measure(self, generated: Generated) -> dict[str, float]:
        """``ode_error``: the root mean square distance from the exact solution of the probability flow, unguided."""
        grid = generated.grid
        if grid is None or generated.is_guided:
            return {}
        exact = self.exact(generated.start, grid[0].t, [grid[-1].t], generated.condition)[0]
        return {"ode_error": float((generated.samples.double() - exact).square().mean().sqrt())}

    def draw(self, noise: Noise) -> Tensor:
        """Samples of the mixture itself, ``[B, n]``: what a perfect sampler would give in distribution."""
        component = torch.multinomial(self.weights, len(noise), True, generator=torch.Generator().manual_seed(0))
        return self.means[component] + self.variances[component].sqrt()[:, None] * noise.normal(-2).double()

    def examples(self, count: int) -> Tensor:
        return self.draw(Noise(0, range(count), self.shape, self.dtype))

    def moments(self) -> tuple[Tensor, Tensor]:
        mean = self.weights @ self.means
        centred = self.means - mean
        between = torch.einsum("k,ki,kj->ij", self.weights, centred, centred)
        return mean, between + (self.weights @ self.variances) * torch.eye(len(mean), dtype=torch.float64)

    def fingerprint(self) -> str:
        parts = (self.means.numpy().tobytes(), self.weights.numpy().tobytes(), self.variances.numpy().tobytes())
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]
