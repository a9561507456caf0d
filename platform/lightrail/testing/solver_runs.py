"""Running a solver on a mixture whose exact solution is known, step by step and under watch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightrail.errors import CompositionError
from lightrail.generation import (
    Condition,
    Denoiser,
    Evaluator,
    GaussianMixture,
    Grid,
    Level,
    Noise,
    NoisePath,
    Prediction,
    Sampler,
    State,
    TimeGrid,
    check_fit,
)
from lightrail.generation.gaussian_mixture import PATHS
from lightrail.testing.suite import require
from lightrail.traits import Traits

__all__ = [
    "EvenLambda",
    "FixedNoise",
    "Gaussian",
    "Solver",
    "UnevenLambda",
    "Watched",
    "at_rows",
    "begun",
    "continued",
    "exact_solution",
    "fitting_mixture",
    "grid_of",
    "mixture_on",
    "ready",
    "require_near",
    "rms",
    "solved",
    "starts",
]

EXACT = 1e-10  # what another order of summation may change, with room for a method that amplifies it
LAST_LAM = 1.75  # where runs that keep some noise stop: σ/α = 0.17


class EvenLambda(TimeGrid):
    """Equal steps in λ from the noisy end; without another ``stop`` some noise stays in unless ``end`` is zero."""

    def times(self, path: NoisePath, start: float, stop: float, count: int) -> np.ndarray:
        ends = path.lam(torch.tensor([min(start, path.t_finite), stop], dtype=torch.float64))
        lams = self.spaced(float(ends[0]), float(ends[1]), count)
        times = path.t_of_lam(torch.from_numpy(lams)).numpy().copy()
        times[0], times[-1] = start, stop
        return times

    def spaced(self, first: float, last: float, count: int) -> np.ndarray:
        """``count`` values of λ, both ends included."""
        return np.linspace(first, last, count)


class UnevenLambda(EvenLambda):
    """Steps in λ of random lengths, up to four times as long as their neighbours."""

    def __init__(self, start: float | None = None, stop: float | None = None, end: str = "zero", seed: int = 0) -> None:
        super().__init__(start, stop, end)
        self.seed = seed

    def spaced(self, first: float, last: float, count: int) -> np.ndarray:
        lams = np.linspace(first, last, count)
        shift = np.random.default_rng(self.seed).uniform(-0.3, 0.3, count)
        shift[0] = shift[-1] = 0
        return lams + shift * (last - first) / max(count - 1, 1)


@dataclass(frozen=True)
class Solver:
    """How a check builds what it runs.

    Args:
        build: Takes the number of steps, ``None`` for what the options say, and the model.
        traits: What it says of itself.
        takes_steps: Whether ``build`` takes a number of steps.
    """

    build: Callable[[int | None, Denoiser], Sampler]
    traits: Traits
    takes_steps: bool = True

    def of(self, mixture: Denoiser, steps: int | None = None) -> Sampler:
        """Built, and shown the model."""
        sampler = self.build(steps if self.takes_steps else None, mixture)
        check_fit(mixture, sampler)
        sampler.prepare(mixture)
        return sampler


class Gaussian(Denoiser):
    """The exact denoiser of N(mean, variance I) for states of any shape."""

    form = "data"
    dtype = torch.float64

    def __init__(self, path: NoisePath, shape: tuple[int, ...], mean: Tensor, variance: float) -> None:
        self.path = path
        self.shape = shape
        self.mean = mean
        self.variance = variance

    def output(self, x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        level = self.path.levels(t, x.ndim)
        gain = level.alpha * self.variance / (level.alpha**2 * self.variance + level.sigma**2)
        return self.mean + gain * (x.double() - level.alpha * self.mean)

    def moments(self) -> tuple[Tensor, Tensor]:
        flat = self.mean.expand(self.shape).flatten()
        return flat, self.variance * torch.eye(len(flat), dtype=torch.float64)


class FixedNoise(Noise):
    """Noise that is the same numbers in every type, and that counts how often it is asked."""

    def __init__(self, seed: int, indices: Sequence[int], shape: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__(seed, indices, shape, dtype)
        self.draws = 0

    def normal(self, step: int, draw: int = 0) -> Tensor:
        self.draws += 1
        return Noise(self.seed, self.indices, self.shape).normal(step, draw).to(self.dtype)

    def uniform(self, step: int, draw: int = 0, shape: Sequence[int] = ()) -> Tensor:
        self.draws += 1
        return Noise(self.seed, self.indices, self.shape).uniform(step, draw, shape).to(self.dtype)


class Watched(Evaluator):
    """Sees that the network is asked only where noise is left, and that what went in and out stays as it was."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser)
        self._seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, level: Level, *, network_time: Tensor | float | None = None) -> Prediction:
        has_noise = bool((torch.as_tensor(level.sigma) > 0).all())
        require(has_noise, "it asks the network at σ = 0, where the noise cannot be told from the data")
        found = super().__call__(x, level, network_time=network_time)
        self._seen += [(tensor, tensor.clone()) for tensor in (x, *found.known.values())]
        return found

    def require_untouched(self) -> None:
        """What the network was given and what it answered are what they were."""
        for tensor, before in self._seen:
            require(torch.equal(tensor, before), "it changes in place a state or a prediction that it was given")


