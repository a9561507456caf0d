"""Stochastic interpolants."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import Evaluator, Prediction, sample
from lightrail_generation.samplers.flow import FlowHeun
from lightrail_generation.samplers.si_sde import SISDE
from lightrail_generation.tasks.denoising import Example
from lightrail_generation.tasks.draws import Draws
from lightrail_generation.tasks.flow_matching import FlowMatching
from lightrail_generation.tasks.stochastic_interpolant import GAMMAS, InterpolantPath, StochasticInterpolant
from lightrail_generation.time_grids.uniform import Uniform

BLURRED = ("sqrt", "quadratic", "sin2")
CENTRE, SPREAD = 0.6, 0.4


class Linear(nn.Module):
    """θ x + ζ."""

    def __init__(self, theta=0.0):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))
        self.shift = nn.Parameter(torch.tensor(0.0, dtype=torch.float64))
        self.seen = []

    def forward(self, x, time, label):
        self.seen.append(x.detach())
        return self.theta * x + self.shift


def moments(path, t):
    """Mean and variance of x, their derivatives, for data N(0.6, 0.16) and a standard normal source."""
    time = torch.as_tensor(t, dtype=torch.float64)
    a, b, c = path.alpha(time), path.beta(time), path.gamma(time)
    a_rate, noise_rate = path.alpha_rate(time), path.sigma(time) * path.sigma_rate(time)
    variance = a**2 * SPREAD**2 + b**2 + c**2
    return a * CENTRE, variance, a_rate * CENTRE, a_rate * a * SPREAD**2 + noise_rate, c


class ExactVelocity(nn.Module):
    """u = m' + cov(x', x)/var(x) (x − m), the conditional mean of x' where all is Gaussian."""

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.one = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, time, label):
        t = time.double().view(-1, 1)
        mean, variance, mean_rate, covariance, _ = moments(self.path, t)
        return self.one * (mean_rate + covariance / variance * (x - mean))


class ExactNoise(nn.Module):
    """η = γ (x − m)/var(x)."""

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.one = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, time, label):
        mean, variance, _, _, gamma = moments(self.path, time.double().view(-1, 1))
        return self.one * gamma / variance * (x - mean)


def exact(gamma, interpolant="linear"):
    task: Any = StochasticInterpolant(nn.Linear(1, 1), gamma, interpolant)
    task.model, task.noise_model = ExactVelocity(task.blur), ExactNoise(task.blur)
    task.state_sizes[0] = 1
    return task


class Fixed(Draws):
    """Gives the numbers that it was given."""

    def __init__(self, *numbers):
        super().__init__(torch.Generator(), torch.device("cpu"))
        self.numbers = list(numbers)

    def normal(self, like):
        return self.numbers.pop(0)


