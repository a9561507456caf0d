# pyright: reportArgumentType=false
"""Ancestral sampling: the posterior of the paper, DDIM with eta 1, diffusers' scheduler, the moments of a Gaussian."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch

from lightrail.errors import ConfigurationError
from lightrail.generation import GaussianMixture, Grid, Noise, Prediction, State, sample
from lightrail.traits import traits_of
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.ddpm import DDPM, posterior
from lightrail_generation.time_grids.explicit import Explicit
from lightrail_generation.time_grids.uniform import Uniform
from lightrail_generation.time_grids.uniform_lambda import UniformLambda

KNOTS = [900, 800, 700, 600, 500, 400, 300, 200, 100, 0, -1]


def grid_of(mixture, times):
    return Explicit(times).grid(mixture.path, len(times) - 1)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_posterior_is_the_papers_between_the_kept_times(variance):
    path = GaussianMixture(path="ddpm").path
    here, there = path.level(700), path.level(600)
    before, after = there.alpha**2, here.alpha**2  # ᾱ
    beta = 1 - after / before
    c0 = math.sqrt(before) * beta / (1 - after)
    ct = math.sqrt(after / before) * (1 - before) / (1 - after)
    v = beta * (1 - before) / (1 - after) if variance == "small" else beta
    assert posterior(here, there, variance) == pytest.approx((c0, ct, math.sqrt(v)), rel=1e-12)
    # The β of one training step is not the β of a step over a hundred of them.
    one_step = 1 - after / path.level(699).alpha ** 2
    assert abs(one_step - beta) > 0.5


@pytest.mark.parametrize("path", ["linear", "cosine", "edm", "flow", "ddpm"])
def test_the_posterior_has_the_moments_of_bayes_rule(path):
    # x_s = (α_s/α_t) x_t + noise, and x_t = α_t x0 + σ_t z: precisions add.
    path = GaussianMixture(path=path).path
    middle = path.t_zero + 0.6 * (path.t_max - path.t_zero)
    here, there = path.level(middle), path.level(path.t_zero + 0.4 * (path.t_max - path.t_zero))
    a = here.alpha / there.alpha
    added = here.sigma**2 - a**2 * there.sigma**2
    precision = a**2 / added + 1 / there.sigma**2
    c0, ct, s = posterior(here, there)
    assert (c0, ct) == pytest.approx((there.alpha / there.sigma**2 / precision, a / added / precision), rel=1e-9)
    assert s**2 == pytest.approx(1 / precision, rel=1e-9)
    assert posterior(here, there, "large")[2] ** 2 == pytest.approx(added, rel=1e-9)


@pytest.mark.parametrize("path", ["linear", "edm", "flow"])
@pytest.mark.parametrize("form", ["data", "noise", "velocity"])
def test_equals_ddim_with_eta_1_on_the_same_noise(path, form):
    mixture = GaussianMixture(path=path, form=form)
    grid = UniformLambda().grid(mixture.path, 12)
    ours = sample(mixture, DDPM(12), grid, range(16), seed=3).x
    theirs = sample(mixture, DDIM(12, eta=1.0), grid, range(16), seed=3).x
    assert float((ours - theirs).abs().max()) < 1e-10
    assert float((ours - sample(mixture, DDIM(12), grid, range(16), seed=3).x).abs().max()) > 0.1


@pytest.mark.parametrize("variance", ["small", "large"])
def test_equals_diffusers_on_the_same_noise(variance, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.schedulers import scheduling_ddpm

    mixture = GaussianMixture(path="ddpm", form="noise")
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="linear", clip_sample=False, variance_type=f"fixed_{variance}", timestep_spacing="leading"
    )
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == KNOTS[:-1]
    noise = Noise(5, range(8), (2,), torch.float64)
    drawn = iter(range(10))
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: noise.normal(next(drawn)))
    x = start = noise.normal(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t in scheduler.timesteps:
            x = scheduler.step(mixture.predict(x, mixture.path.level(float(t))).noise, t, x).prev_sample
    ours = sample(mixture, DDPM(10, variance), grid_of(mixture, KNOTS), range(8), seed=5, start=start).x
    assert float((ours - x).abs().max()) < 1e-5
    other = DDPM(10, "large" if variance == "small" else "small")
    unlike = sample(mixture, other, grid_of(mixture, KNOTS), range(8), seed=5, start=start).x
    assert float((unlike - x).abs().max()) > 0.1


class Impulses:
    """In place of noise: row 0 sees none, row 1 starts at 1, row i + 2 sees a 1 at step i and nothing else."""

    def __init__(self, steps):
        self.steps = steps

    def start(self):
        return torch.eye(self.steps + 2, dtype=torch.float64)[:, 1:2].clone()

    def normal(self, step, draw=0):
        return torch.eye(self.steps + 2, dtype=torch.float64)[:, step + 2 : step + 3].clone()


def moments_off(steps, variance="small"):
    """By how much the mean and the variance of Gaussian data are off: all is linear, so they are worked out exactly."""
    mixture = GaussianMixture(means=[[0.5]], weights=[1.0], variances=[0.25])
    grid = UniformLambda(stop=0.05, end="minimum").grid(mixture.path, steps)
    noise, first, last = Impulses(steps), grid[0], grid[-1]
    x = noise.start() * math.sqrt(0.25 * first.alpha**2 + first.sigma**2) + 0.5 * first.alpha
    x = DDPM(steps, variance).solve(State(x, noise), mixture.predict, grid).x
    mean, spread = float(x[0]), float((x[1:] - x[0]).square().sum())
    return mean - 0.5 * last.alpha, spread - (0.25 * last.alpha**2 + last.sigma**2)


def test_moments_of_a_gaussian_converge_as_one_over_the_steps():
    errors = [moments_off(steps) for steps in (20, 40, 80, 160)]
    assert all(abs(mean) < 1e-12 for mean, _ in errors)
    off = [abs(error) for _, error in errors]
    assert all(1.8 < more / less < 2.4 for more, less in itertools.pairwise(off))
    # The posterior's own variance is too small by what the data do not know of themselves, the large one too large.
    assert errors[0][1] < -0.01 < 0.01 < moments_off(20, "large")[1]


@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_last_step_adds_no_noise_and_returns_the_data(variance):
    mixture = GaussianMixture()
    grid = UniformLambda().grid(mixture.path, 3)

    def predict(x, level, network_time=None):
        return mixture.predict(x, level)

    noise = Noise(0, range(4), (2,), torch.float64)
    before = State(noise.normal(-1), noise, index=2)
    after = DDPM(3, variance).step(before, predict, grid)
    assert torch.allclose(after.x, predict(before.x, grid[2]).data, atol=1e-14)


def test_noise_is_drawn_where_the_run_ends_with_some():
    mixture = GaussianMixture()
    grid = UniformLambda(stop=0.1, end="minimum").grid(mixture.path, 3)
    a, b = (sample(mixture, DDPM(3), grid, range(4), seed=seed, start=torch.ones(4, 2).double()).x for seed in (1, 2))
    assert not torch.equal(a, b)


def test_starts_where_no_data_are_left_if_the_network_gives_data():
    mixture = GaussianMixture(path="flow")
    x = sample(mixture, DDPM(5), grid_of(mixture, [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]), range(8)).x
    assert bool(x.isfinite().all())
    noisy = GaussianMixture(path="flow", form="noise")
    with pytest.raises(ConfigurationError, match="nothing of the data"):
        sample(noisy, DDPM(2), grid_of(noisy, [1.0, 0.5, 0.0]), range(2))


@pytest.mark.parametrize("form", ["data", "noise", "flow"])
def test_half_precision_stays_finite_and_in_its_type(form):
    mixture = GaussianMixture(dtype="bfloat16", form=form)
    x = sample(mixture, DDPM(20), Uniform().grid(mixture.path, 20), range(8)).x
    assert x.dtype == torch.bfloat16
    assert bool(x.isfinite().all())
    assert float(x.abs().max()) < 6


def test_a_sample_is_the_same_in_any_batch():
    mixture = GaussianMixture()
    grid = Uniform().grid(mixture.path, 10)
    many = sample(mixture, DDPM(10), grid, range(6), seed=2).x
    one = sample(mixture, DDPM(10), grid, [4], seed=2).x
    assert torch.allclose(many[4], one[0], atol=1e-12)


def test_evaluations_and_the_default_grid():
    mixture, sampler = GaussianMixture(path="ddpm"), DDPM(10)
    grid = sampler.grid(mixture.path, Uniform())
    assert [level.t for level in grid] == pytest.approx([*range(999, 0, -100), -1])
    assert sampler.grid_name == "uniform"
    assert sample(mixture, sampler, grid, range(2)).evaluations == sampler.evaluations(grid) == 10
    last = Uniform(stop=99, end="denoise").grid(mixture.path, 9)
    assert sample(mixture, DDPM(9), last, range(2)).evaluations == DDPM(9).evaluations(last) == 10


def test_sigma_zero_is_never_asked():
    mixture = GaussianMixture()
    seen = []

    class Spy:
        def __call__(self, x, level, *, network_time=None):
            seen.append(level.sigma)
            return Prediction(x, level, "data", torch.zeros_like(x))

    noise = Noise(0, range(2), (2,), torch.float64)
    grid = Uniform().grid(mixture.path, 5)
    assert isinstance(grid, Grid)
    assert bool(DDPM(5).solve(State(noise.normal(-1), noise), Spy(), grid).x.eq(0).all())
    assert min(seen) > 0
    assert len(seen) == 5


def test_what_it_says_of_itself_and_what_it_refuses():
    assert traits_of(DDPM).is_stochastic
    assert traits_of(DDPM).order is None
    with pytest.raises(ConfigurationError, match="variance"):
        DDPM(variance="learned")
    with pytest.raises(ConfigurationError, match="steps"):
        DDPM(steps=0)