@functools.cache
def mixture_on(path: str) -> GaussianMixture:
    """The mixture of the checks on a path by name: one object for all, so that its solutions can be kept."""
    return GaussianMixture(path=path)


@functools.lru_cache(maxsize=256)
def exact_solution(mixture: GaussianMixture, begin: Level, times: tuple[float, ...]) -> Tensor:
    """The exact states ``[times, 16, 2]`` from :func:`starts`; worked out once for all solvers."""
    return mixture.exact(starts(mixture, begin), begin.t, times)


def starts(denoiser: Denoiser, level: Level, count: int = 16) -> Tensor:
    """States to start from, the same for every solver."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn((count, *denoiser.shape), generator=generator, dtype=torch.float64)
    return (drawn * denoiser.path.starting_scale(level)).to(denoiser.dtype)


def grid_of(
    sampler: Sampler, path: NoisePath, end: str = "minimum", uneven: int | None = None, **ends: float | None
) -> Grid:
    """The levels that a sampler visits: even in λ, or uneven from a seed.

    Args:
        sampler: Whose steps they are.
        path: The noise path.
        end: ``zero``, ``minimum`` or ``denoise``; without σ = 0 they stop at λ = 1.75.
        uneven: The seed of uneven steps.
        ends: ``start`` or ``stop`` where they are others.
    """
    stop = None if end == "zero" else float(path.t_of_lam(torch.tensor(LAST_LAM, dtype=torch.float64)))
    given: dict[str, Any] = {"start": path.t_finite, "stop": stop, "end": end, **ends}
    return sampler.grid(path, EvenLambda(**given) if uneven is None else UnevenLambda(**given, seed=uneven))


def begun(
    sampler: Sampler, denoiser: Denoiser, grid: Grid, start: Tensor, seed: int = 0, indices: Sequence[int] | None = None
) -> State:
    """The state before the first step."""
    noise = FixedNoise(seed, range(len(start)) if indices is None else indices, denoiser.shape, denoiser.dtype)
    with torch.no_grad():
        return sampler.start(start, noise, grid)


@torch.no_grad()
def continued(sampler: Sampler, state: State, evaluator: Evaluator, grid: Grid, until: int | None = None) -> State:
    """The state after further steps: all of them, or until ``index`` is ``until``."""
    if until is None:
        return sampler.solve(state, evaluator, grid)
    while state.index < until:
        state = sampler.step(state, evaluator, grid)
    return state


def solved(
    sampler: Sampler,
    denoiser: Denoiser,
    grid: Grid,
    start: Tensor,
    seed: int = 0,
    indices: Sequence[int] | None = None,
) -> Tensor:
    """Where a run from ``start`` ends."""
    state = begun(sampler, denoiser, grid, start, seed, indices)
    return continued(sampler, state, Evaluator(denoiser), grid).x


def fitting_mixture(solver: Solver) -> GaussianMixture:
    """The mixture on the first path that the solver works on.

    Raises:
        NonConformance: There is none.
    """
    refusals = []
    for path in PATHS:
        mixture = mixture_on(path)
        try:
            sampler = solver.of(mixture)
            grid = grid_of(sampler, mixture.path)
            solved(sampler, mixture, grid, starts(mixture, grid[0], 2))
        except CompositionError as error:
            refusals.append(f"{path}: {error.what}")
        else:
            return mixture
    require(False, f"it works on no path of noise: {'; '.join(refusals)}")
    raise AssertionError  # unreachable: `require` has raised


def ready(solver: Solver) -> tuple[GaussianMixture, Sampler, Grid, Tensor]:
    mixture = fitting_mixture(solver)
    sampler = solver.of(mixture)
    grid = grid_of(sampler, mixture.path)
    return mixture, sampler, grid, starts(mixture, grid[0], 5)


def require_near(found: Tensor, expected: Tensor, message: str, allowed: float = EXACT) -> None:
    difference = float((found.double() - expected.double()).abs().max())
    scale = max(1.0, float(expected.abs().max()))
    require(difference <= allowed * scale, f"{message}: they differ by {difference:.3g}")


def rms(difference: Tensor) -> float:
    """The root mean square."""
    return float(difference.double().square().mean().sqrt())


def at_rows(state: State, rows: Sequence[int]) -> State:
    """Some rows of a state, each with the noise that it had."""
    noise = state.noise
    kept = FixedNoise(noise.seed, [noise.indices[row] for row in rows], noise.shape, noise.dtype)
    return dataclasses.replace(state.select(torch.tensor(rows)), noise=kept)
