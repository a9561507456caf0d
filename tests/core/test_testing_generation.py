"""The suites of sampler wrappers, time grids, denoisers and searches fail each check on what breaks it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from lightrail.errors import CompositionError
from lightrail.generation import (
    Condition,
    GaussianMixture,
    Grid,
    KarrasVE,
    Level,
    LinearVP,
    Noise,
    NoisePath,
    Predict,
    Prediction,
    Sampler,
    SamplerWrapper,
    State,
    TimeGrid,
)
from lightrail.generation.search import Artefact, Report, Search, SearchProblem, silent
from lightrail.testing import DenoiserSuite, SamplerWrapperSuite, SearchSuite, TimeGridSuite, examine
from lightrail.testing.sampler_wrapper import SecondOrder
from lightrail.testing.solver_runs import EvenLambda
from lightrail.testing.suite import name_of
from lightrail.traits import Traits

PAPER = "A. Author, 2024, A Paper, arXiv 0000.00000"


def failed(suite: Any, plugin: Any) -> set[str]:
    return {name_of(check) for check in suite.checks if examine(check, plugin).state == "failed"}


# Wrappers


class Shortens(SamplerWrapper):
    """Shrinks what is predicted by a share."""

    traits: ClassVar[Traits] = Traits(paper=PAPER)

    def __init__(self, sampler: Sampler, share: float = 0.01) -> None:
        super().__init__(sampler)
        self.share = share

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        def shorter(x: Tensor, level: Level, *, network_time: Tensor | float | None = None) -> Prediction:
            found = predict(x, level, network_time=network_time)
            return found.with_data(found.data * (1 - self.share))

        return self.sampler.step(state, shorter, grid)


class Unnamed(Shortens):
    """Names no paper."""

    traits = Traits()


class Lets(Shortens):
    """Takes any option in silence."""

    def __init__(self, sampler: Sampler, **options: Any) -> None:
        super().__init__(sampler)


class Replaces(Shortens):
    """Holds another sampler than the one that it was given."""

    def __init__(self, sampler: Sampler) -> None:
        super().__init__(SecondOrder(sampler.steps))


class TurnsDown(Shortens):
    """Changes a number on the sampler that it holds."""

    def __init__(self, sampler: Sampler) -> None:
        super().__init__(sampler)

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        stepped = super().step(state, predict, grid)
        self.sampler.step = lambda state, predict, grid: state.next(state.x * 0.9)  # type: ignore[method-assign]
        return stepped


class AsksMore(Shortens):
    """Asks once more a step, and leaves the count as it is."""

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        predict(state.x, grid[state.index])
        return super().step(state, predict, grid)


class ByTheBatch(Shortens):
    """Shrinks by the size of the batch."""

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        stepped = super().step(state, predict, grid)
        return dataclasses.replace(stepped, x=stepped.x / (1 + 1e-6 * stepped.x.norm()))


class KeepsTheFirst(Shortens):
    """Keeps its first state on itself."""

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        stepped = super().step(state, predict, grid)
        if state.index == 0:
            self.first = stepped.x.mean(0)
        return dataclasses.replace(stepped, x=stepped.x + 1e-3 * self.first)


class Promises(Shortens):
    """Declares an order that its shrinking spoils."""

    traits = Traits(paper=PAPER, order=1)


class OnlyOnce(Shortens):
    """Refuses to go around a wrapper."""

    def __init__(self, sampler: Sampler) -> None:
        if isinstance(sampler, SamplerWrapper):
            raise CompositionError("not twice", found=sampler, allowed="a sampler", remedy="Leave one out.")
        super().__init__(sampler)


@pytest.mark.parametrize("plugin", [Shortens, OnlyOnce])
def test_a_sound_wrapper_passes(plugin: Any) -> None:
    assert failed(SamplerWrapperSuite, plugin) == set()


@pytest.mark.parametrize(
    ("plugin", "expected"),
    [
        (Unnamed, {"names_its_paper"}),
        (Lets, {"rejects_unknown_options"}),
        (Replaces, {"builds_from_options"}),
        (TurnsDown, {"leaves_the_sampler_as_it_is"}),
        (AsksMore, {"counts_its_evaluations"}),
        (ByTheBatch, {"treats_samples_apart"}),
        (KeepsTheFirst, {"keeps_nothing_on_itself"}),
        (Promises, {"has_its_declared_order"}),
    ],
)
def test_each_fault_of_a_wrapper_fails_its_check(plugin: Any, expected: set[str]) -> None:
    checks = [check for check in SamplerWrapperSuite.checks if name_of(check) in expected]
    assert {name_of(check) for check in checks if examine(check, plugin).state == "failed"} == expected


# Time grids


class Spaced(EvenLambda):
    """Equal steps in λ."""


class OneTooMany(Spaced):
    """Makes a step more than it was asked for."""

    def grid(self, path: NoisePath, steps: int, *, finite: bool = True) -> Grid:
        return super().grid(path, steps + (steps > 0), finite=finite)


class SinglePrecision(Spaced):
    """Works out its times in single precision."""

    def times(self, path: NoisePath, start: float, stop: float, count: int) -> np.ndarray:
        return super().times(path, start, stop, count).astype(np.float32)


class Numbers(Spaced):
    """Hands over numpy's numbers."""

    def grid(self, path: NoisePath, steps: int, *, finite: bool = True) -> Grid:
        grid = super().grid(path, steps, finite=finite)
        levels = tuple(dataclasses.replace(level, alpha=np.float64(level.alpha)) for level in grid)
        return Grid(path, levels, grid.denoises_last)