def whitened(count, columns, seed=0):
    """Columns of mean 0 with exact second moments: identity."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, columns + 1, generator=generator, dtype=torch.float64)
    drawn[:, 0] = 1
    q, _ = torch.linalg.qr(drawn)
    return q[:, 1:] * count**0.5


def gradient(task, t, draws, x0):
    times = torch.full((len(x0),), t, dtype=torch.float64)
    loss = task.losses(Example(x0, None, None, times, draws)).mean()
    return torch.autograd.grad(loss, list(task.parameters()), allow_unused=True)


def test_without_blur_the_gradient_is_that_of_flow_matching():
    x0, y = torch.randn(2, 16, 3, dtype=torch.float64)
    for t in (0.0, 0.3, 1.0):
        ours = gradient(StochasticInterpolant(Linear(0.4), "zero"), t, Fixed(y), x0)
        theirs = gradient(FlowMatching(Linear(0.4)), t, Fixed(y), x0)
        for one, other in zip(ours, theirs, strict=True):
            assert torch.allclose(2 * one, other, atol=1e-12)


def test_without_blur_there_is_one_network():
    task: Any = StochasticInterpolant(Linear(0.4), "zero")
    assert task.noise_model is None
    assert sum(1 for _ in task.parameters()) == 2
    assert sum(1 for _ in StochasticInterpolant(Linear(0.4), "sqrt").parameters()) == 4


@pytest.mark.parametrize("interpolant", ["linear", "trigonometric"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_an_interpolant_begins_with_the_data_and_ends_with_the_source(gamma, interpolant):
    path = InterpolantPath(interpolant, gamma)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert torch.allclose(path.alpha(ends), 1 - ends, atol=1e-15)
    assert torch.allclose(path.beta(ends), ends, atol=1e-15)
    assert torch.allclose(path.gamma(ends), 0 * ends, atol=1e-15)
    inner = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    assert bool((path.gamma(inner) > 0).all()) == (gamma != "zero")
    assert torch.allclose(path.sigma(inner) ** 2, path.beta(inner) ** 2 + path.gamma(inner) ** 2, atol=1e-14)
    if gamma != "zero":
        for name in ("alpha", "beta", "gamma", "sigma"):
            t = inner.clone().requires_grad_()
            (expected,) = torch.autograd.grad(getattr(path, name)(t).sum(), t)
            assert torch.allclose(getattr(path, f"{name}_rate")(inner), expected, atol=1e-12)


def test_blurs_are_those_of_the_paper():
    t = torch.tensor([0.2], dtype=torch.float64)
    found = [InterpolantPath("linear", gamma).gamma(t).item() for gamma in GAMMAS]
    assert found == pytest.approx([0.0, 0.4, 0.16, math.sin(0.2 * math.pi) ** 2], abs=1e-14)


@pytest.mark.parametrize("interpolant", ["linear", "trigonometric"])
@pytest.mark.parametrize("gamma", BLURRED)
@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_between_gaussians_the_least_loss_is_at_the_closed_form(gamma, interpolant, t):
    """At the minimum the gradient vanishes: for a factor, and for the slope and the shift of a linear network."""
    task: Any = exact(gamma, interpolant).double()
    columns = whitened(256, 3)
    x0 = CENTRE + SPREAD * columns[:, :1]
    found = gradient(task, t, Fixed(columns[:, 1:2], columns[:, 2:]), x0)
    # The network is told the time in single precision.
    assert max(abs(slope.item()) for slope in found) < 1e-6
    mean, variance, mean_rate, covariance, c = (each.item() for each in moments(task.blur, t))
    linear: Any = StochasticInterpolant(Linear(), gamma, interpolant).double()
    with torch.no_grad():
        for model, slope, shift in (
            (linear.model, covariance / variance, mean_rate - covariance / variance * mean),
            (linear.noise_model, c / variance, -c / variance * mean),
        ):
            model.theta.fill_(slope)
            model.shift.fill_(shift)
    found = gradient(linear, t, Fixed(columns[:, 1:2], columns[:, 2:]), x0)
    assert max(abs(slope.item()) for slope in found) < 1e-9


@pytest.mark.parametrize("gamma", BLURRED)
def test_flow_and_score_of_the_learned_networks_agree_between_gaussians(gamma):
    task: Any = exact(gamma)
    denoiser: Any = task.denoiser()
    x, level = torch.tensor([[0.3], [-1.0]], dtype=torch.float64), task.path.level(0.4)
    found: Any = denoiser.predict(x, level)
    mean, variance, *_ = moments(task.blur, 0.4)
    assert torch.allclose(found.score, -(x - mean) / variance, atol=1e-6)
    converted = Prediction(x, level, "flow", found.flow).score
    assert torch.allclose(converted, found.score, atol=1e-6)
    assert torch.allclose(found.data, CENTRE + level.alpha * SPREAD**2 / variance * (x - mean), atol=1e-6)


def test_the_score_is_the_second_networks_and_is_asked_only_when_needed():
    task: Any = exact("sqrt")
    calls = []
    task.noise_model.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        task.noise_model.one.fill_(3.0)
    x, level = torch.tensor([[0.3], [0.5]], dtype=torch.float64), task.path.level(0.4)
    found: Any = task.denoiser().predict(x, level)
    _ = found.flow, found.data
    assert calls == []
    mean, variance, *_ = moments(task.blur, 0.4)
    assert torch.allclose(found.score, -3 * (x - mean) / variance, atol=1e-6)
    assert calls == [1]
    chosen = task.denoiser().predict(x, level).map(lambda tensor: tensor[1:])
    assert torch.equal(chosen.score, found.score[1:])


@pytest.mark.parametrize("gamma", BLURRED)
def test_at_the_ends_where_nothing_blurs_the_flow_gives_the_score(gamma):
    """sin²(π) is not quite 0, and a network is never quite right."""
    task: Any = exact(gamma)
    with torch.no_grad():
        task.noise_model.one.fill_(1.1)
    x = torch.tensor([[0.3]], dtype=torch.float64)
    assert torch.allclose(task.denoiser().predict(x, task.path.level(1.0)).score, -x, atol=1e-6)
    paired = StochasticInterpolant(Linear(0.5), gamma, source="paired").double()
    assert paired.denoiser().predict(x, paired.path.level(1.0)).score.abs().max().item() < 100


class Numbers:
    """Noise in one draw for all samples, which is quicker than one for each."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(1)

    def normal(self, step, draw=0):
        return torch.randn(4000, 1, generator=self.generator, dtype=torch.float64)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_samples_have_the_datas_moments_whatever_the_noise_of_the_sampler(gamma, epsilon):
    task: Any = exact(gamma)
    if gamma == "zero":
        task.noise_model = None
    denoiser: Any = task.denoiser()
    sampler = SISDE(60, epsilon=epsilon, method="heun")
    noise: Any = Numbers()
    grid = sampler.grid(denoiser.path, Uniform())
    with torch.no_grad():
        found = sampler.solve(sampler.start(noise.normal(-1), noise, grid), Evaluator(denoiser), grid).x
    assert found.mean().item() == pytest.approx(CENTRE, abs=0.03)
    assert found.std().item() == pytest.approx(SPREAD, abs=0.03)


