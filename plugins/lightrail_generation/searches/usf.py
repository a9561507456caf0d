"""S³: a schedule of steps for USF, by evolution with a predictor of scores."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lightrail.errors import CompositionError
from lightrail.generation import Grid, Level
from lightrail.generation.search import Artefact, Report, Search, SearchProblem, silent
from lightrail.options import at_least, between, one_of
from lightrail.traits import Traits
from lightrail_generation.samplers.usf import DERIVATIVES, FORMS, FURTHEST, USF, SolverStep
from lightrail_generation.searches.autodiffusion import (
    SCORERS,
    Subset,
    candidate_levels,
    crossed,
    mutated,
    random_subset,
    refuse_too_few,
)

__all__ = ["USFSearch"]

KNOWN = tuple(
    SolverStep(order, "data", derivatives, corrector)
    for order, derivatives, corrector in ((2, "bh2", False), (3, "bh2", False), (2, "bh2", True), (3, "bh2", True))
)


@dataclass(frozen=True)
class _Candidate:
    """Which of the possible times are visited after the first, and how each step is solved."""

    subset: Subset
    steps: tuple[SolverStep, ...]


class _Space:
    """All candidates: how one is drawn, changed, crossed and told in numbers."""

    def __init__(self, choices: int, count: int, chance: float, rng: np.random.Generator) -> None:
        self.choices = choices
        self.count = count
        self.chance = chance
        self.rng = rng

    def draw(self) -> _Candidate:
        steps = tuple(self._step(index) for index in range(self.count))
        return _Candidate(random_subset(self.choices, self.count - 1, self.rng), steps)

    def _step(self, index: int) -> SolverStep:
        rng = self.rng
        back = int(rng.integers(min(FURTHEST, index) + 1)) if rng.random() < 0.25 else 0
        derivatives = "exact" if back else str(rng.choice(DERIVATIVES))
        order = int(rng.integers(1, min(4, index + 1) + 1))
        return SolverStep(order, str(rng.choice(FORMS)), derivatives, bool(rng.random() < 0.5), back)

    def mutate(self, parent: _Candidate) -> _Candidate:
        subset = mutated(parent.subset, self.choices, self.chance, self.rng)
        return _Candidate(subset, tuple(self._changed(step, index) for index, step in enumerate(parent.steps)))

    def _changed(self, step: SolverStep, index: int) -> SolverStep:
        """Each choice is drawn afresh by chance."""
        fresh = self._step(index)
        names = ("order", "form", "derivatives", "corrector", "back")
        changes = {name: getattr(fresh, name) for name in names if self.rng.random() < self.chance}
        if changes.get("back", step.back):
            changes["derivatives"] = "exact"
        return dataclasses.replace(step, **changes)

    def cross(self, mother: _Candidate, father: _Candidate) -> _Candidate | None:
        subset = crossed(mother.subset, father.subset, self.rng)
        if subset is None:
            return None
        pairs = zip(mother.steps, father.steps, strict=True)
        return _Candidate(subset, tuple(m if self.rng.random() < 0.5 else f for m, f in pairs))

    def numbers(self, candidate: _Candidate) -> list[float]:
        """What the predictor sees."""
        row = [index / self.choices for index in candidate.subset]
        for step in candidate.steps:
            row += [step.order, step.form == "noise", step.corrector, step.back]
            row += [step.derivatives == each for each in DERIVATIVES]
        return [float(each) for each in row]


class USFSearch(Search):
    """Searches the times and, for each step, the order, form, derivatives, corrector and start of ``usf``.

    Some schedules are scored; a forest of regression trees learns scores from schedules; of many children of the best
    those of which it expects most are scored in their turn; and so on. It is never worse, on the samples that it
    scores on, than UniPC and DPM-Solver++(2M) on the given time grid, which are among the first.

    Args:
        scorer: ``endpoint_error``, the distance of each sample from the fine solution of its own start, or
            ``sliced_wasserstein``, that of the samples from the data (from fine solutions where none are known).
        initial: Schedules that are scored first, at least 4.
        rounds: How often the predictor learns and proposes, at least 0.
        scored: Schedules that are scored in each round, at least 1.
        children: From which those are chosen, at least ``scored``.
        kept: The best so far, from which children are made, at least 1.
        chance: Of one choice to be mutated, in (0, 1].
        resolution: Where a path has no training steps of its own: possible times in each interval, at least 1.
        samples: On which schedules are scored, at least 2.
        held_out: Other samples, for the scores in the table, at least 2.

    Raises:
        ConfigurationError: An option is out of range, or there are fewer possible times than steps.
        CompositionError: The model tells no data.

    Deviations:
        The published score is FID, and its predictor a network trained on rankings of schedules; no code was published.

    Example:
        >>> USFSearch(rounds=2).scorer
        'endpoint_error'

    Reference:
        E. Liu, X. Ning, H. Yang and Y. Wang (2023), A Unified Sampling Framework for Solver Searching of Diffusion
        Probabilistic Models, arXiv 2312.07243.
    """

    traits: ClassVar[Traits] = Traits(
        rule="argmin over schedules of the score, by evolution with a predictor",
        paper="E. Liu, X. Ning, H. Yang, Y. Wang, 2023, A Unified Sampling Framework for Solver Searching of Diffusion "
        "Probabilistic Models, arXiv 2312.07243",
        is_stochastic=True,
        needs_predictions=("data",),
        example={"initial": 8, "rounds": 1, "scored": 4, "children": 16, "samples": 8, "held_out": 8},
    )
    replaces: ClassVar[tuple[str, ...]] = ("sampler", "time_grid")

    def __init__(
        self,
        scorer: str = "endpoint_error",
        initial: int = 50,
        rounds: int = 10,
        scored: int = 20,
        children: int = 400,
        kept: int = 15,
        chance: float = 0.15,
        resolution: int = 50,
        samples: int = 64,
        held_out: int = 256,
    ) -> None:
        one_of(SCORERS, scorer=scorer)
        at_least(len(KNOWN), initial=initial)
        at_least(0, rounds=rounds)
        at_least(1, scored=scored, kept=kept, resolution=resolution)
        at_least(scored, children=children)
        at_least(2, samples=samples, held_out=held_out)
        between(0, 1, closed="right", chance=chance)
        self.scorer = scorer
        self.initial = initial
        self.rounds = rounds
        self.scored = scored
        self.children = children
        self.kept = kept
        self.chance = chance
        self.resolution = resolution
        self.samples = samples
        self.held_out = held_out

    def search(self, problem: SearchProblem, report: Report = silent) -> Artefact:
        if "data" not in problem.denoiser.gives:
            raise _no_data(problem)
        levels, own = candidate_levels(problem.denoiser.path, problem.grid, self.resolution)
        refuse_too_few(levels, own, problem.grid.steps)
        rng = np.random.default_rng(problem.seed)
        space = _Space(len(levels) - 1, problem.grid.steps, self.chance, rng)
        first = tuple(index - 1 for index in own[1:])
        score = self._scored(problem, levels)
        scores: dict[_Candidate, float] = {}
        total = self.initial + self.rounds * self.scored
        self._try([_Candidate(first, (step,) * space.count) for step in KNOWN], scores, score, report, total)
        drawn = _fresh(space.draw, self.initial - len(scores), scores)
        self._try(drawn, scores, score, report, total)
        history = [min(scores.values())]
        for _ in range(self.rounds):
            self._try(self._proposed(space, scores, problem.seed), scores, score, report, total)
            history.append(min(scores.values()))
        best = min(scores, key=scores.__getitem__)
        return self._found(problem, best, levels, history)

    def _found(self, problem: SearchProblem, best: _Candidate, levels: list[Level], history: list[float]) -> Artefact:
        sampler, grid = _made(problem, best, levels)
        held_out = range(self.samples, self.samples + self.held_out)
        values = {
            "times": [level.t for level in grid],
            "denoises_last": grid.denoises_last,
            "schedule": [dataclasses.asdict(step) for step in best.steps],
            "scores": history,
        }
        after = problem.scores(held_out, sampler=sampler, grid=grid)
        return Artefact("usf", problem.key(), values, problem.scores(held_out), after)

    def _scored(self, problem: SearchProblem, levels: list[Level]) -> Callable[[_Candidate], float]:
        indices = range(self.samples)
        compare = problem.distance if self.scorer == "sliced_wasserstein" else problem.endpoint_error

        def score(candidate: _Candidate) -> float:
            sampler, grid = _made(problem, candidate, levels)
            found = compare(problem.samples(indices, sampler=sampler, grid=grid), indices)
            return found if math.isfinite(found) else math.inf

        return score

    def _try(
        self,
        candidates: list[_Candidate],
        scores: dict[_Candidate, float],
        score: Callable[[_Candidate], float],
        report: Report,
        total: int,
    ) -> None:
        for candidate in candidates:
            scores[candidate] = score(candidate)
            report(len(scores), total, min(scores.values()))

    def _proposed(self, space: _Space, scores: dict[_Candidate, float], seed: int) -> list[_Candidate]:
        """The children of the best that the predictor puts first."""
        from sklearn.ensemble import ExtraTreesRegressor

        best = sorted(scores, key=scores.__getitem__)[: self.kept]

        def parent() -> _Candidate:
            return best[int(space.rng.integers(len(best)))]

        def child() -> _Candidate | None:
            return space.mutate(parent()) if space.rng.random() < 0.6 else space.cross(parent(), parent())

        children = _fresh(child, self.children, scores)
        known = [each for each in scores if math.isfinite(scores[each])]
        predictor = ExtraTreesRegressor(100, random_state=seed, n_jobs=1)
        predictor.fit([space.numbers(each) for each in known], [math.log(scores[each] + 1e-12) for each in known])
        expected = predictor.predict([space.numbers(each) for each in children]) if children else []
        ranked = [children[i] for i in np.argsort(expected, kind="stable")]
        return ranked[: self.scored]

    def words(self, artefact: Artefact, path: str) -> list[str]:
        steps = len(artefact.values["schedule"])
        solver = ["+sampler=usf", f"sampler.steps={steps}", f"sampler.schedule={path}"]
        return [*solver, "+time_grid=searched", f"time_grid.file={path}"]


def _fresh(
    make: Callable[[], _Candidate | None], count: int, seen: dict[_Candidate, float], attempts: int = 20
) -> list[_Candidate]:
    """New candidates, as many as are found in so many attempts each."""
    found: dict[_Candidate, None] = {}
    for _ in range(count * attempts):
        if len(found) >= count:
            break
        if (candidate := make()) is not None and candidate not in seen:
            found[candidate] = None
    return list(found)


def _made(problem: SearchProblem, candidate: _Candidate, levels: list[Level]) -> tuple[USF, Grid]:
    chosen = (levels[0], *(levels[index + 1] for index in candidate.subset), problem.grid[-1])
    sampler = USF(schedule=[dataclasses.asdict(step) for step in candidate.steps])
    return sampler, Grid(problem.grid.path, chosen, problem.grid.denoises_last)


def _no_data(problem: SearchProblem) -> CompositionError:
    return CompositionError(
        "usf solves in the data and noise forms, which this model cannot give",
        found=f"a model that gives {', '.join(problem.denoiser.gives)}",
        allowed="a model that gives data",
        remedy="Choose another search: autodiffusion fits the times of any solver.",
    )
