"""Sampling: one batch from noise to data, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightrail.errors import CompositionError
from lightrail.generation.denoiser import Condition, Denoiser, mapped_condition
from lightrail.generation.evaluator import Evaluator
from lightrail.generation.guidance import Guidance
from lightrail.generation.measurement import Observed
from lightrail.generation.noise import Noise
from lightrail.generation.sampler import Sampler, SamplerWrapper, State
from lightrail.generation.time_grid import Grid
from lightrail.traits import traits_of

__all__ = ["Sampled", "check_fit", "invert", "sample"]


@dataclass(frozen=True)
class Sampled:
    """A batch of samples.

    Args:
        x: The states at the end, ``[B, *shape]``, not decoded.
        start: Those that it began with; where guidance ran it several times, those of the last run.
        evaluations: How often the network was asked for each sample.
    """

    x: Tensor
    start: Tensor
    evaluations: int


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    sampler: Sampler,
    grid: Grid,
    indices: Sequence[int],
    *,
    seed: int = 0,
    condition: Condition | None = None,
    guidance: Sequence[Guidance] = (),
    observed: Observed | None = None,
    start: Tensor | None = None,
    after_step: Callable[[State], State] | None = None,
) -> Sampled:
    """Draws samples; the same seed and index give the same sample in any batch.

    Args:
        denoiser: The network on its path.
        sampler: The solver, with wrappers where there are some.
        grid: The levels it visits: ``sampler.grid(denoiser.path, time_grid)``.
        indices: Which samples, one whole number from 0 each.
        seed: Of the whole generation.
        condition: What steers them, one row each.
        guidance: What else does, in order.
        observed: What was measured of the samples that are sought, one row each.
        start: Where to start, ``[B, *shape]`` at ``grid[0]``; drawn where it is not given.
        after_step: Sees the state after each step and may change it.

    Example:
        >>> from lightrail.catalogue import load
        >>> from lightrail.generation import GaussianMixture, sample
        >>> mixture, sampler = GaussianMixture(), load("sampler", "ddim")(steps=50)
        >>> grid = sampler.grid(mixture.path, load("time_grid", sampler.grid_name)())
        >>> tuple(sample(mixture, sampler, grid, range(8), seed=1).x.shape)
        (8, 2)
    """
    noise = Noise(seed, indices, denoiser.shape, denoiser.dtype, denoiser.device)
    x = begin = denoiser.start(noise, grid[0]) if start is None else start
    _check_population(guidance, indices)
    candidates = math.prod(each.candidates for each in guidance)
    if candidates > 1:

        def widened(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(candidates, 0)

        begin, condition = widened(x), mapped_condition(condition, widened)
        observed = None if observed is None else observed.map(widened)
        rows = [index * candidates + j for index in indices for j in range(candidates)]
        noise = Noise(seed, rows, denoiser.shape, denoiser.dtype, denoiser.device)
    evaluator = Evaluator(denoiser, condition, guidance, grid, noise, observed)

    def after(state: State) -> State:
        state = evaluator.after_step(state) if guidance else state
        return state if after_step is None else after_step(state)

    started = begin

    def once(states: Tensor) -> State:
        nonlocal started
        started = states
        evaluator.begin()
        return sampler.solve(sampler.start(states, noise, grid), evaluator, grid, after)

    run: Callable[[Tensor], State] = once
    for number, each in reversed(list(enumerate(guidance))):
        run = partial(_around, each, evaluator, number, run)
    found = run(begin).x[::candidates]
    return Sampled(found, started[::candidates], evaluator.evaluations * candidates)


def _around(each: Guidance, evaluator: Evaluator, number: int, run: Callable[[Tensor], State], start: Tensor) -> State:
    return each.around(run, start, evaluator.before(number, start))


def _check_population(guidance: Sequence[Guidance], indices: Sequence[int]) -> None:
    for each in guidance:
        size = each.population
        if len(indices) % size or any(i // size != indices[0] // size + n // size for n, i in enumerate(indices)):
            raise CompositionError(
                f"the samples that {type(each).__name__} draws together are not together",
                found=f"{len(indices)} samples from number {indices[0]}",
                allowed=f"whole populations of {size}, one after the other",
                remedy=f"Draw a multiple of {size} samples, or make the populations smaller.",
            )


@torch.no_grad()
def invert(
    denoiser: Denoiser,
    sampler: Sampler,
    grid: Grid,
    x: Tensor,
    indices: Sequence[int],
    *,
    seed: int = 0,
    condition: Condition | None = None,
) -> Sampled:
    """Runs samples back to the noise that they would have come from.

    Args:
        denoiser: The network on its path.
        sampler: A sampler with an inverse.
        grid: The levels, as for :func:`sample`.
        x: The states at ``grid[-1]``, ``[B, *shape]``.
        indices: Which samples.
        seed: Of the whole generation.
        condition: What steers them.

    Raises:
        CompositionError: The sampler cannot be run backwards.
    """
    noise = Noise(seed, indices, denoiser.shape, denoiser.dtype, denoiser.device)
    evaluator = Evaluator(denoiser, condition)
    state = sampler.invert(State(x, noise, index=grid.steps), evaluator, grid)
    return Sampled(state.x, x, evaluator.evaluations)


def check_fit(denoiser: Denoiser, sampler: Sampler, options: Mapping[str, Any] | None = None) -> None:
    """Whether the network can give what the sampler asks.

    Args:
        denoiser: The network on its path.
        sampler: The solver, with wrappers where there are some.
        options: Those that the solver was built with, on which its needs may depend.

    Raises:
        CompositionError: It cannot.
    """
    while isinstance(sampler, SamplerWrapper):
        sampler = sampler.sampler
    needed = traits_of(type(sampler), options).needs_predictions
    lacking = [form for form in needed if form not in denoiser.gives]
    if lacking:
        raise CompositionError(
            f"{type(sampler).__name__} needs the {lacking[0]} prediction, which this model cannot give",
            found=f"a model that gives {', '.join(denoiser.gives)}",
            allowed=f"a model that gives {', '.join(needed)}",
            remedy="Choose a sampler that asks for what the model gives: flow_heun works with a flow.",
        )
