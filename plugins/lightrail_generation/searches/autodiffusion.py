"""AutoDiffusion: the times of a few-step solver, by evolution."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import ClassVar

import numpy as np

from lightrail.errors import ConfigurationError
from lightrail.generation import Grid, Level, NoisePath, TableVP
from lightrail.generation.search import Artefact, Report, Search, SearchProblem, silent
from lightrail.options import at_least, between, one_of
from lightrail.traits import Traits
from lightrail_generation.searches.evolution import Evolution, evolve

__all__ = ["SCORERS", "AutoDiffusion", "candidate_levels", "crossed", "mutated", "random_subset", "refuse_too_few"]

SCORERS = ("sliced_wasserstein", "endpoint_error")

Subset = tuple[int, ...]


def random_subset(choices: int, count: int, rng: np.random.Generator) -> Subset:
    """``count`` of the numbers below ``choices``, sorted.

    Example:
        >>> random_subset(3, 3, np.random.default_rng(0))
        (0, 1, 2)
    """
    return tuple(sorted(int(i) for i in rng.choice(choices, count, replace=False)))


def mutated(parent: Subset, choices: int, chance: float, rng: np.random.Generator) -> Subset:
    """Each number is replaced, by ``chance``, by one that is not in the set.

    Example:
        >>> mutated((0, 2), 4, 0.0, np.random.default_rng(0))
        (0, 2)
    """
    genes = list(parent)
    for place in range(len(genes)):
        if rng.random() < chance and len(genes) < choices:
            free = np.setdiff1d(np.arange(choices), genes)
            genes[place] = int(rng.choice(free))
    return tuple(sorted(genes))


def crossed(mother: Subset, father: Subset, rng: np.random.Generator) -> Subset | None:
    """Each gene from one parent or the other by the toss of a coin; ``None`` where a number would come twice.

    Example:
        >>> crossed((0, 2), (0, 2), np.random.default_rng(0))
        (0, 2)
    """
    genes = {m if rng.random() < 0.5 else f for m, f in zip(mother, father, strict=True)}
    return tuple(sorted(genes)) if len(genes) == len(mother) else None


def candidate_levels(path: NoisePath, grid: Grid, between_knots: int) -> tuple[list[Level], Subset]:
    """The levels at which a step may begin, and which of them the grid itself uses.

    On a path of training steps they are those; on others each interval of the grid in equal parts in λ (in time where
    λ is infinite), down to the smallest time at which the network is asked.

    Args:
        path: The noise path.
        grid: What the search begins with.
        between_knots: Parts of an interval, at least 1.
    """
    if isinstance(path, TableVP):
        own = [round(level.t) for level in grid.levels[:-1]]
        last = grid[-1].t
        times = [t for t in range(max(own), int(np.ceil(max(path.t_min, last))) - 1, -1) if t > last]
        return [path.level(float(t)) for t in times], tuple(sorted({times.index(t) for t in own if t in times}))
    smallest = path.level(path.t_min)
    knots = list(grid.levels)
    knots[-1] = smallest if grid[-1].is_clean and smallest.lam > grid[-2].lam else knots[-1]
    levels: list[Level] = []
    for here, there in pairwise(knots):
        levels.extend(_parts(path, here, there, between_knots))
    if grid[-1].is_clean and knots[-1] is smallest:
        levels.append(smallest)
    return levels, tuple(range(0, grid.steps * between_knots, between_knots))[: grid.steps]


def _parts(path: NoisePath, here: Level, there: Level, count: int) -> list[Level]:
    if there.is_clean:  # the network is not asked below the level that the grid ends with
        return [here]
    if np.isinf(here.lam):
        return [here, *(path.level(here.t + (there.t - here.t) * i / count) for i in range(1, count))]
    return [here, *(path.level_at_lam(here.lam + (there.lam - here.lam) * i / count) for i in range(1, count))]


class AutoDiffusion(Search):
    """Searches the times at which a solver asks the network, by evolution over sorted subsets of all times.

    A candidate is K of the possible times; the last level is the grid's own. Of each population the best are kept;
    the next one is mutated from them, crossed from them and drawn afresh, and none is tried twice. All candidates are
    scored on the same starts and the same noise.

    Args:
        scorer: ``sliced_wasserstein``, the distance of the samples from the data (from fine solutions where no data
            are known), or ``endpoint_error``, that of each sample from the fine solution of its own start.
        epochs: Populations, at least 1.
        population: Candidates in each, at least 2; the first is the grid itself, mutations of it, and random subsets.
        kept: Of each population, at least 1, at most ``population``.
        mutations: New candidates by mutation in each population after the first.
        crossings: New candidates by crossing.
        chance: Of one time to be mutated, in (0, 1].
        resolution: Where a path has no training steps of its own: possible times in each interval, at least 1.
        moves_start: Whether sampling may begin at another level than the grid does.
        samples: On which candidates are scored, at least 2.
        held_out: Other samples, for the scores in the table, at least 2.

    Raises:
        ConfigurationError: An option is out of range, or there are fewer possible times than steps.
        CompositionError: A stochastic sampler is to be scored by the end of each solution.

    Deviations:
        The published score is the FID of about 1000 samples, which needs a network of its own. Layers of the model are
        not searched. The published start is free to move; here it is kept unless ``moves_start`` is set. Mutation
        replaces a time by an unused one, where the published code tries again after a collision.

    Example:
        >>> AutoDiffusion(epochs=2).scorer
        'sliced_wasserstein'

    Reference:
        L. Li et al. (2023), AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for Automated
        Diffusion Model Acceleration, arXiv 2309.10438, section 3.
    """

    traits: ClassVar[Traits] = Traits(
        rule="{t_1 > … > t_K} by evolution over subsets of all times",
        paper="L. Li et al., 2023, AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for "
        "Automated Diffusion Model Acceleration, arXiv 2309.10438",
        is_stochastic=True,
        example={"epochs": 2, "population": 8, "kept": 3, "mutations": 3, "crossings": 3, "samples": 8, "held_out": 8},
    )

    replaces: ClassVar[tuple[str, ...]] = ("time_grid",)

    def __init__(
        self,
        scorer: str = "sliced_wasserstein",
        epochs: int = 10,
        population: int = 50,
        kept: int = 10,
        mutations: int = 25,
        crossings: int = 10,
        chance: float = 0.1,
        resolution: int = 100,
        moves_start: bool = False,
        samples: int = 256,
        held_out: int = 256,
    ) -> None:
        one_of(SCORERS, scorer=scorer)
        at_least(1, resolution=resolution)
        at_least(2, samples=samples, held_out=held_out)
        between(0, 1, closed="right", chance=chance)
        self.scorer = scorer
        self.evolution = Evolution(epochs, population, kept, mutations, crossings)
        self.chance = chance
        self.resolution = resolution
        self.moves_start = moves_start
        self.samples = samples
        self.held_out = held_out

    def search(self, problem: SearchProblem, report: Report = silent) -> Artefact:
        if self.scorer == "endpoint_error":
            problem.refuse_stochastic("autodiffusion")
        levels, own = candidate_levels(problem.denoiser.path, problem.grid, self.resolution)
        refuse_too_few(levels, own, problem.grid.steps)
        fixed = 0 if self.moves_start else 1
        choices, count = len(levels) - fixed, problem.grid.steps - fixed
        rng = np.random.default_rng(problem.seed)

        def grid_of(subset: Subset) -> Grid:
            chosen = [levels[0]] * fixed + [levels[i + fixed] for i in subset]
            return Grid(problem.grid.path, (*chosen, problem.grid[-1]), problem.grid.denoises_last)

        first = tuple(i - fixed for i in own[fixed:])
        best, _, history = evolve(
            self.evolution,
            first,
            self._scored(problem, grid_of),
            lambda: random_subset(choices, count, rng),
            lambda parent: mutated(parent, choices, self.chance, rng),
            lambda mother, father: crossed(mother, father, rng),
            rng,
            report,
        )
        grid = grid_of(best)
        values = {"times": [level.t for level in grid], "denoises_last": grid.denoises_last, "scores": history}
        held_out = range(self.samples, self.samples + self.held_out)
        return Artefact(
            "autodiffusion", problem.key(), values, problem.scores(held_out), problem.scores(held_out, grid=grid)
        )

    def _scored(self, problem: SearchProblem, grid_of: Callable[[Subset], Grid]) -> Callable[[Subset], float]:
        indices = range(self.samples)
        compare = problem.distance if self.scorer == "sliced_wasserstein" else problem.endpoint_error

        def score(subset: Subset) -> float:
            found = compare(problem.samples(indices, grid=grid_of(subset)), indices)
            return found if np.isfinite(found) else float("inf")

        return score

    def words(self, artefact: Artefact, path: str) -> list[str]:
        return ["+time_grid=searched", f"time_grid.file={path}"]


def refuse_too_few(levels: list[Level], own: Subset, steps: int) -> None:
    """Raises:
    ConfigurationError: There are fewer possible times than steps, or the grid's own are not among them.
    """
    if len(own) < steps or len(levels) < steps:
        raise ConfigurationError(
            "there are fewer possible times than steps",
            found=f"{len(levels)} times, {len(own)} of them the grid's own; {steps} steps",
            allowed="as many times as steps, or more",
            remedy="Take fewer sampler.steps, or a larger search.resolution.",
        )
