"""The suite of samplers fails each of its checks on the sampler that breaks it, and passes sound ones."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from lightrail.errors import CompositionError
from lightrail.generation import Grid, Noise, Predict, Prediction, Sampler, State, weighted_sum
from lightrail.generation.text import TokenSampler
from lightrail.options import between
from lightrail.testing import SamplerSuite, examine
from lightrail.testing.sampler_wrapper import FirstOrder, SecondOrder
from lightrail.testing.suite import name_of
from lightrail.traits import Traits

PAPER = "A. Author, 2024, A Paper, arXiv 0000.00000"


def outcomes(plugin: Any, among: set[str] | None = None) -> dict[str, str]:
    checks = [check for check in SamplerSuite.checks if among is None or name_of(check) in among]
    return {name_of(check): examine(check, plugin).state for check in checks}


def failed(plugin: Any, among: set[str] | None = None) -> set[str]:
    return {name for name, state in outcomes(plugin, among).items() if state == "failed"}


def moved(now: Prediction, there: Any) -> Tensor:
    ratio = there.sigma / now.level.sigma
    return weighted_sum((ratio, now.x), (there.alpha - ratio * now.level.alpha, now.data))


class Sound(FirstOrder):
    """Follows the path to first order."""

    traits: ClassVar[Traits] = Traits(paper=PAPER, order=1, is_invertible=True, example={"steps": 10})

    def invert(self, state: State, predict: Predict, grid: Grid) -> State:
        for index in reversed(range(grid.steps)):
            here, there = grid[index + 1], grid[index]
            state = dataclasses.replace(state, x=moved(predict(state.x, here), there), index=index)
        return state


class SoundSecond(SecondOrder):
    """Follows the path to second order."""

    traits: ClassVar[Traits] = Traits(paper=PAPER, order=2, example={"steps": 10})


class SoundNoisy(Sampler):
    """Draws the noise anew at each level."""

    traits: ClassVar[Traits] = Traits(paper=PAPER, is_stochastic=True, example={"steps": 10, "share": 0.5})

    def __init__(self, steps: int = 10, share: float = 0.5) -> None:
        super().__init__(steps)
        between(0, 1, closed="both", share=share)
        self.share = share

    def spread(self, here: Any, there: Any) -> float:
        if there.is_clean:
            return 0.0
        return self.share * there.sigma * math.sqrt(-math.expm1(-2 * (there.lam - here.lam)))

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        here, there = grid[state.index], grid[state.index + 1]
        now = predict(state.x, here)
        spread = self.spread(here, there)
        kept = math.sqrt(there.sigma**2 - spread**2)
        return state.next(weighted_sum((there.alpha, now.data), (kept, now.noise), (spread, self.drawn(state))))

    def drawn(self, state: State) -> Tensor:
        return state.normal()


@pytest.mark.parametrize("plugin", [Sound, SoundSecond, SoundNoisy])
def test_a_sound_sampler_passes(plugin: Any) -> None:
    assert failed(plugin) == set()


class Anonymous(Sound):
    """Names no paper."""

    traits = dataclasses.replace(Sound.traits, paper="")


class Swallows(Sound):
    """Takes any option in silence."""

    def __init__(self, steps: int = 10, **options: Any) -> None:
        super().__init__(steps)


class WantsMore(Sound):
    """Has an option without a value."""

    def __init__(self, strength: float, steps: int = 10) -> None:
        super().__init__(steps)


class NoSuchGrid(Sound):
    """Names a time grid that nobody has."""

    grid_name = "spiral"


class Generous(Sound):
    """Says that it needs three steps, and takes fewer."""

    minimum_steps = 3

    def __init__(self, steps: int = 10) -> None:
        self.steps = steps


class AsksTwice(Sound):
    """Asks twice a step, and counts once."""

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        predict(state.x, grid[state.index])
        return super().step(state, predict, grid)


class DoesNotCount(Sound):
    """Leaves open how often it asks, although it is always the same."""

    def evaluations(self, grid: Grid) -> int | None:
        return None


class ForgetsToDenoise(Sound):
    """Returns the noisy state where the grid denoises last."""

    def solve(self, state: State, predict: Predict, grid: Grid, after_step: Any = None) -> State:
        return super().solve(state, predict, dataclasses.replace(grid, denoises_last=False), after_step)

    def evaluations(self, grid: Grid) -> int:
        return grid.steps


class AsksTheData(Sound):
    """Asks the network at σ = 0, after the last step."""

    def solve(self, state: State, predict: Predict, grid: Grid, after_step: Any = None) -> State:
        state = super().solve(state, predict, grid, after_step)
        predict(state.x, grid[-1])
        return state

    def evaluations(self, grid: Grid) -> int:
        return super().evaluations(grid) + 1  # type: ignore[operator]


class ClipsByBatch(Sound):
    """Clips the data by the largest of the batch."""

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        now = predict(state.x, grid[state.index])
        return state.next(moved(now.with_data(now.data * (1 - 1e-4 * now.data.norm())), grid[state.index + 1]))


class HidesInAnObject(SoundSecond):
    """Keeps its history in an object of its own, out of reach of a choice of rows."""

    class Kept:
        def __init__(self, now: Prediction) -> None:
            self.now = now

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        kept = state.memory.get("kept")
        shown = dataclasses.replace(state, history=(kept.now,) if kept else ())
        stepped = super().step(shown, predict, grid)
        return state.next(stepped.x, kept=self.Kept(stepped.history[0]))


class KeepsOnItself(SoundSecond):
    """Keeps its history on itself."""

    last: Prediction | None = None

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        known = self.last is not None and state.index > 0
        stepped = super().step(dataclasses.replace(state, history=(self.last,) if known else ()), predict, grid)
        self.last = stepped.history[0]
        return dataclasses.replace(stepped, history=())


class RemembersTheFirstGrid(Sound):
    """Works out its first transfer once, for whatever grid comes first."""

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        if state.index == 1:
            self.there = getattr(self, "there", grid[2])
            grid = Grid(grid.path, (*grid.levels[:2], self.there))
        return super().step(state, predict, grid)


class ChangesItsStart(Sound):
    """Adds to the state that it was given."""

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        following = super().step(state, predict, grid)
        state.x.add_(1e-3)
        return following


class ChangesThePrediction(Sound):
    """Scales what the network answered, where it lies."""

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        now = predict(state.x, grid[state.index])
        following = moved(now, grid[state.index + 1])
        now.data.mul_(1 - 1e-6)
        return state.next(following)


class GlobalNoise(SoundNoisy):
    """Draws from torch's global generator."""

    def drawn(self, state: State) -> Tensor:
        return torch.randn_like(state.x) + 0 * state.normal()


