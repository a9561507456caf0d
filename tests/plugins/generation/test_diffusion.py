"""The losses of denoising diffusion."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lightrail.errors import ConfigurationError
from lightrail.generation import CosineVP, GaussianMixture, KarrasVE, LinearFlow, LinearVP, Prediction, sample
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.tasks.denoising import Example
from lightrail_generation.tasks.diffusion import Diffusion
from lightrail_generation.tasks.draws import Draws
from lightrail_generation.tasks.time_sampling import TimeSampling
from lightrail_generation.tasks.weightings import data_weight, edm_preconditioning, error_factor, snr
from lightrail_generation.tasks.zero_terminal_snr import ZeroTerminalSNR
from lightrail_generation.time_grids.uniform import Uniform

FORMS = ("data", "noise", "velocity", "score")
PATHS = {"linear": LinearVP, "cosine": CosineVP, "edm": KarrasVE, "flow": LinearFlow}


class Linear(nn.Module):
    """θ x: what the best linear network of a level is."""

    def __init__(self, theta=0.0):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))
        self.seen = []

    def forward(self, x, time, label):
        self.seen.append((x.detach(), time, label))
        return self.theta * x


class Exact(nn.Module):
    """Says what the exact denoiser of a mixture says, in the form that the task asks of its network."""

    def __init__(self, path, form, scale):
        super().__init__()
        self.mixture = GaussianMixture(path=path)
        self.form, self.scale = form, scale
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, time, label):
        t = time.double()
        level = self.mixture.path.levels(t, x.dim())
        data = self.mixture.output(x, t, None)
        return self.weight * Prediction(x, level, "data", data).get(self.form) / self.scale(level)


def whitened(count, features, seed=0):
    """x0 and z with exact second moments: identity, and nothing in common."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(count, 2 * features, generator=generator, dtype=torch.float64)
    q, _ = torch.linalg.qr(both)
    both = q * math.sqrt(count)
    return both[:, :features], both[:, features:]


def example(x0, z, t):
    draws = Draws(torch.Generator(), torch.device("cpu"))
    return Example(x0, None, None, torch.full((len(x0),), t, dtype=torch.float64), draws, z)


def best_theta(task, given):
    """Where the loss, a parabola in θ, is least."""
    theta = task.model.theta
    (slope,) = torch.autograd.grad(task.losses(given).mean(), theta, create_graph=False)
    with torch.no_grad():
        theta += 1
    (other,) = torch.autograd.grad(task.losses(given).mean(), theta)
    with torch.no_grad():
        theta -= 1
    return (theta - slope / (other - slope)).item()


