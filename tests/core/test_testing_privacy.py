# pyright: reportIncompatibleMethodOverride=false
"""The suite of private methods fails the checks that a broken method breaks, and no others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from lightrail import PrivacyMethod, SampleGradients, Traits
from lightrail.options import positive
from lightrail.privacy import PrivateHorizon, Release
from lightrail.testing import PrivacySuite, examine
from lightrail.testing.suite import name_of

TRAITS = Traits(paper="made up", needs_per_sample_gradients=True)
RUNS = {
    "spends_what_it_plans",
    "keeps_its_noise_secret",
    "drowns_in_huge_noise",
    "survives_records_that_are_not_finite",
    "steps_without_records",
    "resumes_with_its_ledger",
    "logs_numbers",
}


class Sound(PrivacyMethod):
    """Clips, sums, adds noise, and keeps a running mean of what it released."""

    traits: ClassVar[Traits] = TRAITS

    def __init__(self, *, bound: float = 2.0, **common: Any) -> None:
        super().__init__(**{"accountant": "rdp", **common})
        positive(bound=bound)
        self.bound = bound
        self.mean: list[Tensor] = []

    @property
    def clipping(self) -> str:
        return "made up"

    def contribution(self, here: SampleGradients, there: SampleGradients | None) -> list[Tensor]:
        return here.weighted_sum((self.bound / here.norms()).clamp(max=1.0).nan_to_num(0.0))

    def gradient(self, sums: list[Tensor], params: Sequence[Tensor], release: Release) -> list[Tensor]:
        noisy = release(sums, sensitivity=self.bound, noise=release.noise)
        return self.smoothed([each / release.batch for each in noisy])

    def smoothed(self, found: list[Tensor]) -> list[Tensor]:
        self.mean = [0.5 * m + g for m, g in zip(self.mean, found, strict=True)] if self.mean else found
        return self.mean

    def logged(self) -> dict[str, float]:
        return {"norm": float(self.mean[0].norm())} if self.mean else {}

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]


def failures(plugin: Any, *, runs: bool | set[str] = False) -> set[str]:
    checks = [each for each in PrivacySuite.checks if runs is True or name_of(each) not in RUNS - (runs or set())]
    return {outcome.check for outcome in (examine(each, plugin) for each in checks) if outcome.state == "failed"}


def test_a_sound_method_passes_everything() -> None:
    assert failures(Sound, runs=True) == set()


class DoesNotClip(Sound):
    """Takes gradients as they are."""

    def contribution(self, here: SampleGradients, there: SampleGradients | None) -> list[Tensor]:
        return here.sum()


class ClipsEachParameter(Sound):
    """Clips each parameter at the bound of all."""

    def contribution(self, here: SampleGradients, there: SampleGradients | None) -> list[Tensor]:
        return here.weighted_sum((self.bound / here.norms_by_parameter()).clamp(max=1.0).nan_to_num(0.0))


class UnderstatesItsSensitivity(Sound):
    """Says a tenth less than is true."""

    def gradient(self, sums: list[Tensor], params: Sequence[Tensor], release: Release) -> list[Tensor]:
        return release(sums, sensitivity=0.9 * self.bound, noise=release.noise)


class MeasuresItsSensitivity(Sound):
    """Sets the noise by what the data happen to be."""

    def gradient(self, sums: list[Tensor], params: Sequence[Tensor], release: Release) -> list[Tensor]:
        return release(sums, sensitivity=self.bound + float(sums[0].norm()), noise=release.noise)


class ReleasesNothing(Sound):
    """Has no noise at all."""

    def gradient(self, sums: list[Tensor], params: Sequence[Tensor], release: Release) -> list[Tensor]:
        return release.summed(sums)


class SavesNoise(Sound):
    """Accounts for more noise than it adds."""

    def gradient(self, sums: list[Tensor], params: Sequence[Tensor], release: Release) -> list[Tensor]:
        return release(sums, sensitivity=self.bound, noise=0.5 * release.noise)


class LooksBehindTheNoise(Sound):
    """Takes the sign of the sum without noise."""

    def gradient(self, sums: list[Tensor], params: Sequence[Tensor], release: Release) -> list[Tensor]:
        signs = [each.sign() for each in sums]
        noisy = release(sums, sensitivity=self.bound, noise=release.noise)
        return [sign * each.abs() for sign, each in zip(signs, noisy, strict=True)]


class TellsItsSums(Sound):
    """Logs a norm without noise."""

    def gradient(self, sums: list[Tensor], params: Sequence[Tensor], release: Release) -> list[Tensor]:
        self.told = float(sums[0].norm())
        return super().gradient(sums, params, release)

    def logged(self) -> dict[str, float]:
        return {"norm": self.told}


class TakesMeans(Sound):
    """Averages over a micro-batch, of whatever size."""

    def contribution(self, here: SampleGradients, there: SampleGradients | None) -> list[Tensor]:
        return [each / max(1, len(here)) for each in super().contribution(here, there)]


class DividesByTheTrueNumber(Sound):
    """Counts the samples and divides by that."""

    def contribution(self, here: SampleGradients, there: SampleGradients | None) -> list[Tensor]:
        return [*super().contribution(here, there), (~here.is_left_out).sum()]

    def gradient(self, sums: list[Tensor], params: Sequence[Tensor], release: Release) -> list[Tensor]:
        count = float(sums[-1]) or 1.0
        return [each / count for each in release(sums[:-1], sensitivity=self.bound, noise=release.noise)]

    def nothing(self, params: Sequence[Tensor]) -> list[Tensor]:
        return [*super().nothing(params), torch.zeros((), dtype=torch.long)]


class ForgetsTheCount(DividesByTheTrueNumber):
    """And has no count where there are no samples."""

    def nothing(self, params: Sequence[Tensor]) -> list[Tensor]:
        return super().nothing(params)[:-1]


class CountsWhatIsNotFinite(Sound):
    """Adds one for each sample that was left out."""

    def contribution(self, here: SampleGradients, there: SampleGradients | None) -> list[Tensor]:
        first, *rest = super().contribution(here, there)
        return [first + here.is_left_out.sum(), *rest]


class GoesTheOtherWay(Sound):
    """Turns the gradient over."""

    def smoothed(self, found: list[Tensor]) -> list[Tensor]:
        return [-each for each in found]


class ForgetsAStep(Sound):
    """Its plan lacks the last step."""

    def events(self, noise: float, horizon: PrivateHorizon, first: int = 0) -> Any:
        shorter = PrivateHorizon(horizon.records, horizon.batch, horizon.steps - 1)
        return super().events(noise, shorter, first)


class PlansLessNoiseForMore(Sound):
    """Its noise falls as that of the run rises."""

    def noise_at(self, step: int, noise: float, horizon: PrivateHorizon) -> float:
        return 1 / noise


class TakesAnything(Sound):
    """Checks nothing."""

    def __init__(self, *, bound: float = 2.0, **common: Any) -> None:
        super().__init__(**common)
        self.bound = bound


class SwallowsOptions(Sound):
    """Loses a misspelt option."""

    def __init__(self, *, bound: float = 2.0, option_that_nothing_has: int = 0, **common: Any) -> None:
        super().__init__(bound=bound, **common)


@pytest.mark.parametrize(
    ("plugin", "expected"),
    [
        (DoesNotClip, {"bounds_each_sample"}),
        (ClipsEachParameter, {"bounds_each_sample"}),
        (UnderstatesItsSensitivity, {"bounds_each_sample"}),
        (MeasuresItsSensitivity, {"bounds_each_sample"}),
        (ReleasesNothing, {"bounds_each_sample", "releases_what_it_plans", "shows_nothing_but_what_is_released"}),
        (SavesNoise, {"releases_what_it_plans"}),
        (LooksBehindTheNoise, {"shows_nothing_but_what_is_released"}),
        (TellsItsSums, {"shows_nothing_but_what_is_released"}),
        (TakesMeans, {"adds_micro_batches", "follows_small_gradients", "leaves_out_what_is_not_finite"}),
        (DividesByTheTrueNumber, {"follows_small_gradients"}),
        (ForgetsTheCount, {"adds_micro_batches", "follows_small_gradients"}),
        (CountsWhatIsNotFinite, {"leaves_out_what_is_not_finite"}),
        (GoesTheOtherWay, {"follows_small_gradients"}),
        (ForgetsAStep, {"plans_every_step"}),
        (PlansLessNoiseForMore, {"plans_every_step", "releases_what_it_plans"}),
        (TakesAnything, {"refuses_what_is_out_of_range"}),
        (SwallowsOptions, {"rejects_unknown_options", "refuses_what_is_out_of_range"}),
    ],
)
def test_a_broken_method_fails_what_it_breaks(plugin: Any, expected: set[str]) -> None:
    assert failures(plugin) == expected


class MakesItsOwnNoise(Sound):
    """From the seed of the run."""

    def gradient(self, sums: list[Tensor], params: Sequence[Tensor], release: Release) -> list[Tensor]:
        generator = torch.Generator().manual_seed(release.step)
        return [each + torch.randn(each.shape, generator=generator) for each in release.summed(sums)]


class ThrowsTheNoiseAway(Sound):
    """Asks for noise, and goes on without it."""

    def gradient(self, sums: list[Tensor], params: Sequence[Tensor], release: Release) -> list[Tensor]:
        kept = [each / release.batch for each in sums]
        release([each.clone() for each in sums], sensitivity=self.bound, noise=release.noise)
        return kept


class SkipsEmptyBatches(Sound):
    """Makes no noise where there is nothing to hide."""

    def gradient(self, sums: list[Tensor], params: Sequence[Tensor], release: Release) -> list[Tensor]:
        return super().gradient(sums, params, release) if any(each.any() for each in sums) else sums


class ForgetsItsState(Sound):
    """Begins its mean anew after a pause."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class LogsWords(Sound):
    """Logs a word."""

    def logged(self) -> Any:
        return {"norm": "large"}


@pytest.mark.parametrize(
    ("plugin", "run"),
    [
        (SavesNoise, "spends_what_it_plans"),
        (PlansLessNoiseForMore, "spends_what_it_plans"),
        (MakesItsOwnNoise, "spends_what_it_plans"),
        (ThrowsTheNoiseAway, "drowns_in_huge_noise"),
        (CountsWhatIsNotFinite, "survives_records_that_are_not_finite"),
        (SkipsEmptyBatches, "steps_without_records"),
        (ForgetsItsState, "resumes_with_its_ledger"),
        (LogsWords, "logs_numbers"),
    ],
)
def test_a_run_shows_what_is_broken(plugin: Any, run: str) -> None:
    assert run in failures(plugin, runs={run})


def test_noise_that_can_be_foretold_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightrail.privacy import engine
    from lightrail.privacy.noise import DeterministicNoise

    assert failures(Sound, runs={"keeps_its_noise_secret"}) == set()
    monkeypatch.setattr(engine, "SystemNoise", lambda *_args, **_options: DeterministicNoise(3))
    assert failures(Sound, runs={"keeps_its_noise_secret"}) == {"keeps_its_noise_secret"}
