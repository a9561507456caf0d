"""The suites of guidance and measurements fail each check on what breaks it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from lightrail.errors import CompositionError
from lightrail.generation import Generated, Guidance, Measurement, Moment, Prediction, State
from lightrail.testing import GuidanceSuite, MeasurementSuite, examine
from lightrail.testing import guidance as suite
from lightrail.testing.sampler_wrapper import FirstOrder, SecondOrder
from lightrail.testing.suite import name_of
from lightrail.traits import Traits

PAPER = "A. Author, 2024, A Paper, arXiv 0000.00000"


@pytest.fixture(autouse=True)
def _two_samplers(monkeypatch: pytest.MonkeyPatch) -> None:
    two = (("first", lambda: FirstOrder(6)), ("second", lambda: SecondOrder(6)))
    monkeypatch.setattr(suite, "_samplers", lambda: two)


def failed(suite: Any, plugin: Any) -> set[str]:
    return {name_of(check) for check in suite.checks if examine(check, plugin).state == "failed"}


# Guidance


class Mixes(Guidance):
    """uncond + w (cond − uncond)."""

    traits: ClassVar[Traits] = Traits(rule="u + w (c - u)", paper=PAPER)
    asks = ("uncond",)

    def __init__(self, scale: float = 1.5) -> None:
        self.scale = scale

    def mix(self, named: Mapping[str, Prediction], moment: Moment) -> Prediction:
        cond, uncond = named["cond"], named["uncond"]
        return cond.with_data(uncond.data + self.scale * (cond.data - uncond.data))

    def measure(self, generated: Generated) -> dict[str, float]:
        return {"mean": float(generated.samples.double().mean())}


class Unnamed(Mixes):
    """Names no paper."""

    traits = Traits()


class Lets(Mixes):
    """Takes any option in silence."""

    def __init__(self, **options: Any) -> None:
        super().__init__()


class NoGuidance:
    """Steers nothing."""

    traits: ClassVar[Traits] = Traits(paper=PAPER)


class ByTheBatch(Mixes):
    """Divides by a norm over the batch."""

    def mix(self, named: Mapping[str, Prediction], moment: Moment) -> Prediction:
        mixed = super().mix(named, moment)
        return mixed.with_data(mixed.data / (1 + 1e-3 * mixed.data.norm()))


class Remembers(Mixes):
    """Adds up on itself how often it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def mix(self, named: Mapping[str, Prediction], moment: Moment) -> Prediction:
        self.asked += 1
        mixed = super().mix(named, moment)
        return mixed.with_data(mixed.data + 1e-3 * self.asked)


class AsksInSecret(Mixes):
    """Asks the network once more, and leaves the count as it is."""

    def correct(self, prediction: Prediction, moment: Moment) -> Prediction:
        moment.denoiser.predict(moment.x, moment.level, moment.condition)
        return prediction


class Explodes(Mixes):
    """Is not finite at the end of a solver that keeps a history."""

    def after_step(self, state: State, moment: Moment) -> State:
        return state.next(state.x * float("nan")) if state.history else state


class Widens(Mixes):
    """Answers in double precision whatever was asked."""

    def after_step(self, state: State, moment: Moment) -> State:
        return state.map(lambda tensor: tensor.double())


class MeasuresNothing(Mixes):
    """Measures what is not a number."""

    def measure(self, generated: Generated) -> dict[str, float]:
        return {"nothing": float("nan")}


class RefusesAll(Mixes):
    """Takes no model."""

    def prepare(self, denoiser: Any, sampler: Any) -> None:
        raise CompositionError("no", found="a model", allowed="none", remedy="Leave it out.")


class MeetsHalf(Guidance):
    """Replaces what was measured."""

    traits: ClassVar[Traits] = Traits(paper=PAPER)
    needs_measurement = True

    def correct(self, prediction: Prediction, moment: Moment) -> Prediction:
        assert moment.observed is not None
        on = moment.observed.on_states(moment.denoiser)
        return prediction.with_data(prediction.data + on.pseudo_inverse(on.value - on.apply(prediction.data)))


