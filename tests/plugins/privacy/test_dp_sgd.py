"""DP-SGD under the engine: against a loop by hand, its noise, its micro-batches, its adaptive norm."""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightrail.errors import ConfigurationError
from lightrail.privacy import PrivateHorizon
from lightrail.privacy.noise import DeterministicNoise
from lightrail.testing import PrivacySuite, examine
from lightrail.testing.privacy_release import RELEASE_CHECKS
from lightrail.testing.privacy_runs import NoisyStep, clusters, gradients_of, private_run
from lightrail_privacy.dp_sgd import DPSGD

DELTA = 1e-3
SEED = 3  # of private_run


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8))


def method(**options):
    return DPSGD(**{"delta": DELTA, "deterministic_noise": True, **options})


def one_by_one(net, rows):
    """[B, *shape] for each parameter, from one backward pass a sample."""
    x, y = clusters()
    found = [
        torch.autograd.grad(F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]), list(net.parameters())) for i in rows
    ]
    return [torch.stack(each) for each in zip(*found, strict=True)]


def relative(found, expected):
    a, b = (torch.cat([each.detach().flatten() for each in tensors]) for tensors in (found, expected))
    return float((a - b).norm() / b.norm())


class TestAdaptive(PrivacySuite):
    plugin = DPSGD
    options: ClassVar[Any] = {"clip": "adaptive"}


@pytest.mark.parametrize("clip", ["automatic", "per_layer"])
@pytest.mark.parametrize("check", RELEASE_CHECKS)
def test_every_clip_releases_what_it_says(check, clip):
    outcome = examine(check, DPSGD, {"clip": clip})
    assert outcome.state == "passed", outcome.reason


def test_without_noise_and_clipping_it_is_the_full_batch_step():
    net, plain = network(), network()
    private_run(method(noise=0.0, clip_norm=1e9, sampling="full"), epochs=5, lr=0.5, network=net)
    x, y = clusters()
    for _ in range(5):
        plain.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        with torch.no_grad():
            for p in plain.parameters():
                p.sub_(0.5 * (p.grad if p.grad is not None else 0))
    assert relative(list(net.parameters()), list(plain.parameters())) < 3e-7


@pytest.mark.parametrize("clip", ["flat", "automatic", "per_layer"])
@pytest.mark.parametrize("most", [None, 3])
def test_without_noise_it_is_the_loop_over_the_poisson_batch(clip, most):
    net = network()
    start = copy.deepcopy(net)
    options = {"clip": clip, "clip_norm": 0.7, "max_physical_batch": most}
    end = private_run(method(noise=0.0, **options), batch_size=16, epochs=1, network=net)
    drawn = DeterministicNoise(SEED, 1).bernoulli(96, 16, 96).nonzero()[:, 0].tolist()
    assert len(drawn) != 16
    gradients = one_by_one(start, drawn)
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients])
    if clip == "per_layer":
        factors = list((0.7 / 2 / norms).clamp(max=1))
    else:
        whole = norms.norm(dim=0)
        factors = [(0.7 / whole).clamp(max=1) if clip == "flat" else 0.7 / (whole + 0.01)] * 4
    expected = [torch.tensordot(c, g, 1) / 16 for c, g in zip(factors, gradients, strict=True)]
    assert relative(end.gradients[0], expected) < 1e-6


def test_the_noise_has_the_deviation_that_is_accounted_for():
    end = private_run(method(noise=1000.0, clip_norm=0.5), batch_size=16, epochs=4, lr=1e-9)
    noise = torch.stack([torch.cat([g.flatten() for g in step]) for step in end.gradients]) * 16  # [steps, numbers]
    count = noise.numel()
    assert noise.square().mean() == pytest.approx(500.0**2, rel=3 * math.sqrt(2 / count))
    assert abs(float(noise.mean())) < 3 * 500 / math.sqrt(count)
    for a, b in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1])):
        correlation = float((a * b).mean()) / 500.0**2
        assert abs(correlation) < 3.5 / math.sqrt(a.numel())


def test_micro_batches_and_samples_one_by_one_are_the_same_run():
    whole, cut, alone = (
        private_run(method(noise=0.8, **each), network=network()).params
        for each in ({}, {"max_physical_batch": 5}, {"engine": "one_by_one"})
    )
    assert relative(cut, whole) < 1e-5
    assert relative(alone, whole) < 1e-5


def test_a_calibrated_run_stays_within_its_target():
    end = private_run(DPSGD(epsilon=2.0, delta=DELTA, accountant="rdp"))
    assert end.ledger.is_private
    assert 1.9 < end.ledger.epsilon() <= 2.0 * (1 + 1e-3)
    assert end.ledger.clip == "flat, norm 1"


