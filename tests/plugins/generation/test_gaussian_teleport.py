"""Gaussian teleportation: exact for Gaussian data, its known errors on a mixture, and the grid with the jump."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import Denoiser, Evaluator, GaussianMixture, LinearFlow, Noise, sample
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.flow import FlowHeun
from lightrail_generation.samplers.unipc import UniPC
from lightrail_generation.time_grids.explicit import Explicit
from lightrail_generation.time_grids.uniform import Uniform
from lightrail_generation.time_grids.uniform_lambda import UniformLambda
from lightrail_generation.wrappers.dualfast import DualFast
from lightrail_generation.wrappers.gaussian_teleport import GaussianTeleport, principal, teleport

START = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 2)))
MIXTURE = GaussianMixture()
UNIFORM = Uniform(stop=0.05, end="minimum")


@pytest.fixture(scope="module")
def exact():
    return MIXTURE.exact(START, 1.0, [0.05])[0]


def rms(x):
    return float(x.square().mean().sqrt())


def jumped(x, mixture, rho, begin):
    mean, covariance = mixture.moments()
    return teleport(x, mean, *principal(covariance, 256), mixture.path.level(begin), at(mixture, rho))


def at(mixture, rho):
    return mixture.path.level_at_lam(-math.log(rho))


@pytest.mark.parametrize("path", ["linear", "cosine", "edm", "flow"])
@pytest.mark.parametrize("rho", [30.0, 3.0, 0.5])
def test_on_gaussian_data_it_is_the_exact_flow(path, rho):
    mixture = GaussianMixture(means=[[0.7, -0.4]], weights=[1], variances=[0.3], path=path)
    begin = {"flow": 0.99, "edm": 80.0}.get(path, mixture.path.t_finite)
    x = START * mixture.path.level(begin).sigma
    expected = mixture.exact(x, begin, [at(mixture, rho).t])[0]
    assert rms(jumped(x, mixture, rho, begin) - expected) < 1e-10 * max(1, rms(expected))


def test_each_direction_goes_its_own_way():
    mean = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
    factor = torch.from_numpy(np.random.default_rng(1).standard_normal((3, 3)))
    covariance = factor @ factor.T
    path = MIXTURE.path
    here, there = path.level(0.9), at(MIXTURE, 0.4)

    def rate(rho, y):
        noisy = np.linalg.inv(covariance.numpy() + rho**2 * np.eye(3))
        return rho * noisy @ (y - mean.numpy())

    x = torch.from_numpy(np.random.default_rng(2).standard_normal((4, 3)))
    found = teleport(x, mean, *principal(covariance, 3), here, there)
    for row in range(4):
        ends = (here.rho, there.rho)
        y = solve_ivp(rate, ends, (x[row] / here.alpha).numpy(), method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
        assert np.allclose(found[row].numpy(), there.alpha * y, atol=1e-10)


def test_it_starts_from_pure_noise_too():
    mean, values, directions, rest = torch.zeros(2).double(), torch.ones(2).double() * 0.3, torch.eye(2).double(), 0.0
    path = LinearFlow()
    nearly = teleport(START, mean, values, directions, rest, path.level(1 - 1e-9), path.level(0.5))
    assert rms(teleport(START, mean, values, directions, rest, path.level(1.0), path.level(0.5)) - nearly) < 1e-8


def test_directions_that_are_left_out_share_the_mean_of_their_variances():
    covariance = torch.diag(torch.tensor([5.0, 0.2, 3.0, 0.4], dtype=torch.float64))
    values, directions, rest = principal(covariance, 2)
    assert values.tolist() == pytest.approx([3.0, 5.0])
    assert rest == pytest.approx(0.3)
    kept = directions @ torch.diag(values) @ directions.T
    assert torch.allclose(kept, torch.diag(torch.tensor([5.0, 0, 3, 0]).double()))
    x, mean = START[:, :1].expand(64, 4), torch.zeros(4).double()
    here, there = MIXTURE.path.level(1.0), at(MIXTURE, 1.0)
    found = teleport(x, mean, values, directions, rest, here, there)
    full = teleport(x, mean, *principal(covariance, 4), here, there)
    assert torch.allclose(found[:, [0, 2]], full[:, [0, 2]])
    ratio = math.sqrt((there.sigma**2 + there.alpha**2 * 0.3) / (here.sigma**2 + here.alpha**2 * 0.3))
    assert torch.allclose(found[:, [1, 3]], x[:, [1, 3]] * ratio)


@pytest.mark.parametrize(
    ("rho", "error"), [(25, 4e-6), (12, 3.6e-5), (6, 2.8e-4), (3.4, 1.44e-3), (2, 6.3e-3), (1.2, 2.25e-2)]
)
def test_a_jump_before_an_exact_rest_is_as_far_off_as_known(rho, error, exact):
    there = at(MIXTURE, rho)
    found = MIXTURE.exact(jumped(START, MIXTURE, rho, 1.0), there.t, [0.05])[0]
    assert rms(found - exact) == pytest.approx(error, rel=0.03)


def reached(sampler, rho, exact, times=UNIFORM):
    wrapped = GaussianTeleport(sampler, MIXTURE, rho=rho)
    grid = wrapped.grid(MIXTURE.path, times)
    drawn = sample(MIXTURE, wrapped, grid, range(64), start=START)
    assert drawn.evaluations == wrapped.evaluations(grid) == sampler.steps
    return rms(drawn.x - exact)


@pytest.mark.parametrize(
    ("kind", "steps", "plain", "with_jump"),
    [(DPMSolverPP, 10, 0.050, 0.020), (DPMSolverPP, 6, 0.14, 0.047), (UniPC, 10, 0.060, 0.019)],
)
def test_as_many_steps_after_a_jump_come_nearer(kind, steps, plain, with_jump, exact):
    without, found = reached(kind(steps), 1e9, exact), reached(kind(steps), 6.0, exact)
    assert without < plain
    assert found < with_jump
    assert found < 0.45 * without


def test_a_jump_to_where_sampling_starts_is_none():
    wrapped = GaussianTeleport(DDIM(8), MIXTURE, rho=MIXTURE.path.level(1.0).rho)
    grid = wrapped.grid(MIXTURE.path, Uniform())
    assert list(grid) == list(DDIM(8).grid(MIXTURE.path, Uniform()))
    found = sample(MIXTURE, wrapped, grid, range(8)).x
    assert torch.equal(found, sample(MIXTURE, DDIM(8), grid, range(8)).x)


@pytest.mark.parametrize("end", ["zero", "minimum", "denoise"])
def test_the_jump_is_the_first_step_of_the_grid(end):
    wrapped = GaussianTeleport(DDIM(8), MIXTURE, rho=6.0)
    grid = wrapped.grid(MIXTURE.path, UniformLambda(end=end))
    assert (grid.steps, grid[0].t, grid.denoises_last) == (9, 1.0, end == "denoise")
    assert grid[1].rho == pytest.approx(6.0)
    seen = []
    drawn = sample(MIXTURE, wrapped, grid, range(4), start=START[:4], after_step=lambda s: seen.append(s.index) or s)
    assert seen == list(range(1, 10))
    rest = sample(MIXTURE, DDIM(8), type(grid)(grid.path, grid.levels[1:], grid.denoises_last), range(4),
                  start=jumped(START[:4], MIXTURE, 6.0, 1.0)).x  # fmt: skip
    assert torch.allclose(drawn.x, rest, atol=1e-13)
    assert drawn.evaluations == wrapped.evaluations(grid) == 8 + (end == "denoise")


def test_step_by_step_it_does_what_solve_does():
    wrapped = GaussianTeleport(DPMSolverPP(8), MIXTURE, rho=6.0)
    grid = wrapped.grid(MIXTURE.path, Uniform())
    evaluator = Evaluator(MIXTURE)
    state = wrapped.start(START[:4], Noise(0, range(4), (2,), torch.float64), grid)
    whole = wrapped.solve(state, evaluator, grid)
    while state.index < grid.steps:
        state = wrapped.step(state, evaluator, grid)
    assert (state.index, whole.index) == (9, 9)
    assert torch.equal(state.x, whole.x)


def test_it_goes_around_what_starts_from_pure_noise_and_other_wrappers():
    mixture = GaussianMixture(path="flow")
    for sampler in (FlowHeun(6), DualFast(DDIM(6))):
        wrapped = GaussianTeleport(sampler, mixture, rho=5.0)
        grid = wrapped.grid(mixture.path, Uniform())
        assert bool(sample(mixture, wrapped, grid, range(4)).x.isfinite().all())


class Nameless(Denoiser):
    path, form, shape = MIXTURE.path, "data", (2,)

    def output(self, x, t, condition):
        return x


def test_a_model_that_does_not_know_its_data_is_refused():
    wrapped = GaussianTeleport(DDIM(4), Nameless())
    with pytest.raises(CompositionError, match="data"):
        wrapped.prepare(Nameless())


def test_a_grid_that_cannot_start_later_is_refused():
    wrapped = GaussianTeleport(DDIM(2), MIXTURE)
    with pytest.raises(CompositionError, match="start later"):
        wrapped.grid(MIXTURE.path, Explicit([1.0, 0.5, 0.1]))


@pytest.mark.parametrize("options", [{"rho": 0}, {"rank": 0}])
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        GaussianTeleport(DDIM(4), MIXTURE, **options)