class InPairs(Guidance):
    """Two samples share their mean, out of three tried for each."""

    traits: ClassVar[Traits] = Traits(paper=PAPER)
    population = 2
    candidates = 3

    def after_step(self, state: State, moment: Moment) -> State:
        rows = torch.arange(len(state.x)) // 3 * 3
        state = moment.resample(state, rows)
        return state if state.index < moment.grid.steps else state.map(lambda tensor: tensor)


@pytest.mark.parametrize("plugin", [Mixes, MeetsHalf, InPairs])
def test_sound_guidance_passes_every_check(plugin: Any) -> None:
    assert failed(GuidanceSuite, plugin) == set()


@pytest.mark.parametrize(
    ("plugin", "expected"),
    [
        (Unnamed, {"names_its_paper"}),
        (Lets, {"rejects_unknown_options"}),
        (ByTheBatch, {"treats_samples_apart"}),
        (Remembers, {"keeps_nothing_on_itself"}),
        (AsksInSecret, {"counts_its_evaluations"}),
        (Explodes, {"works_with_every_sampler"}),
        (Widens, {"works_in_half_precision"}),
        (MeasuresNothing, {"measures_numbers"}),
    ],
)
def test_each_check_fails_on_what_breaks_it(plugin: Any, expected: set[str]) -> None:
    assert expected <= failed(GuidanceSuite, plugin)


def test_what_is_no_guidance_is_named() -> None:
    assert "builds_from_options" in failed(GuidanceSuite, NoGuidance)


def test_guidance_that_takes_no_model_of_the_suite_is_skipped_with_its_reason() -> None:
    outcomes = [examine(check, RefusesAll) for check in GuidanceSuite.checks]
    assert "skipped" in {each.state for each in outcomes}
    assert failed(GuidanceSuite, RefusesAll) == set()


# Measurements


class First(Measurement):
    """The first half of the entries, or of the rows."""

    traits: ClassVar[Traits] = Traits(rule="y = x[:n/2]")

    def prepare(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def apply(self, x: Tensor) -> Tensor:
        return x[:, : x.shape[1] // 2] if x.ndim == 2 else x[..., : x.shape[-1] // 2]

    def adjoint(self, y: Tensor) -> Tensor:
        return torch.cat([y, y.new_zeros(*y.shape[:-1], self.shape[-1] - y.shape[-1])], -1)


class Affine(First):
    """Adds one."""

    def apply(self, x: Tensor) -> Tensor:
        return super().apply(x) + 1


class Doubles(First):
    """Twice the adjoint."""

    def adjoint(self, y: Tensor) -> Tensor:
        return 2 * super().adjoint(y)


class Fills(First):
    """Its pseudo-inverse adds what it does not see."""

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        found = super().pseudo_inverse(y)
        return found + torch.cat([torch.zeros_like(y), found.new_ones(*y.shape[:-1], y.shape[-1])], -1)


class Centres(First):
    """Subtracts the mean of the batch."""

    def observe(self, samples: Tensor, noise: Any) -> Tensor:
        return super().observe(samples, noise) - samples.mean()


class InDouble(First):
    """Measures in double precision whatever it is given."""

    def apply(self, x: Tensor) -> Tensor:
        return super().apply(x).double()


class Dark(First):
    """Has no picture."""

    def picture(self, y: Tensor) -> Tensor:
        return y[0]


@pytest.mark.parametrize(
    ("plugin", "expected"),
    [
        (First, set()),
        (Affine, {"is_linear"}),
        (Doubles, {"has_its_adjoint"}),
        (Fills, {"has_its_pseudo_inverse"}),
        (Centres, {"treats_samples_apart"}),
        (InDouble, {"keeps_the_type"}),
        (Dark, {"has_a_picture"}),
    ],
)
def test_each_check_of_a_measurement_fails_on_what_breaks_it(plugin: Any, expected: set[str]) -> None:
    found = failed(MeasurementSuite, plugin)
    assert expected <= found
    assert bool(found) == bool(expected)