def adaptive(norms, **options):
    """One step on gradients with given norms; the method, its parameters and what it released."""
    own = DPSGD(clip="adaptive", **{"noise": 1.0, "count_noise": 10.0, **options})
    params = [nn.Parameter(torch.zeros(2, dtype=torch.float64))]
    horizon = PrivateHorizon(100, 8, 10)
    own.prepare(horizon)
    release = NoisyStep(horizon, own.noise or 0.0, 0, 8)
    gradients = torch.tensor(norms, dtype=torch.float64)[:, None] * torch.tensor([0.6, 0.8], dtype=torch.float64)
    sums = own.contribution(gradients_of(params, [gradients]), None)
    found = own.gradient(sums, params, release)
    return own, found, release


def test_adaptive_splits_its_noise_between_gradient_and_count():
    own, found, release = adaptive([0.5, 0.5, 3.0, 4.0, 0.25])
    (sums, sensitivity, z), (count, half, z_count) = release.released
    assert (sensitivity, half) == (1.0, 0.5)
    assert z == pytest.approx(1.0012523, abs=1e-7)
    assert z_count * half == pytest.approx(10.0)
    assert release.cost == pytest.approx(1.0, rel=1e-12)
    assert count[0].item() == 0.5
    assert sums[0].norm().item() == pytest.approx(3.25)
    assert found[0].norm().item() == pytest.approx(3.25 / 8)
    fraction = 0.5 / 8 + 0.5
    assert own.logged()["clip_norm"] == pytest.approx(math.exp(-0.2 * (fraction - 0.5)))


def test_the_next_step_is_clipped_at_the_norm_that_was_found():
    own, _, release = adaptive([9.0] * 8)
    assert own.logged() == {"clip_norm": pytest.approx(math.exp(0.1))}
    params = [nn.Parameter(torch.zeros(2, dtype=torch.float64))]
    gradients = gradients_of(params, [torch.tensor([[9.0, 0.0]], dtype=torch.float64)])
    own.gradient(own.contribution(gradients, None), params, release)
    assert release.released[2][0][0].norm().item() == pytest.approx(math.exp(0.1))
    assert release.released[2][1] == pytest.approx(math.exp(0.1))
    again = DPSGD(clip="adaptive", noise=1.0, count_noise=10.0)
    again.load_state_dict(own.state_dict())
    assert again.logged() == own.logged()


def test_a_sample_that_is_left_out_is_not_counted():
    assert adaptive([0.5, 3.0, math.inf])[2].released[1][0][0].item() == 0.0


def test_the_count_has_a_twentieth_of_the_batch_as_noise():
    _, _, release = adaptive([1.0], count_noise=None, noise=0.5)
    assert release.released[1][2] == pytest.approx(2 * 8 / 20)


def test_without_noise_the_count_has_none_either():
    _, _, release = adaptive([1.0], count_noise=None, noise=0.0)
    assert [noise for _, _, noise in release.released] == [0.0, 0.0]


def test_adaptive_refuses_a_count_that_costs_too_much():
    with pytest.raises(ConfigurationError, match="counting how many") as error:
        adaptive([1.0], count_noise=None, noise=0.9)  # 2 * 8 / 20 = 0.8
    assert "count_noise above 0.45" in str(error.value)


def test_adaptive_refuses_it_before_anything_is_released_where_the_noise_is_calibrated():
    with pytest.raises(ConfigurationError, match="counting how many"):
        private_run(DPSGD(clip="adaptive", epsilon=0.1, delta=DELTA, accountant="rdp"))


def test_adaptive_finds_the_norm_of_its_quantile():
    own = method(clip="adaptive", clip_norm=5.0, noise=0.3)
    private_run(own, epochs=8, lr=1e-6, network=network())
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in one_by_one(network(), range(96))]).norm(dim=0)
    assert own.logged()["clip_norm"] == pytest.approx(float(norms.median()), rel=0.15)


@pytest.mark.parametrize(
    "options",
    [
        {"clip": "psac"},
        {"clip_norm": 0.0},
        {"clip_norm": math.inf},
        {"gamma": 0.0},
        {"quantile": 1.5},
        {"clip_lr": 0.0},
        {"count_noise": 0.0},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigurationError) as error:
        DPSGD(**options)
    assert next(iter(options)) in error.value.found
    assert error.value.allowed
    assert error.value.remedy


@pytest.mark.parametrize("clip", ["flat", "automatic", "per_layer", "adaptive"])
def test_the_ledger_says_how_it_clips(clip):
    assert DPSGD(clip=clip, clip_norm=2.5).clipping.startswith(clip.replace("_", " "))
    assert "2.5" in DPSGD(clip=clip, clip_norm=2.5).clipping
