# pyright: reportArgumentType=false, reportCallIssue=false
"""EDM's samplers: the published algorithm, DDIM, diffusers' schedulers, orders, and what churn does to a Gaussian."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from lightrail.errors import ConfigurationError
from lightrail.generation import GaussianMixture, Noise, State, sample
from lightrail.traits import traits_of
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.edm import EDMEuler, EDMHeun, churned
from lightrail_generation.time_grids.explicit import Explicit
from lightrail_generation.time_grids.karras import Karras
from lightrail_generation.time_grids.uniform import Uniform
from lightrail_generation.time_grids.uniform_lambda import UniformLambda

START = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 2)))
MIXTURE = GaussianMixture()
GRIDS = {"uniform_lambda": UniformLambda(stop=0.05, end="minimum"), "uniform": Uniform(stop=0.05, end="minimum")}


@pytest.fixture(scope="module")
def exact():
    return MIXTURE.exact(START, 1.0, [0.05])[0]


def rms(x):
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize(
    ("kind", "grid", "error", "order"),
    [
        (EDMEuler, "uniform_lambda", 1.2e-1, 1.00),
        (EDMEuler, "uniform", 1.1e-1, 1.00),
        (EDMHeun, "uniform_lambda", 5.4e-2, 2.01),
        (EDMHeun, "uniform", 3.6e-2, 2.01),
    ],
)
def test_error_and_order(kind, grid, error, order, exact):
    def off(steps):
        levels = GRIDS[grid].grid(MIXTURE.path, steps)
        return rms(sample(MIXTURE, kind(steps), levels, range(64), start=START).x - exact)

    assert off(10) == pytest.approx(error, rel=0.05)
    assert math.log2(off(160) / off(320)) == pytest.approx(order, abs=0.02)


@pytest.mark.parametrize("path", ["linear", "edm", "flow", "ddpm"])
@pytest.mark.parametrize("form", ["data", "noise", "velocity"])
@pytest.mark.parametrize("end", ["zero", "minimum"])
def test_euler_is_ddim(path, form, end):
    mixture = GaussianMixture(path=path, form=form)
    grid = UniformLambda(end=end).grid(mixture.path, 8)
    ours = sample(mixture, EDMEuler(8), grid, range(8)).x
    assert float((ours - sample(mixture, DDIM(8), grid, range(8)).x).abs().max()) < 1e-9


def published(mixture, x, sigmas, noise, s_churn, s_min, s_max, s_noise, second_order):
    """The paper's algorithm 2, in its own σ."""
    n = len(sigmas) - 1
    for i, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        gamma = min(s_churn / n, math.sqrt(2) - 1) if s_min <= sigma <= s_max else 0.0
        up = sigma * (1 + gamma)
        x = x + math.sqrt(up**2 - sigma**2) * s_noise * noise.normal(i)
        slope = (x - mixture.predict(x, mixture.path.level(up)).data) / up
        moved = x + (after - up) * slope
        if second_order and after > 0:
            again = (moved - mixture.predict(moved, mixture.path.level(after)).data) / after
            moved = x + (after - up) * (slope + again) / 2
        x = moved
    return x


@pytest.mark.parametrize("kind", [EDMEuler, EDMHeun])
@pytest.mark.parametrize("form", ["data", "noise"])
@pytest.mark.parametrize("churn", [(0, 0, math.inf, 1.0), (40, 0.05, 50, 1.003), (3, 0, math.inf, 1.0)])
def test_equals_the_published_algorithm(kind, form, churn):
    mixture = GaussianMixture(path="edm", form=form)
    sampler = kind(18, *churn)
    grid = Karras().grid(mixture.path, 18)
    drawn = sample(mixture, sampler, grid, range(6), seed=7)
    noise = Noise(7, range(6), (2,), torch.float64)
    r = 7
    sigmas = [(80 ** (1 / r) + i / 17 * (0.002 ** (1 / r) - 80 ** (1 / r))) ** r for i in range(18)] + [0.0]
    assert torch.equal(drawn.start, 80 * noise.normal(-1))
    theirs = published(mixture, drawn.start, sigmas, noise, *churn, kind is EDMHeun)
    assert float((drawn.x - theirs).abs().max()) < 1e-9


