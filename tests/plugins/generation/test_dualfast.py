"""DualFast: the sampler alone at c = 0, its formula, and why a gain over DDIM says nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightrail.errors import ConfigurationError
from lightrail.generation import Evaluator, GaussianMixture, Noise, State, sample
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.flow import FlowRK4
from lightrail_generation.time_grids.uniform import Uniform
from lightrail_generation.wrappers.dualfast import DualFast

START = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 2)))
MIXTURE = GaussianMixture()
UNIFORM = Uniform(stop=0.05, end="minimum")


@pytest.fixture(scope="module")
def exact():
    return MIXTURE.exact(START, 1.0, [0.05])[0]


def error(sampler, exact):
    grid = sampler.grid(MIXTURE.path, UNIFORM)
    return float((sample(MIXTURE, sampler, grid, range(64), start=START).x - exact).square().mean().sqrt())


@pytest.mark.parametrize("sampler", [DDIM(10), DDIM(10, eta=0.5), DPMSolverPP(10), FlowRK4(3)])
def test_without_c_it_is_the_sampler_alone_bit_for_bit(sampler):
    grid = sampler.grid(MIXTURE.path, Uniform())
    found = sample(MIXTURE, DualFast(sampler, c=0), grid, range(8)).x
    assert torch.equal(found, sample(MIXTURE, sampler, grid, range(8)).x)


@pytest.mark.parametrize(("c", "expected"), [(0.0, 0.108), (0.2, 0.093), (0.5, 0.073)])
def test_with_an_exact_score_it_still_gains_over_ddim(c, expected, exact):
    assert error(DualFast(DDIM(10), c), exact) == pytest.approx(expected, abs=5e-4)


def test_replacing_the_explicit_noise_alone_hurts_ddim(exact):
    assert error(DualFast(DDIM(10), 0.5, replaces="explicit"), exact) == pytest.approx(0.164, abs=5e-4)


def test_every_c_hurts_a_second_order_sampler(exact):
    base = DPMSolverPP(10, lower_order_final=False)
    errors = [error(DualFast(base, c), exact) for c in (0.0, 0.1, 0.2, 0.5)]
    assert errors == sorted(errors)
    assert errors[0] == pytest.approx(0.050, abs=1e-3)
    assert errors[3] == pytest.approx(0.078, abs=2e-3)


@pytest.mark.parametrize("replaces", ["all", "explicit"])
def test_a_step_is_the_formula(replaces):
    wrapped = DualFast(DDIM(8), 0.4, replaces)
    grid = wrapped.grid(MIXTURE.path, UNIFORM)
    x, first = START, MIXTURE.predict(START, grid[0]).noise
    state = State(START, Noise(0, range(64), (2,), torch.float64))
    for index in range(8):
        here, there = grid[index], grid[index + 1]
        prediction, share = MIXTURE.predict(x, here), 0.4 * (1 - index / 8)
        noise = (1 + share) * prediction.noise - share * first
        data = (x - here.sigma * noise) / here.alpha if replaces == "all" else prediction.data
        x = there.alpha * data + there.sigma * noise
        state = wrapped.step(state, Evaluator(MIXTURE), grid)
        assert torch.allclose(state.x, x, atol=1e-12)


def test_no_evaluation_is_added_and_the_data_are_reached():
    for sampler, count in ((DDIM(6), 6), (FlowRK4(3), 11)):
        for replaces in ("all", "explicit"):
            wrapped = DualFast(sampler, 0.5, replaces)
            grid = wrapped.grid(MIXTURE.path, Uniform())
            drawn = sample(MIXTURE, wrapped, grid, range(4))
            assert drawn.evaluations == wrapped.evaluations(grid) == count
            assert bool(drawn.x.isfinite().all())


def test_its_memory_follows_the_samples():
    wrapped, rows = DualFast(DPMSolverPP(8)), torch.tensor([2, 0])
    grid = wrapped.grid(MIXTURE.path, Uniform())
    evaluator, noise = Evaluator(MIXTURE), Noise(0, range(3), (2,), torch.float64)
    state = wrapped.start(noise.normal(-1), noise, grid)
    for _ in range(3):
        state = wrapped.step(state, evaluator, grid)
    chosen = wrapped.solve(state.select(rows), evaluator, grid).x
    assert torch.allclose(chosen, wrapped.solve(state, evaluator, grid).x[rows], atol=1e-12)


@pytest.mark.parametrize("options", [{"c": -0.1}, {"replaces": "data"}])
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        DualFast(DDIM(4), **options)