class HidesItsNoise(SoundNoisy):
    """Draws noise, and does not say so."""

    traits = dataclasses.replace(SoundNoisy.traits, is_stochastic=False)


class SaysItDraws(Sound):
    """Says that it draws noise, and draws none."""

    traits = dataclasses.replace(Sound.traits, is_stochastic=True, is_invertible=False, order=None)

    invert = Sampler.invert


class DrawsTheSame(SoundNoisy):
    """Draws, and takes numbers of its own that no seed decides."""

    def drawn(self, state: State) -> Tensor:
        state.normal()
        return Noise(7, state.noise.indices, state.noise.shape, state.x.dtype).normal(state.index)


class Overflows(Sound):
    """Goes through numbers that half precision rounds away."""

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        following = super().step(state, predict, grid)
        return dataclasses.replace(following, x=(following.x + 300) - 300)


class Widens(Sound):
    """Comes to double precision whatever it is given."""

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        following = super().step(state, predict, grid)
        return dataclasses.replace(following, x=following.x.double())


class TrustsTheForm(Sound):
    """Takes whatever the network says for its data."""

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        now = predict(state.x, grid[state.index])
        return state.next(moved(now.with_data(now.known[now.form]), grid[state.index + 1]))


class OnlyFlat(Sound):
    """Turns states into rows of numbers."""

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        following = super().step(state, predict, grid)
        return dataclasses.replace(following, x=following.x.flatten(1))


class OnePath(Sound):
    """Takes every path for one with α² + σ² = 1."""

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        here, there = grid[state.index], grid[state.index + 1]
        now = predict(state.x, here)
        alpha = math.sqrt(max(0.0, 1 - there.sigma**2))
        return state.next(weighted_sum((alpha, now.data), (there.sigma, now.noise)))

    traits = dataclasses.replace(Sound.traits, is_invertible=False)
    invert = Sampler.invert