def test_a_pair_of_signs_keeps_the_gradient_bounded_towards_the_ends():
    def spread(antithetic, t):
        task: Any = StochasticInterpolant(Linear(0.5), "sqrt", antithetic=antithetic).double()
        generator = torch.Generator().manual_seed(0)
        slopes = []
        for _ in range(200):
            x0, y, z = torch.randn(3, 1, 2, generator=generator, dtype=torch.float64)
            slopes.append(gradient(task, t, Fixed(y, z), x0)[0].item())
        return torch.tensor(slopes).std().item()

    assert spread(False, 1e-6) > 50 * spread(False, 0.5)
    assert spread(True, 1e-6) < 5 * spread(True, 0.5)


def test_the_pair_is_two_evaluations_of_each_network():
    for antithetic, passes in ((True, 2), (False, 1)):
        task: Any = StochasticInterpolant(Linear(0.5), "sqrt", antithetic=antithetic).double()
        task.training_step(torch.randn(4, 2, dtype=torch.float64), 0)
        assert len(task.model.seen) == len(task.noise_model.seen) == passes
    one: Any = StochasticInterpolant(Linear(0.5)).double()
    one.training_step(torch.randn(4, 2, dtype=torch.float64), 0)
    assert not torch.equal(one.model.seen[0], one.model.seen[1])


def test_times_keep_off_the_ends_where_the_blur_is_not_smooth():
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert StochasticInterpolant(Linear(), "sqrt").time_sampling.times(ends).tolist() == [0.001, 0.999]
    assert StochasticInterpolant(Linear(), "sin2").time_sampling.times(ends).tolist() == [0.0, 1.0]


def test_a_paired_source_is_the_second_tensor_of_a_batch():
    task: Any = StochasticInterpolant(Linear(0.4), "zero", source="paired", center=1.0, scale=2.0).double()
    x0, y = torch.randn(2, 16, 3, dtype=torch.float64)
    example: Any = task.example((x0, y), Draws(torch.Generator(), torch.device("cpu")))
    assert torch.allclose(example.noise, (y - 1) / 2, atol=1e-7)
    assert task.training_step((x0, y), 0)["loss"].isfinite()
    with pytest.raises(CompositionError, match="source"):
        task.training_step(x0, 0)


def test_from_a_paired_source_one_starts_from_states():
    task: Any = StochasticInterpolant(Linear(0.0), "zero", source="paired").double()
    task.state_sizes[0] = 2
    denoiser, sampler = task.denoiser(), FlowHeun(4)
    grid = sampler.grid(denoiser.path, Uniform())
    assert denoiser.gives == ("flow",)
    with pytest.raises(CompositionError, match="not from noise"):
        sample(denoiser, sampler, grid, range(2))
    start = torch.ones(2, 2, dtype=torch.float64)
    assert torch.equal(sample(denoiser, sampler, grid, range(2), start=start).x, start)


def test_only_a_blurred_model_prefers_to_sample_with_noise():
    assert StochasticInterpolant(Linear(), "zero").denoiser().sampler_name == "flow_heun"
    assert StochasticInterpolant(Linear(), "sqrt").denoiser().sampler_name == "si_sde"


@pytest.mark.parametrize(
    ("options", "named"),
    [({"gamma": "linear"}, "gamma"), ({"interpolant": "cosine"}, "interpolant"), ({"source": "data"}, "source")],
)
def test_options_that_cannot_be_are_refused(options, named):
    with pytest.raises(ConfigurationError, match=f"{named} has no choice"):
        StochasticInterpolant(Linear(), **options)