@pytest.mark.parametrize("name", PATHS)
def test_losses_in_all_forms_are_one_loss(name):
    path = PATHS[name]()
    generator = torch.Generator().manual_seed(1)
    x0, z, guess = torch.randn(3, 7, 5, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64) * path.t_max
    level = path.levels(t, 2)
    x = level.alpha * x0 + level.sigma * z
    guessed = Prediction(x, level, "data", guess)
    truth = Prediction(x, level, "data", x0)
    expected = (x0 - guess).square()
    for form in FORMS:
        error = (truth.get(form) - guessed.get(form)).square() * error_factor(form, level)
        assert torch.allclose(error, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_factors_are_those_of_the_field(name):
    level = PATHS[name]().level(0.3)
    assert error_factor("noise", level) == pytest.approx((level.sigma / level.alpha) ** 2, rel=1e-12)
    assert error_factor("velocity", level) == pytest.approx(level.sigma**2, rel=1e-10)
    assert error_factor("score", level) == pytest.approx(level.sigma**4 / level.alpha**2, rel=1e-12)


@pytest.mark.parametrize("weighting", ["snr", "min_snr", "elbo", "edm"])
def test_under_a_weighting_every_prediction_trains_the_same_loss(weighting):
    found = []
    for prediction in FORMS:
        scale = {"score": lambda level: 1 / level.sigma}.get(prediction, lambda level: 1.0)
        task: Any = Diffusion(
            Exact("linear", prediction, scale), prediction, weighting, "linear", center=0.0, scale=1.0
        )
        x0, z = whitened(64, 2)
        t = torch.linspace(0.05, 0.95, 64, dtype=torch.float64)
        task.double()
        given = Example(x0, None, None, t, Draws(torch.Generator(), torch.device("cpu")), z)
        # What the network is told of the time is in single precision.
        found.append(task.losses(given))
    for each in found[1:]:
        assert torch.allclose(each, found[0], rtol=2e-5)


@pytest.mark.parametrize("t", [0.02, 0.2, 0.9])
def test_min_snr_is_what_its_paper_has_for_each_prediction(t):
    level = LinearVP().level(t)
    weight = data_weight("min_snr", level, gamma=5.0, sigma_data=1.0)
    ratio = snr(level)
    assert weight * error_factor("noise", level) == pytest.approx(min(ratio, 5) / ratio, rel=1e-10)
    assert weight * error_factor("velocity", level) == pytest.approx(min(ratio, 5) / (ratio + 1), rel=1e-10)
    assert weight == min(ratio, 5)


@pytest.mark.parametrize("name", PATHS)
def test_elbo_is_the_limit_of_single_steps(name):
    path, t, h = PATHS[name](), 0.4, 1e-5
    steps = (snr(path.level(t - h)) - snr(path.level(t + h))) / 2 / (2 * h)
    assert data_weight("elbo", path.level(t), gamma=5.0, sigma_data=1.0) == pytest.approx(steps, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "schedule"), [("lognormal", "linear"), ("logit_normal", "linear"), ("lognormal", "edm")]
)
def test_elbo_does_not_depend_on_how_times_are_drawn(kind, schedule):
    u = (torch.arange(400000, dtype=torch.float64) + 0.5) / 400000

    def bound(kind):
        task: Any = Diffusion(nn.Identity(), "data", "elbo", schedule, time_sampling=kind, time_mean=0.0, time_std=2.0)
        t = task.time_sampling.times(u)
        inside = (t > task.path.t_min * 1.001) & (t < task.path.t_max * 0.999)
        weight = task.weight(task.path.levels(t, 1), t)
        return float((weight * torch.sin(3 * t) ** 2 * torch.exp(-t) * t * inside).mean())

    assert bound(kind) == pytest.approx(bound("uniform"), rel=2e-2)


@pytest.mark.parametrize("kind", ["uniform", "lognormal", "logit_normal"])
@pytest.mark.parametrize("path", [LinearVP(), KarrasVE()], ids=["linear", "edm"])
def test_the_density_is_that_of_the_times(kind, path):
    sampling = TimeSampling(path, kind, path.t_min, path.t_max)
    u = torch.tensor([0.2, 0.2 + 1e-6, 0.7, 0.7 + 1e-6], dtype=torch.float64)
    t = sampling.times(u)
    assert bool((t.diff()[[0, 2]] > 0).all())
    slope = 1e-6 / t.diff()[[0, 2]]
    assert torch.allclose(sampling.density((t[[0, 2]] + t[[1, 3]]) / 2), slope, rtol=1e-4)


def test_times_follow_their_names():
    u = torch.tensor([0.5, 0.8413447460685429, 1e-12], dtype=torch.float64)
    sigma = TimeSampling(KarrasVE(), "lognormal", 0.002, 80.0).times(u)
    assert torch.allclose(sigma[:2].log(), torch.tensor([-1.2, 0.0], dtype=torch.float64), atol=1e-9)
    assert sigma[2] == 0.002
    t = TimeSampling(LinearFlow(), "logit_normal", 0.0, 1.0).times(u)
    assert torch.allclose(t[:2].logit(), torch.tensor([0.0, 1.0], dtype=torch.float64), atol=1e-9)
    with pytest.raises(ConfigurationError, match="time_std"):
        TimeSampling(KarrasVE(), "lognormal", 0.002, 80.0, std=0.0)