class Refuses(Sound):
    """Refuses every path but one."""

    def grid(self, path: Any, times: Any) -> Grid:
        if type(path).__name__ != "KarrasVE":
            raise CompositionError("no such path", found=path, allowed="KarrasVE", remedy="Choose it.")
        return super().grid(path, times)


class RefusesAll(Sound):
    """Refuses every path."""

    def grid(self, path: Any, times: Any) -> Grid:
        raise CompositionError("no such path", found=path, allowed="none", remedy="Choose another sampler.")


class Boasts(Sound):
    """Declares an order that it does not have."""

    traits = dataclasses.replace(Sound.traits, order=2)


class IsModest(SoundSecond):
    """Declares a lower order than it has."""

    traits = dataclasses.replace(SoundSecond.traits, order=1)


class EvenStepsOnly(SoundSecond):
    """Takes all steps for equally long."""

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        now = predict(state.x, grid[state.index])
        data = now.data
        if state.history and not grid[state.index + 1].is_clean:
            data = weighted_sum((1.5, data), (-0.5, state.history[0].data))
        return state.next(moved(now.with_data(data), grid[state.index + 1]), history=(now,))


class TooMuchNoise(SoundNoisy):
    """Adds a tenth more noise than it takes away."""

    def drawn(self, state: State) -> Tensor:
        return 1.2 * state.normal()


class SameNoiseForAll(SoundNoisy):
    """Draws one number for all entries of a state."""

    def drawn(self, state: State) -> Tensor:
        z = state.normal()
        return z.flatten(1)[:, :1].view(-1, *[1] * (z.ndim - 1)).expand_as(z)


class CannotGoBack(Sound):
    """Says that it can be inverted, and refuses."""

    invert = Sampler.invert


class GoesBackWrong(Sound):
    """Goes back by half of the way."""

    def invert(self, state: State, predict: Predict, grid: Grid) -> State:
        back = super().invert(state, predict, grid)
        return dataclasses.replace(back, x=0.5 * back.x)


class GoesBackUnsaid(Sound):
    """Can be inverted, and does not say so."""

    traits = dataclasses.replace(Sound.traits, is_invertible=False)


class Typo(Sound):
    """Excuses itself from a check that there is not."""

    traits = dataclasses.replace(Sound.traits, exceptions={"is_nice": "no reason"})


ORDERS = {"has_its_declared_order", "has_its_order_on_uneven_grids"}
# Quick ones, of which a fault fails none but those that it is listed with.
QUICK = {
    "says_where_it_is_from",
    "builds_from_options",
    "rejects_unknown_options",
    "refuses_too_few_steps",
    "ends_as_the_grid_asks",
    "draws_noise_as_declared",
    "takes_any_shape",
    "excepts_known_checks",
}


@pytest.mark.parametrize(
    ("plugin", "expected"),
    [
        (Anonymous, {"says_where_it_is_from"}),
        (Swallows, {"rejects_unknown_options"}),
        (NoSuchGrid, {"builds_from_options"}),
        (Generous, {"refuses_too_few_steps"}),
        (AsksTwice, {"counts_its_evaluations"}),
        (DoesNotCount, {"counts_its_evaluations"}),
        (ForgetsToDenoise, {"ends_as_the_grid_asks"}),
        (AsksTheData, {"ends_as_the_grid_asks"}),
        (ClipsByBatch, {"treats_samples_apart"}),
        (HidesInAnObject, {"can_be_resampled", "resumes_exactly"}),
        (KeepsOnItself, {"keeps_nothing_on_itself", "can_be_resampled", "resumes_exactly"}),
        (RemembersTheFirstGrid, {"keeps_nothing_on_itself"}),
        (ChangesItsStart, {"keeps_its_hands_off", "ends_as_the_grid_asks"}),
        (ChangesThePrediction, {"keeps_its_hands_off"}),
        (GlobalNoise, {"keeps_its_hands_off", "treats_samples_apart", "takes_any_shape", "ends_as_the_grid_asks"}),
        (HidesItsNoise, {"draws_noise_as_declared"}),
        (SaysItDraws, {"draws_noise_as_declared"}),
        (DrawsTheSame, {"draws_noise_as_declared"}),
        (Overflows, {"works_in_half_precision"}),
        (Widens, {"works_in_half_precision"}),
        (TrustsTheForm, {"reads_any_form"}),
        (OnlyFlat, {"takes_any_shape"}),
        (OnePath, {"works_on_its_paths"}),
        (Boasts, ORDERS),
        (IsModest, {"has_its_declared_order"}),
        (EvenStepsOnly, {"has_its_order_on_uneven_grids"}),
        (TooMuchNoise, {"comes_to_the_distribution"}),
        (SameNoiseForAll, {"comes_to_the_distribution"}),
        (CannotGoBack, {"inverts_if_it_says_so"}),
        (GoesBackWrong, {"inverts_if_it_says_so"}),
        (GoesBackUnsaid, {"inverts_if_it_says_so"}),
        (Typo, {"excepts_known_checks"}),
    ],
)
def test_each_fault_fails_its_checks(plugin: Any, expected: set[str]) -> None:
    assert failed(plugin, expected | QUICK) == expected