@pytest.mark.parametrize(
    ("kind", "scheduler"), [(EDMEuler, "EulerDiscreteScheduler"), (EDMHeun, "HeunDiscreteScheduler")]
)
@pytest.mark.parametrize("steps", [10, 20])
def test_equals_diffusers(kind, scheduler, steps):
    diffusers = pytest.importorskip("diffusers")
    mixture = GaussianMixture(path="ddpm", form="noise", dtype="float32")
    theirs = getattr(diffusers, scheduler)(beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    times = [999.0 - 1000 / steps * i for i in range(steps)]
    assert list(dict.fromkeys(theirs.timesteps.tolist())) == times
    grid = Explicit([*times, -1.0]).grid(mixture.path, steps)
    start = torch.from_numpy(np.random.default_rng(1).standard_normal((16, 2))).float()
    x = start / grid[0].alpha  # theirs is x/α
    for t in theirs.timesteps:
        scaled = theirs.scale_model_input(x, t)
        x = theirs.step(mixture.predict(scaled, mixture.path.level(float(t))).noise, t, x).prev_sample
    drawn = sample(mixture, kind(steps), grid, range(16), start=start)
    assert float((drawn.x - x).abs().max()) < 1e-5
    assert drawn.evaluations == len(theirs.timesteps)


def test_heun_reads_the_slope_where_eulers_step_leads():
    grid = UniformLambda(stop=0.3, end="minimum").grid(MIXTURE.path, 2)
    here, there = grid[0], grid[1]
    y = START / here.alpha
    e = MIXTURE.predict(START, here).noise
    step = there.rho - here.rho
    again = MIXTURE.predict(there.alpha * (y + step * e), there).noise
    noise = Noise(0, range(64), (2,), torch.float64)
    ours = EDMHeun(2).step(State(START, noise), lambda x, level, network_time=None: MIXTURE.predict(x, level), grid).x
    assert float((ours - there.alpha * (y + step * (e + again) / 2)).abs().max()) < 1e-11


class Impulses:
    """In place of noise: row 0 starts at 1, row i + 1 sees a 1 at step i and nothing else."""

    def __init__(self, steps):
        self.steps = steps

    def normal(self, step, draw=0):
        return torch.eye(self.steps + 1, dtype=torch.float64)[:, step + 1 : step + 2].clone()


def variance_off(kind, steps, **churn):
    """The largest relative error of the variance over the levels of a run on Gaussian data: all is linear, so exact."""
    mixture = GaussianMixture(means=[[0.0]], weights=[1.0], variances=[0.25], path="edm")
    grid = Karras(start=10.0, stop=0.1, end="minimum").grid(mixture.path, steps)
    off = []

    def look(state):
        off.append(float(state.x.square().sum()) / (0.25 + grid[state.index].rho ** 2) - 1)
        return state

    noise = Impulses(steps)
    x = noise.normal(-1) * math.sqrt(0.25 + grid[0].rho ** 2)
    kind(steps, **churn).solve(State(x, noise), lambda x, level: mixture.predict(x, level), grid, look)
    assert len(off) == steps
    return max(map(abs, off))


def test_churn_keeps_the_variance_of_a_gaussian_at_every_level():
    off = [variance_off(EDMHeun, steps, s_churn=8.0) for steps in (20, 40, 80, 160)]
    assert off[0] < 0.1
    assert all(more / less > 3 for more, less in itertools.pairwise(off))
    euler = [variance_off(EDMEuler, steps, s_churn=8.0) for steps in (80, 160)]
    assert euler[0] / euler[1] > 1.8
    # Noise that is a little too strong does not go away with more steps.
    assert variance_off(EDMHeun, 160, s_churn=8.0, s_noise=1.1) > 0.05


def test_churn_on_another_path_is_the_same_in_x_over_alpha():
    times = [0.9, 0.7, 0.5, 0.3, 0.1, 0.0]
    straight, preserving = GaussianMixture(path="edm"), GaussianMixture(path="linear")
    levels = [preserving.path.level(t) for t in times]
    options = {"s_churn": 1.0, "s_max": 10.0, "s_noise": 1.01}
    y = sample(
        straight,
        EDMHeun(5, **options),
        Explicit([level.rho for level in levels]).grid(straight.path, 5),
        range(8),
        seed=4,
        start=START[:8] / levels[0].alpha,
    ).x
    grid = Explicit(times).grid(preserving.path, 5)
    x = sample(preserving, EDMHeun(5, **options), grid, range(8), seed=4, start=START[:8]).x
    assert float((x - y).abs().max()) < 1e-9


def test_churn_stays_within_its_range_and_draws_nothing_outside():
    mixture = GaussianMixture(path="edm")
    grid = Karras().grid(mixture.path, 12)
    plain = sample(mixture, EDMHeun(12), grid, range(4), seed=1).x
    outside = EDMHeun(12, s_churn=30, s_min=200, s_max=300)
    assert torch.equal(sample(mixture, outside, grid, range(4), seed=1).x, plain)

    def refuse():
        raise AssertionError("noise was drawn")

    x = torch.ones(1, 2).double()
    assert churned(x, grid[3], 0.0, mixture.path, refuse) == (x, grid[3])
    inside = EDMHeun(12, s_churn=30, s_min=grid[5].rho, s_max=grid[5].rho)
    assert not torch.equal(sample(mixture, inside, grid, range(4), seed=1).x, plain)


def test_churn_is_no_more_than_the_root_of_two():
    mixture = GaussianMixture(path="edm")
    asked = []

    class Spy(GaussianMixture):
        def output(self, x, t, condition):
            asked.append(float(t[0]))
            return super().output(x, t, condition)

    grid = Karras().grid(mixture.path, 4)
    sample(Spy(path="edm"), EDMEuler(4, s_churn=1e6), grid, range(2))
    assert asked == pytest.approx([level.rho * math.sqrt(2) for level in grid.levels[:-1]], rel=1e-9)


def test_churn_stops_at_the_end_of_a_path():
    mixture = GaussianMixture(path="cosine")
    level = mixture.path.level(mixture.path.t_max)
    x = torch.ones(1, 2).double()
    there = churned(x, level, 0.4, mixture.path, lambda: x)[1]
    assert there.rho == pytest.approx(level.rho, rel=1e-6)


@pytest.mark.parametrize(("end", "euler", "heun"), [("zero", 6, 11), ("minimum", 6, 12), ("denoise", 7, 13)])
def test_evaluations(end, euler, heun):
    grid = Karras(end=end).grid(MIXTURE.path, 6)
    for kind, count in ((EDMEuler, euler), (EDMHeun, heun)):
        assert sample(MIXTURE, kind(6), grid, range(2)).evaluations == kind(6).evaluations(grid) == count


@pytest.mark.parametrize("kind", [EDMEuler, EDMHeun])
@pytest.mark.parametrize("form", ["data", "noise"])
def test_half_precision_and_single_samples(kind, form):
    mixture = GaussianMixture(path="edm", dtype="bfloat16", form=form)
    sampler = kind(18, s_churn=10)
    grid = sampler.grid(mixture.path, Karras())
    x = sample(mixture, sampler, grid, range(8)).x
    assert x.dtype == torch.bfloat16
    assert bool(x.isfinite().all())
    double = GaussianMixture(path="edm")
    many = sample(double, sampler, grid, range(8), seed=3).x
    assert torch.allclose(sample(double, sampler, grid, [5], seed=3).x[0], many[5], atol=1e-12)


def test_sigma_zero_is_reached_without_asking_there():
    class Spy(GaussianMixture):
        def output(self, x, t, condition):
            assert float(t.min()) > 0
            return super().output(x, t, condition)

    mixture = Spy(path="edm")
    for kind in (EDMEuler, EDMHeun):
        for churn in (0.0, 20.0):
            x = sample(mixture, kind(5, s_churn=churn), Karras().grid(mixture.path, 5), range(3)).x
            assert bool(x.isfinite().all())


def test_what_they_say_of_themselves_and_what_they_refuse():
    assert (traits_of(EDMEuler).order, traits_of(EDMHeun).order) == (1, 2)
    churning = traits_of(EDMHeun, {"s_churn": 5.0})
    assert churning.is_stochastic
    assert churning.order is None
    assert not traits_of(EDMHeun, {"s_churn": 0.0}).is_stochastic
    assert EDMHeun.grid_name == "karras"
    for options in ({"s_churn": -1.0}, {"s_noise": -0.1}, {"s_min": 2.0, "s_max": 1.0}, {"s_max": math.nan}):
        with pytest.raises(ConfigurationError):
            EDMHeun(**options)
    grid = Explicit([1.0, 0.5, 0.0]).grid(GaussianMixture(path="flow").path, 2)
    with pytest.raises(ConfigurationError, match="nothing of the data"):
        sample(GaussianMixture(path="flow"), EDMEuler(2), grid, range(2))