class StartsAtNothing(Spaced):
    """Starts where nothing of the data is left."""

    def grid(self, path: NoisePath, steps: int, *, finite: bool = True) -> Grid:
        grid = super().grid(path, steps, finite=False)
        return Grid(path, (path.level(path.t_max), *grid.levels[1:]), grid.denoises_last)


class AlwaysZero(Spaced):
    """Goes to the data whatever was asked."""

    def grid(self, path: NoisePath, steps: int, *, finite: bool = True) -> Grid:
        self.end, asked = "zero", self.end
        try:
            return super().grid(path, steps, finite=finite)
        finally:
            self.end = asked


class IgnoresItsStart(Spaced):
    """Starts a little late."""

    def times(self, path: NoisePath, start: float, stop: float, count: int) -> np.ndarray:
        times = super().times(path, start, stop, count)
        times[0] = start * 0.999999
        return times


class GoesOutside(Spaced):
    """Leaves the path without a word."""

    def _check(self, path: NoisePath, times: Sequence[float]) -> None:
        pass


class RoundsUp(Spaced):
    """Makes a step where none was asked for."""

    def grid(self, path: NoisePath, steps: int, *, finite: bool = True) -> Grid:
        return super().grid(path, max(1, steps), finite=finite)


class Wanders(Spaced):
    """Goes elsewhere every time."""

    count = 0

    def times(self, path: NoisePath, start: float, stop: float, count: int) -> np.ndarray:
        times = super().times(path, start, stop, count)
        self.count += 1
        times[1:-1] *= 1 + 1e-9 * self.count
        return times


class Nowhere(Spaced):
    """Refuses every path."""

    def grid(self, path: NoisePath, steps: int, *, finite: bool = True) -> Grid:
        raise CompositionError("no", found="no", allowed="no", remedy="Choose another.")


def test_a_sound_time_grid_passes() -> None:
    assert failed(TimeGridSuite, Spaced) == set()


@pytest.mark.parametrize(
    ("plugin", "expected"),
    [
        (OneTooMany, {"falls"}),
        (SinglePrecision, {"is_in_double_precision", "ends_as_asked", "goes_between_its_ends"}),
        (Numbers, {"is_in_double_precision"}),
        (StartsAtNothing, {"starts_where_solvers_can", "goes_between_its_ends"}),
        (AlwaysZero, {"ends_as_asked", "goes_between_its_ends"}),
        (IgnoresItsStart, {"goes_between_its_ends"}),
        (GoesOutside, {"goes_between_its_ends"}),
        (RoundsUp, {"refuses_no_steps"}),
        (Wanders, {"is_the_same_again"}),
        (Nowhere, {"falls"}),
    ],
)
def test_each_fault_of_a_time_grid_fails_its_check(plugin: Any, expected: set[str]) -> None:
    assert failed(TimeGridSuite, plugin) == expected


# Denoisers


class Exact(GaussianMixture):
    """Knows its mixture."""


class NoForm(Exact):
    """Answers in a form that there is not."""

    def __init__(self) -> None:
        super().__init__()
        self.form = "image"


class Inconsistent(Exact):
    """Keeps the noise when it shrinks the data."""

    def predict(self, x: Tensor, level: Level, condition: Any = None, network_time: Any = None) -> Prediction:
        found = super().predict(x, level, condition, network_time)
        changed = found.with_data(found.data * 0.9)
        changed.known["noise"] = found.noise
        return changed


class SinglePrecisionAnswers(Exact):
    """Answers in single precision."""

    def predict(self, x: Tensor, level: Level, condition: Any = None, network_time: Any = None) -> Prediction:
        found = super().predict(x, level, condition, network_time)
        return Prediction(x, level, "data", found.data.float())