def test_an_option_without_a_value_is_missing_from_the_example() -> None:
    assert "builds_from_options" in failed(WantsMore, {"builds_from_options"})


def test_a_sampler_may_refuse_paths_but_not_all() -> None:
    assert outcomes(Refuses, {"works_on_its_paths", "takes_any_shape"}) == {
        "works_on_its_paths": "passed",
        "takes_any_shape": "passed",
    }
    assert failed(RefusesAll, {"works_on_its_paths"}) == {"works_on_its_paths"}


def test_methods_for_even_steps_say_so() -> None:
    excused = {"has_its_order_on_uneven_grids": "its coefficients are for even steps"}

    class Excused(EvenStepsOnly):
        """Says that its steps are to be even."""

        traits = dataclasses.replace(EvenStepsOnly.traits, exceptions=excused)

    among = ORDERS | {"excepts_known_checks"}
    assert outcomes(Excused, among) == {
        "has_its_declared_order": "passed",
        "has_its_order_on_uneven_grids": "expected",
        "excepts_known_checks": "passed",
    }


class Draws(TokenSampler):
    """Draws as the model says."""

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)


class Exponentials(Draws):
    """Takes exponentials that overflow."""

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.exp()


class Smooths(Draws):
    """Gives every token a chance."""

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1) + 1e-3


class Reverses(Draws):
    """Takes the unlikeliest token."""

    def probabilities(self, logits: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(
            logits.masked_fill(logits.isneginf(), torch.inf).argmin(-1), logits.shape[-1]
        )


class KnowsTheFirst(Draws):
    """Likes the first token of the vocabulary."""

    def probabilities(self, logits: Tensor) -> Tensor:
        found = logits.softmax(-1)
        return torch.cat((found[:, :1] * 2, found[:, 1:]), dim=1)


class AcrossRows(Draws):
    """Cuts by what the batch finds unlikely."""

    def probabilities(self, logits: Tensor) -> Tensor:
        found = logits.softmax(-1)
        return found * (found >= found.max() / 3).any(0) + found * 1e-3


class Shakes(Draws):
    """Draws random numbers itself."""

    def probabilities(self, logits: Tensor) -> Tensor:
        torch.rand(1)
        return logits.softmax(-1)


class Edits(Draws):
    """Edits the logits."""

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.sub_(logits.amax(-1, keepdim=True)).exp()


def test_a_sound_token_sampler_passes() -> None:
    assert failed(Draws) == set()


@pytest.mark.parametrize(
    ("plugin", "expected"),
    [
        (Exponentials, "gives_probabilities"),
        (Smooths, "gives_probabilities"),
        (Edits, "gives_probabilities"),
        (Reverses, "prefers_likelier_tokens"),
        (KnowsTheFirst, "prefers_likelier_tokens"),
        (AcrossRows, "treats_rows_apart"),
        (Shakes, "treats_rows_apart"),
    ],
)
def test_each_fault_of_a_token_sampler_fails_its_check(plugin: Any, expected: str) -> None:
    assert expected in failed(plugin)