def test_karras_preconditioning_is_the_papers_table():
    level, sd = KarrasVE().level(1.7), 0.5
    skip, out, into = edm_preconditioning(level, sd)
    total = 1.7**2 + sd**2
    assert (skip, out, into) == pytest.approx((sd**2 / total, 1.7 * sd / total**0.5, total**-0.5), rel=1e-12)
    task: Any = Diffusion(nn.Identity(), schedule="edm", sigma_data=sd)
    times = torch.tensor([1.7], dtype=torch.float64)
    assert float(task.weight(level, times)) == pytest.approx(total / (1.7 * sd) ** 2, rel=1e-7)
    named = Diffusion(nn.Identity(), schedule="edm", sigma_data=sd, weighting="edm")
    assert float(named.weight(level, times)) == pytest.approx(total / (1.7 * sd) ** 2, rel=1e-7)


def test_karras_loss_is_one_at_the_start():
    task: Any = Diffusion(Linear(0.0), schedule="edm", sigma_data=0.5).double()
    x0, z = whitened(512, 3)
    for sigma in (0.01, 0.5, 20.0):
        assert task.losses(example(0.5 * x0, z, sigma)).mean().item() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 5.0])
def test_karras_network_reaches_the_denoiser_of_a_gaussian(sigma):
    task: Any = Diffusion(Linear(0.3), schedule="edm", sigma_data=0.5).double()
    x0, z = whitened(512, 3)
    given = example(0.8 * x0, z, sigma)
    theta = best_theta(task, given)
    with torch.no_grad():
        task.model.theta.fill_(theta)
    x = torch.ones(1, 3, dtype=torch.float64)
    level = task.path.level(sigma)
    found = task.answer(x, level, torch.tensor([sigma], dtype=torch.float64), None)
    assert torch.allclose(found, 0.8**2 / (0.8**2 + sigma**2) * x, atol=1e-9)


def test_where_the_data_are_as_assumed_the_best_network_says_nothing():
    task: Any = Diffusion(Linear(0.3), schedule="edm", sigma_data=0.5).double()
    x0, z = whitened(512, 3)
    assert best_theta(task, example(0.5 * x0, z, 1.3)) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("prediction", ["noise", "data", "velocity", "score", "edm"])
@pytest.mark.parametrize("schedule", ["linear", "edm"])
def test_every_prediction_of_the_best_linear_network_is_the_denoiser_of_a_gaussian(prediction, schedule):
    task: Any = Diffusion(Linear(0.2), prediction, schedule=schedule, sigma_data=0.5, center=0.0, scale=1.0).double()
    x0, z = whitened(512, 3)
    given = example(0.8 * x0, z, 0.6)
    theta = best_theta(task, given)
    with torch.no_grad():
        task.model.theta.fill_(theta)
    level = task.path.level(0.6)
    x = torch.ones(1, 3, dtype=torch.float64)
    found = task.prediction(x, level, torch.tensor([0.6], dtype=torch.float64), None).data
    expected = level.alpha * 0.64 / (level.alpha**2 * 0.64 + level.sigma**2)
    assert torch.allclose(found, expected * x, atol=1e-8)


def test_karras_on_a_variance_preserving_path_is_the_velocity():
    x0, z = whitened(32, 2)
    x, level = x0.clone(), LinearVP().level(0.3)
    time = torch.full((32,), 0.3, dtype=torch.float64)
    edm = Diffusion(Linear(-0.4), "edm", schedule="linear", sigma_data=1.0).double()
    velocity = Diffusion(Linear(0.4), "velocity", schedule="linear").double()
    one, other = edm.prediction(x, level, time, None), velocity.prediction(x, level, time, None)
    assert torch.allclose(one.data, other.data, atol=1e-10)
    assert torch.allclose(edm.losses(example(x0, z, 0.3)), velocity.losses(example(x0, z, 0.3)), atol=1e-9)


