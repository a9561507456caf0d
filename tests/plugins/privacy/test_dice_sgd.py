# pyright: reportArgumentType=false, reportOptionalSubscript=false
"""DiceSGD: the feedback removes the bias of clipping, the noise is the theorem's, and nothing is promised plainly."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from lightrail.errors import ConfigurationError
from lightrail.privacy import PrivacyMethod, PrivateHorizon
from lightrail.sample_gradients import SampleGradients
from lightrail.sample_gradients.pieces import Piece
from lightrail_privacy.dice_sgd import DiceSGD, charged_sensitivity
from lightrail_privacy.dp_sgd import DPSGD

DATA = torch.cat([torch.zeros(150), torch.full((50,), 8.0)]).double()[:, None]
ACCEPTED = {"accounting": "paper", "assume_grad_bound": 100.0}


class RecordingRelease:
    """A release whose noise is handed in, and which remembers what it was asked for."""

    def __init__(self, batch, noise=0.0, draws=None):
        self.step, self.batch, self.noise = 0, batch, noise
        self.horizon = PrivateHorizon(batch, batch, 1)
        self.draws = draws
        self.asked = []
        self.hidden = []

    def __call__(self, sums, *, sensitivity, noise):
        self.asked.append((sensitivity, noise))
        draws = [torch.zeros_like(each) for each in sums] if self.draws is None else self.draws
        return [each + noise * sensitivity * draw for each, draw in zip(sums, draws, strict=True)]

    def summed(self, sums):
        self.hidden.append(len(sums))
        return list(sums)


def dice(**options):
    return DiceSGD(**{**ACCEPTED, "noise": 0.0, **options})


def of_samples(w, gradients):
    return SampleGradients([w], [[Piece(w, gradients)]])


def descended(method, steps, lr=0.1, data=DATA):
    """Gradient descent on half the mean squared distance to the data, by whole batches."""
    w = torch.nn.Parameter(torch.zeros(data.shape[1], dtype=data.dtype))
    release = RecordingRelease(len(data))
    with torch.no_grad():
        for _ in range(steps):
            sums = method.contribution(of_samples(w, w - data), None)
            w -= lr * method.gradient(sums, [w], release)[0]
    return w


@pytest.mark.parametrize(("norm", "biased"), [(1.0, 1 / 3), (0.1, 1 / 30)])
def test_clipping_alone_ends_beside_the_optimum(norm, biased):
    assert descended(DPSGD(clip_norm=norm, noise=0.0), 300).item() == pytest.approx(biased, abs=1e-4)


def test_the_feedback_removes_the_bias():
    assert descended(dice(clip_norm=1.0), 500).item() == pytest.approx(2.0, abs=1e-3)


def test_a_small_norm_takes_its_time():
    assert descended(dice(clip_norm=0.1), 4000, lr=0.05).item() == pytest.approx(1.84, abs=0.01)


def test_above_every_norm_it_is_dp_sgd():
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    method = dice(clip_norm=50.0)
    assert torch.equal(descended(method, 20, data=data), descended(DPSGD(clip_norm=50.0, noise=0.0), 20, data=data))
    assert method._error is not None
    assert all(torch.equal(each, torch.zeros_like(each)) for each in method._error)


def test_two_steps_by_hand():
    w = torch.nn.Parameter(torch.zeros(2))
    method, release = dice(clip_norm=1.0, feedback_norm=2.0), RecordingRelease(2)
    gradients = of_samples(w, torch.tensor([[6.0, 8.0], [0.0, 0.5]]))
    first = method.gradient(method.contribution(gradients, None), [w], release)[0]
    # (0.6, 0.8) + (0, 0.5), halved; (5.4, 7.2) / 2 is owed, whose norm is 4.5.
    torch.testing.assert_close(first, torch.tensor([0.3, 0.65]))
    torch.testing.assert_close(method._error[0], torch.tensor([2.7, 3.6]))
    second = method.gradient(method.nothing([w]), [w], release)[0]
    torch.testing.assert_close(second, torch.tensor([1.2, 1.6]))
    torch.testing.assert_close(method._error[0], torch.tensor([1.5, 2.0]))


def test_nothing_is_lost():
    """All steps together and what is still owed are the sum of the whole gradients."""
    generator = torch.Generator().manual_seed(1)
    w = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    method, release = dice(clip_norm=0.3, feedback_norm=0.4), RecordingRelease(8)
    given, whole = torch.zeros_like(w), torch.zeros_like(w)
    for _ in range(30):
        gradients = torch.randn(8, 5, generator=generator, dtype=torch.float64)
        whole = whole + gradients.sum(0) / 8
        given = given + method.gradient(method.contribution(of_samples(w, gradients), None), [w], release)[0]
    torch.testing.assert_close(given + method._error[0], whole)


def test_the_noise_is_that_of_the_theorem_and_never_in_the_feedback():
    w = torch.nn.Parameter(torch.zeros(3))
    gradients = torch.tensor([[9.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    steps = []
    for noise in (0.0, 1.5):
        method = dice(clip_norm=1.0, feedback_norm=3.0, noise=noise)
        release = RecordingRelease(2, noise, [torch.ones(3)])
        rounds = [method.gradient(method.contribution(of_samples(w, gradients), None), [w], release)[0]
                  for _ in range(2)]  # fmt: skip
        assert release.asked == [(math.sqrt(1 + 2 * 9), noise)] * 2
        assert release.hidden == [1, 1]
        steps.append((rounds, method._error))
    (plain, owed), (noisy, still_owed) = steps
    for quiet, loud in zip(plain, noisy, strict=True):
        torch.testing.assert_close(loud - quiet, torch.full((3,), 1.5 * math.sqrt(19) / 2))
    torch.testing.assert_close(owed, still_owed)


@pytest.mark.parametrize(("norms", "charged"), [((1, 1, 5), 3**0.5), ((1, 2, 5), 3.0), ((1, 5, 2), 3.0)])
def test_what_a_step_is_charged_for(norms, charged):
    assert charged_sensitivity(*norms) == pytest.approx(charged)


def test_no_sample_adds_more_to_the_feedback_than_was_assumed():
    w = torch.nn.Parameter(torch.zeros(2))
    gradients = of_samples(w, torch.tensor([[3e4, 4e4], [float("nan"), 0.0]]))
    kept, cut_off = dice(assume_grad_bound=5.0).contribution(gradients, None)
    torch.testing.assert_close(kept, torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(cut_off, torch.tensor([2.4, 3.2]))


@pytest.mark.parametrize("options", [
    {}, {"epsilon": 3.0}, {"noise": 1.0, "accounting": "paper"}, {"epsilon": 3.0, "assume_grad_bound": 1.0},
])  # fmt: skip
def test_a_conditional_guarantee_is_not_given_unasked(options):
    with pytest.raises(ConfigurationError, match="conditional") as error:
        DiceSGD(**options)
    assert "accounting=paper" in error.value.remedy
    assert "dp_sgd" in error.value.remedy


def test_the_ledger_is_told():
    told = " ".join(dice(assume_grad_bound=7.0).assumptions)
    for words in ("Conditional", "longer than 7", "never made private", "questioned", "resumed run"):
        assert words in told


@pytest.mark.parametrize("options", [
    {"clip_norm": 0.0}, {"clip_norm": 2.0, "feedback_norm": 1.0}, {"feedback_norm": math.inf},
    {"assume_grad_bound": -1.0}, {"accounting": "plain"}, {"sampling": "shuffle"},
])  # fmt: skip
def test_options_out_of_range(options):
    with pytest.raises(ConfigurationError):
        dice(**options)


def test_no_checkpoint_holds_the_feedback():
    method = dice(clip_norm=0.1)
    descended(method, 3)
    assert method._error[0].abs().sum() > 0
    assert method.state_dict() == {}
    assert method.logged() == {}


def test_a_run_says_that_its_guarantee_is_conditional(monkeypatch):
    @dataclasses.dataclass
    class Composed:
        notes: list[str]
        resumed: object = None

    monkeypatch.setattr(PrivacyMethod, "wrap", lambda method, run: run)
    (note,) = dice().wrap(Composed([])).notes
    assert "conditional" in note
    assert "starts again at zero" in dice().wrap(Composed([], SimpleNamespace())).notes[1]
