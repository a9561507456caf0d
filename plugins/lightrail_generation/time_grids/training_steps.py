"""The whole times that a network was trained at."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import Grid, Level, NoisePath, TableVP, TimeGrid
from lightrail.options import at_least, one_of
from lightrail.traits import Traits

__all__ = ["SPACINGS", "TrainingSteps", "spaced", "spaced_noise"]

SPACINGS = ("trailing", "leading", "linspace", "karras", "lambda")


def spaced(spacing: str, total: int, count: int) -> np.ndarray:
    """``count`` falling whole times of 0, 1, …, total − 1.

    trailing: round(T − i T/N) − 1, leading: (N − 1 − i) ⌊T/N⌋, linspace: round((T − 1) (1 − i/(N − 1))), with halves
    rounded to even.
    """
    # The order of operations decides how halves are rounded, and with it the times that models are compared at.
    if spacing == "trailing":
        times = np.round(np.arange(total, 0, -total / count)[:count]) - 1
    elif spacing == "leading":
        times = np.arange(count)[::-1] * (total // count)
    else:
        times = np.round(np.linspace(0, total - 1, count))[::-1] if count > 1 else np.array([total - 1])
    return times.astype(np.int64)


def spaced_noise(spacing: str, lam: np.ndarray, count: int) -> np.ndarray:
    """``count`` rising λ between the ends ``lam``: equal steps in them, or for ``karras`` in e^{−λ/7}."""
    if spacing == "lambda":
        return np.linspace(lam[0], lam[1], count)
    high, low = np.exp(-lam / 7)
    return -7 * np.log(np.linspace(high, low, count))


class TrainingSteps(TimeGrid):
    """Times at which the network was trained, spaced as diffusers spaces them.

    Of T training times 0, 1, …, T − 1 it visits N:
    ``trailing``: round(T − i T/N) − 1, from the last;
    ``leading``: (N − 1 − i) ⌊T/N⌋ + offset, which leaves out the noisiest;
    ``linspace``: round((T − 1) (1 − i/(N − 1))), both ends;
    ``karras``, ``lambda``: N noise levels between both ends, equal steps in (σ/α)^{1/7} or in λ = log(α/σ), of which
    the network is told the nearest training time.

    Args:
        spacing: ``trailing``, ``leading``, ``linspace``, ``karras`` or ``lambda``.
        steps_offset: Added to each time of ``leading``; 1 for most latent models.
        drops_last: Whether N + 1 times are spaced and the last left out, as diffusers' multistep solvers (DPM-Solver,
            UniPC, DEIS) do with ``leading`` and ``linspace``.
        start: The training time that counts as the last, to start with less noise; ``None`` for T − 1.
        end: What follows the N times. ``zero``: the data, σ = 0. ``minimum``: the time 0, where some noise is left; if
            the spacing has reached it already, N + 1 times are spaced, so that there are N steps. ``denoise``: as
            ``minimum``, and the data predicted there are returned, for one more evaluation.

    Raises:
        ConfigurationError: An option is out of range, or there are more steps than training times.
        CompositionError: The path has no training times.

    Deviations:
        Each solver steps to the next of these times. ``DDIMScheduler`` and ``PNDMScheduler`` step by ⌊T/N⌋ whatever the
        spacing, and with ``linspace`` and ``trailing`` end up elsewhere. ``trailing`` makes N times always; where T/N
        rounds so (61 steps of 1000), diffusers has one more, −1. One step of ``linspace`` starts at T − 1, not at 0;
        diffusers' Euler and Heun schedulers do not round its times. The levels of ``karras`` and ``lambda`` may not
        share a training time. For solvers that divide by α the first time is at most the last with α ≥ 2⁻¹², which
        differs on cosine schedules only.

    Example:
        >>> from lightrail.generation import GaussianMixture
        >>> path = GaussianMixture(path="ddpm").path
        >>> [int(level.t) for level in TrainingSteps(spacing="leading", steps_offset=1).grid(path, 4)]
        [751, 501, 251, 1, -1]

    Reference:
        S. Lin, B. Liu, J. Li and X. Yang (2024), Common Diffusion Noise Schedules and Sample Steps Are Flawed, arXiv
        2305.08891, table 2. T. Karras, M. Aittala, T. Aila and S. Laine (2022), Elucidating the Design Space of
        Diffusion-Based Generative Models, arXiv 2206.00364, equation 5, for ``karras``.
    """

    traits: ClassVar[Traits] = Traits(rule="t_i = round(T − i T/N) − 1")

    def __init__(
        self,
        spacing: str = "trailing",
        steps_offset: int = 0,
        drops_last: bool = False,
        start: int | None = None,
        end: str = "zero",
    ) -> None:
        super().__init__(start, None, end)
        one_of(SPACINGS, spacing=spacing)
        at_least(0, steps_offset=steps_offset)
        if start is not None:
            at_least(1, start=start)
        _check_belongs("steps_offset", steps_offset, ("leading",), spacing)
        _check_belongs("drops_last", drops_last, ("leading", "linspace"), spacing)
        self.spacing = spacing
        self.steps_offset = steps_offset
        self.drops_last = drops_last

    def times(self, path: NoisePath, start: float, stop: float, count: int) -> np.ndarray:
        """``count`` training times from ``start``; ``stop`` follows from the spacing."""
        if self.spacing in ("karras", "lambda"):
            return np.array([level.t for level in self._noise_levels(path, start, count)])
        return (spaced(self.spacing, int(start) + 1, count) + self.steps_offset).astype(np.float64)

    def _noise_levels(self, path: NoisePath, start: float, count: int) -> list[Level]:
        ends = path.lam(torch.tensor([start, path.t_min], dtype=torch.float64)).numpy()
        lams = torch.from_numpy(spaced_noise(self.spacing, ends, count))
        exact = path.t_of_lam(lams).tolist()
        exact[0], exact[-1] = start, path.t_min if count > 1 else start  # as asked, not as the inverse rounds
        return [dataclasses.replace(path.level(t), t=float(round(t))) for t in exact]

    def grid(self, path: NoisePath, steps: int, *, finite: bool = True) -> Grid:
        """The levels of a run.

        Args:
            path: A path with training times.
            steps: How many steps, at least 1.
            finite: Whether the first time may not lie beyond the last whole one with α ≥ 2⁻¹².
        """
        if not isinstance(path, TableVP):
            raise CompositionError(
                "this model has no training steps",
                found=f"time_grid=training_steps on {type(path).__name__}",
                allowed="a model that was trained at whole times, as denoiser=diffusers or gaussian_mixture path=ddpm",
                remedy="Choose time_grid=uniform (with its shift for a flow), karras or uniform_lambda.",
            )
        at_least(1, steps=steps)
        start = self._start(path)
        self._check_count(path, start, steps)
        visited = self._visited(path, start, steps)
        self._check(path, [level.t for level in visited])
        if finite and visited[0].t > path.t_finite:
            visited[0] = path.level(float(math.floor(path.t_finite)))
        self._check_apart(visited)
        final = path.level(path.t_zero if self.end == "zero" else path.t_min)
        return Grid(path, (*visited[:steps], final), denoises_last=self.end == "denoise")

    def _visited(self, path: NoisePath, start: float, steps: int) -> list[Level]:
        visited = self._levels(path, start, steps + self.drops_last)
        if self.end != "zero" and visited[steps - 1].t == path.t_min:
            visited = self._levels(path, start, steps + 1)
        return visited

    def _levels(self, path: NoisePath, start: float, count: int) -> list[Level]:
        if self.spacing in ("karras", "lambda"):
            return self._noise_levels(path, start, count)
        return [path.level(float(t)) for t in self.times(path, start, path.t_min, count)]

    def _check_count(self, path: NoisePath, start: float, steps: int) -> None:
        most = int(start) + (self.end == "zero" and not self.drops_last)
        if steps > most or (steps == 1 and self.spacing == "leading" and not self.drops_last):
            raise ConfigurationError(
                "the training times do not make that many steps",
                found=f"sampler.steps={steps}, {int(start) + 1} training times, time_grid.spacing={self.spacing}",
                allowed=f"{1 + (self.spacing == 'leading')} to {most} steps",
                remedy="Change sampler.steps, or choose time_grid.spacing=trailing.",
            )

    def _check_apart(self, levels: list[Level]) -> None:
        together = [here.t for here, there in pairwise(levels) if here.t == there.t]
        if together:
            raise ConfigurationError(
                "two noise levels share a training time",
                found=f"t={together[0]:.0f} twice, time_grid.spacing={self.spacing}",
                allowed="levels at least one training time apart",
                remedy="Take fewer sampler.steps, or time_grid=karras or uniform_lambda, which ask in between.",
            )


def _check_belongs(name: str, value: float, spacings: tuple[str, ...], spacing: str) -> None:
    if value and spacing not in spacings:
        raise ConfigurationError(
            f"{name} has no meaning with this spacing",
            found=f"time_grid.{name}={value}, time_grid.spacing={spacing}",
            allowed=f"time_grid.spacing={' or '.join(spacings)}",
            remedy=f"Leave time_grid.{name} out, or choose another spacing.",
        )
