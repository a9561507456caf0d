"""Time travel: goes back up the path with fresh noise, and solves the same steps again."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

from torch import Tensor

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import Denoiser, Guidance, Level, Moment, Noise, Sampler, State, weighted_sum
from lightrail.options import at_least, between
from lightrail.traits import Traits
from lightrail_generation.samplers.bdia import BDIA
from lightrail_generation.samplers.usf import USF

__all__ = ["TimeTravel", "renoised"]

# Its draws are apart from those of other guidance at the same step.
GOLDEN = 0x9E3779B97F4A7C15


def renoised(x: Tensor, here: Level, there: Level, z: Tensor) -> Tensor:
    """x_s = (α_s/α_t) x_t + √(σ_s² − (α_s/α_t)² σ_t²) z: a draw of p(x_s | x_t).

    Args:
        x: x_t.
        here: t.
        there: s, with at least as much noise.
        z: Standard normal numbers.
    """
    ratio = there.alpha / here.alpha
    variance: Any = there.sigma**2 - (ratio * here.sigma) ** 2
    if isinstance(variance, Tensor):
        return (ratio * x.double() + variance.clamp(min=0).sqrt() * z).to(x.dtype)
    return weighted_sum((ratio, x), (math.sqrt(max(0.0, variance)), z))


class TimeTravel(Guidance):
    """Goes back ``length`` steps with fresh noise and takes them again, ``repeats`` times, within a part of the run.

    x_s = (α_s/α_t) x_t + √(σ_s² − (α_s/α_t)² σ_t²) z

    What other guidance has moved out of the place where the network knows its way is so brought back there. The steps
    from ``start`` to ``stop`` are cut into stretches of ``length``; at the end of each the states go back to its
    beginning. A run costs ``repeats · length`` steps more for each whole stretch. Alone it changes the samples, and not
    their distribution.

    Put it last in a chain, so that it repeats what the others do.

    Args:
        repeats: How often each stretch is taken again, at least 0; 0 is the run without it.
        length: Steps of a stretch, at least 1.
        start: Where the first stretch begins, as a share of the steps, in [0, 1].
        stop: Where the last one ends at the latest, in [0, 1], at least ``start``.

    Raises:
        ConfigurationError: An option is out of range.
        CompositionError: The sampler carries states from step to step that going back would leave behind (``bdia``,
            ``dmcmc``, ``usf`` with such steps).

    Deviations:
        The paper goes back one step, by the noise that the network predicts; here noise is fresh, as in the other works
        named below, so that the states at s are distributed as they should be. What the sampler carries along is
        forgotten: a multistep sampler begins each repetition with its first-order step. A sampler that draws noise
        draws other numbers in each repetition.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail_generation.samplers.ddim import DDIM
        >>> from lightrail_generation.time_grids.uniform import Uniform
        >>> mixture, sampler = GaussianMixture(), DDIM(steps=10)
        >>> grid = sampler.grid(mixture.path, Uniform())
        >>> travel = TimeTravel(repeats=2, length=3, start=0.2, stop=0.9)  # steps 2 to 5, and 5 to 8
        >>> sample(mixture, sampler, grid, range(4), guidance=[travel]).evaluations
        22

    Reference:
        C. Mou, X. Wang, J. Song, Y. Shan and J. Zhang (2024), DiffEditor: Boosting Accuracy and Flexibility on
        Diffusion-based Image Editing, arXiv 2402.02583. With fresh noise: A. Lugmayr and others (2022), RePaint:
        Inpainting using Denoising Diffusion Probabilistic Models, arXiv 2201.09865; J. Yu and others (2023), FreeDoM:
        Training-Free Energy-Guided Conditional Diffusion Model, arXiv 2303.09833.
    """

    traits: ClassVar[Traits] = Traits(
        rule="x_s = (α_s/α_t) x_t + √(σ_s² − (α_s/α_t)² σ_t²) z, and the steps from s to t again",
        paper="C. Mou, X. Wang, J. Song, Y. Shan, J. Zhang, 2024, DiffEditor: Boosting Accuracy and Flexibility on "
        "Diffusion-based Image Editing, arXiv 2402.02583",
        is_stochastic=True,
        example={"repeats": 1, "length": 1},
    )

    def __init__(self, repeats: int = 2, length: int = 1, start: float = 0.2, stop: float = 0.8) -> None:
        at_least(0, repeats=repeats)
        at_least(1, length=length)
        between(0, 1, closed="both", start=start, stop=stop)
        if stop < start:
            raise ConfigurationError(
                "the window ends before it starts",
                found=f"start={start}, stop={stop}",
                allowed="start of at most stop, both shares of the steps",
                remedy="Lower start, or raise stop.",
            )
        self.repeats = repeats
        self.length = length
        self.start = start
        self.stop = stop

    def prepare(self, denoiser: Denoiser, sampler: Sampler) -> None:
        solver = sampler.solver
        reason = _why_it_cannot_go_back(solver)
        if reason:
            raise CompositionError(
                f"TimeTravel cannot go back with {type(solver).__name__}, {reason}",
                found=f"{type(solver).__name__} with TimeTravel",
                allowed="a sampler that can go on from states alone",
                remedy="Choose another sampler, such as ddim, dpm_solver_pp or unipc.",
            )

    def after_step(self, state: State, moment: Moment) -> State:
        went_back = state.index <= moment.index  # another guidance has
        if went_back or not self.repeats or not self._ends_stretch(state.index, moment.grid.steps):
            return state
        done = moment.memory.get("done", 0)
        if done == self.repeats:
            moment.memory["done"] = 0
            return state
        moment.memory["done"] = done + 1
        index = state.index - self.length
        z = moment.normal()
        x = renoised(state.x, moment.grid[state.index], moment.grid[index], z)
        return dataclasses.replace(state, x=x, index=index, noise=_reseeded(state.noise), history=(), memory={})

    def _ends_stretch(self, index: int, steps: int) -> bool:
        # Shares such as 0.3 · 10 steps are whole up to rounding.
        first, last = math.ceil(self.start * steps - 1e-9), math.floor(self.stop * steps + 1e-9)
        return first < index <= last and (index - first) % self.length == 0


def _why_it_cannot_go_back(solver: Sampler) -> str:
    """What it carries from step to step that would be left behind; nothing for most."""
    if isinstance(solver, BDIA):
        return "which steps from the state before the last"
    if not solver.card.descends:
        return "whose samples are at levels of their own"
    if isinstance(solver, USF) and any(entry.back or entry.corrector for entry in solver.schedule):
        return "whose schedule looks back at earlier states"
    return ""


def _reseeded(noise: Noise) -> Noise:
    """Noise of another seed: a step that is taken again must not add the same numbers again."""
    return Noise((noise.seed + GOLDEN) % 2**64, noise.indices, noise.shape, noise.dtype, noise.device)