class FirstTime(Exact):
    """Takes all samples for being at the time of the first."""

    def output(self, x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        return super().output(x, t[:1].expand(len(x)), condition)


class Normalises(Exact):
    """Normalises by the batch."""

    def output(self, x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        found = super().output(x, t, condition)
        return found / (1 + 1e-3 * found.std())


class DropsOut(Exact):
    """Still drops out."""

    def output(self, x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        return super().output(x, t, condition) * (1 + 1e-3 * torch.rand(1).double())


class EditsTheState(Exact):
    """Scales the state where it lies."""

    def output(self, x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        found = super().output(x, t, condition)
        x.mul_(1.0001)
        return found


class AnyLabel(Exact):
    """Takes labels that it does not know."""

    def condition(self, request: Mapping[str, Any], indices: Sequence[int]) -> Condition | None:  # type: ignore[override]
        wanted = request.get("label")
        if isinstance(wanted, int):
            wanted = wanted % self.classes
        return super().condition({"label": wanted}, indices)


class Deaf(Exact):
    """Gives every label the same answer."""

    def output(self, x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        return super().output(x, t, None)


class OwnTime(Exact):
    """Does not tell the network what it is to be told."""

    def predict(self, x: Tensor, level: Level, condition: Any = None, network_time: Any = None) -> Prediction:
        return super().predict(x, level, condition)


class StartsSmall(Exact):
    """Starts from half of the noise."""

    def start(self, noise: Noise, level: Level) -> Tensor:
        return 0.5 * super().start(noise, level)


class LosesIt(Exact):
    """Decodes to other units, and does not encode back."""

    def decode(self, x: Tensor) -> Tensor:
        return (x + 1) / 2


class NewName(Exact):
    """Has another fingerprint every time."""

    count = 0

    def fingerprint(self) -> str:
        self.count += 1
        return f"{self.count}"


class FlatMoments(Exact):
    """Gives the variances for the covariance."""

    def moments(self) -> tuple[Tensor, Tensor]:
        mean, covariance = super().moments()
        return mean, covariance.diagonal()


class Words(Exact):
    """Measures in words."""

    def measure(self, generated: Any) -> Any:
        return {"quality": "good"}


def test_a_sound_denoiser_passes() -> None:
    assert failed(DenoiserSuite, Exact) == set()


@pytest.mark.parametrize(
    ("plugin", "expected"),
    [
        (NoForm, "builds_from_options"),
        (Inconsistent, "gives_one_thing_in_all_forms"),
        (SinglePrecisionAnswers, "gives_one_thing_in_all_forms"),
        (FirstTime, "takes_a_time_for_each_sample"),
        (Normalises, "treats_samples_apart"),
        (DropsOut, "treats_samples_apart"),
        (DropsOut, "keeps_its_hands_off"),
        (EditsTheState, "keeps_its_hands_off"),
        (AnyLabel, "knows_its_classes"),
        (Deaf, "knows_its_classes"),
        (OwnTime, "is_told_a_time"),
        (StartsSmall, "starts_as_its_path"),
        (LosesIt, "encodes_what_it_decodes"),
        (NewName, "has_a_fingerprint"),
        (FlatMoments, "knows_its_moments"),
        (Words, "measures_numbers"),
    ],
)
def test_each_fault_of_a_denoiser_fails_its_check(plugin: Any, expected: str) -> None:
    assert expected in failed(DenoiserSuite, plugin)


# Searches


class Finds(Search):
    """Finds nothing."""

    traits: ClassVar[Traits] = Traits(paper=PAPER)

    def search(self, problem: SearchProblem, report: Report = silent) -> Artefact:
        return Artefact("finds", problem.key(), {})

    def words(self, artefact: Artefact, path: str) -> list[str]:
        return []


class NoSearch:
    """Searches nothing."""

    traits: ClassVar[Traits] = Traits(paper=PAPER)


def test_searches_are_searches() -> None:
    assert failed(SearchSuite, Finds) == set()
    assert failed(SearchSuite, NoSearch) == {"builds_from_options"}


# What the checks are made of


@pytest.mark.parametrize("path", [LinearVP(), KarrasVE()])
def test_steps_are_even_in_lambda(path: NoisePath) -> None:
    levels = EvenLambda(end="minimum").grid(path, 6)
    lengths = np.diff([level.lam for level in levels])
    assert np.allclose(lengths, lengths[0])
    assert levels[0].t == path.t_finite
    assert TimeGrid.grid(EvenLambda(), path, 3)[-1].is_clean