@pytest.mark.parametrize("prediction", ["noise", "velocity", "edm"])
def test_what_the_network_sees_has_the_size_of_one(prediction):
    task: Any = Diffusion(Linear(1.0), prediction, schedule="edm", sigma_data=1.0).double()
    x0, z = whitened(512, 3)
    for sigma in (0.01, 1.0, 60.0):
        task.losses(example(x0, z, sigma))
        x, time, label = task.model.seen[-1]
        assert float(x.square().mean()) == pytest.approx(1.0, abs=1e-9)
        assert time.dtype == torch.float32
        assert float(time[0]) == pytest.approx(math.log(sigma) / 4, abs=1e-6)
        assert label is None


def test_zero_terminal_snr_ends_in_pure_noise_and_is_the_rescaled_table():
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    path = LinearVP()
    rescaled = ZeroTerminalSNR(path)
    assert rescaled.level(1.0).alpha == 0.0
    assert rescaled.level(1.0).sigma == 1.0
    assert rescaled.level(0.0).alpha == 1.0
    assert rescaled.level(0.0).sigma == 0.0
    times = torch.linspace(0, 1, 11, dtype=torch.float64)
    bars = path.alpha(times) ** 2
    betas = 1 - bars / torch.cat((bars.new_ones(1), bars[:-1]))
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    assert torch.allclose(rescaled.alpha(times) ** 2, theirs, atol=1e-10)
    assert torch.allclose(rescaled.alpha(times) ** 2 + rescaled.sigma(times) ** 2, torch.ones_like(times), atol=1e-14)
    inner = times[1:-1].clone().requires_grad_()
    for value, rate in ((rescaled.alpha, rescaled.alpha_rate), (rescaled.sigma, rescaled.sigma_rate)):
        (expected,) = torch.autograd.grad(value(inner).sum(), inner)
        assert torch.allclose(rate(inner.detach()), expected, rtol=1e-9)
    small = torch.tensor(1e-9, dtype=torch.float64)
    assert float(rescaled.sigma(small) ** 2) == pytest.approx(1e-10 / (1 - rescaled._last), rel=1e-4)


@pytest.mark.parametrize("prediction", ["velocity", "data", "edm"])
def test_sampling_from_no_signal_at_all_is_finite(prediction):
    task: Any = Diffusion(Linear(0.1), prediction, schedule="cosine", zero_terminal_snr=True).double()
    task.state_sizes[0] = 3
    grid = Uniform().grid(task.path, 5, finite=False)
    assert grid[0].alpha == 0
    assert bool(sample(task.denoiser(), DDIM(5), grid, range(2)).x.isfinite().all())


@pytest.mark.parametrize("weighting", ["uniform", "snr", "min_snr", "elbo", "edm"])
@pytest.mark.parametrize("prediction", ["velocity", "data", "edm"])
def test_the_loss_at_no_signal_at_all_is_finite(prediction, weighting):
    task: Any = Diffusion(Linear(0.1), prediction, weighting, "cosine", zero_terminal_snr=True).double()
    x0, z = whitened(8, 2)
    assert bool(task.losses(example(x0, z, task.path.t_max)).isfinite().all())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prediction": "noise", "zero_terminal_snr": True}, "noise"),
        ({"prediction": "score", "zero_terminal_snr": True}, "score"),
        ({"schedule": "edm", "zero_terminal_snr": True}, "edm"),
        ({"prediction": "epsilon"}, "prediction has no choice 'epsilon'"),
        ({"weighting": "snrs"}, "weighting has no choice"),
        ({"schedule": "quadratic"}, "schedule has no choice"),
        ({"time_sampling": "normal"}, "time_sampling has no choice"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma"),
        ({"sigma_data": -1.0}, "sigma_data"),
        ({"scale": 0.0}, "scale"),
        ({"label_dropout": 1.0}, "label_dropout"),
    ],
)
def test_options_that_cannot_be_are_refused(options, named):
    with pytest.raises(ConfigurationError, match=named):
        Diffusion(nn.Identity(), **options)
