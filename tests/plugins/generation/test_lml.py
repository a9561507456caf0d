"""LML: the identity that it is as published, what rounding makes of it, and what it does otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import Evaluator, GaussianMixture, Noise, State, sample
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.time_grids.uniform import Uniform
from lightrail_generation.wrappers.lml import LML, damped

MIXTURE = GaussianMixture()


def updates(n=3072, correlation=0.94, size=1.0, count=16, seed=0):
    """An update of length ``size`` × √n and the one before, correlated as those of neighbouring steps are."""
    numbers = np.random.default_rng(seed)
    first, second = (torch.from_numpy(numbers.standard_normal((count, n))) for _ in range(2))
    return size * first, size * (correlation * first + (1 - correlation**2) ** 0.5 * second)


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double()).mean())


def deviation(found, n):
    return float(((found.double() - n.double()).norm(dim=1) / n.double().norm(dim=1)).mean())


def test_as_published_it_is_the_identity():
    n, _ = updates()
    assert deviation(damped(n, n, 100.0), n) < 1e-12
    assert deviation(damped(n, n, 1e-3), n) < 1e-8  # exact, but for rounding that a small damping amplifies


@pytest.mark.parametrize(("size", "low", "high"), [(3072, 0.003, 0.4), (16384, 0.01, 0.8)])
def test_in_single_precision_the_identity_drowns_in_rounding(size, low, high):
    n = updates(size)[0].float()
    found = damped(n, n, 1e-3)
    assert low < deviation(found, n) < high


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_nothing_is_left_of_the_direction(dtype):
    n = updates()[0].to(dtype)
    share = (n * n).sum(1, keepdim=True) / (1e-3 + n.square().sum(1, keepdim=True))
    left = n - share * n
    is_lost = (left == 0).all(1) | (torch.nn.functional.cosine_similarity(left.double(), n.double()) < 0.35)
    assert bool(is_lost.all())


def test_with_a_mean_the_update_is_turned_to_a_right_angle():
    n, before = updates()
    m = 0.2 * before + 0.8 * n
    assert cosine(damped(n, m, 1e-3), n) == pytest.approx(0.07, abs=0.01)
    # The damping means something in units of |n|²: here 297.
    n, before = updates(size=(297 / 3072) ** 0.5)
    assert cosine(damped(n, 0.2 * before + 0.8 * n, 1000.0), n) == pytest.approx(0.9998, abs=1e-4)


def test_the_length_of_the_update_is_kept():
    n, before = updates(64)
    found = damped(n.view(16, 4, 4, 4), before.view(16, 4, 4, 4), 5.0)
    assert found.shape == (16, 4, 4, 4)
    assert torch.allclose(found.flatten(1).norm(dim=1), n.norm(dim=1), rtol=1e-12)
    by_hand = n[3] - before[3] * (before[3] @ n[3]) / (5.0 + before[3] @ before[3])
    assert torch.allclose(found[3].flatten(), by_hand * n[3].norm() / by_hand.norm(), atol=1e-12)
    assert torch.equal(damped(torch.zeros(2, 3), torch.ones(2, 3), 1.0), torch.zeros(2, 3))


@pytest.mark.parametrize("sampler", [DDIM(10), DPMSolverPP(10)])
def test_without_kappa_or_with_all_damping_it_is_the_sampler_alone(sampler):
    grid = sampler.grid(MIXTURE.path, Uniform())
    expected = sample(MIXTURE, sampler, grid, range(8)).x
    assert torch.equal(sample(MIXTURE, LML(sampler), grid, range(8)).x, expected)
    heavy = sample(MIXTURE, LML(sampler, kappa=0.5, damping=1e14), grid, range(8)).x
    assert torch.allclose(heavy, expected, atol=1e-11)


@pytest.mark.parametrize("linear", ["data", "noise"])
def test_a_step_turns_the_part_that_is_not_linear(linear):
    sampler = DDIM(10)
    wrapped = LML(sampler, kappa=0.3, damping=1e-4, linear=linear)
    grid = sampler.grid(MIXTURE.path, Uniform())
    evaluator, noise = Evaluator(MIXTURE), Noise(0, range(4), (2,), torch.float64)
    state, means = State(noise.normal(-1), noise), []
    for index in range(3):
        here, there = grid[index], grid[index + 1]
        a = there.sigma / here.sigma if linear == "data" else there.alpha / here.alpha
        plain = sampler.step(state, evaluator, grid).x
        n = plain - a * state.x
        m = n if not means else 0.3 * means[-1] + 0.7 * n
        means.append(m)
        expected = plain if index == 0 else a * state.x + damped(n, m, 1e-4)
        state = wrapped.step(state, evaluator, grid)
        assert torch.allclose(state.x, expected, atol=1e-10)
    assert float((state.x - plain).norm()) > 1e-5


def test_single_precision_is_worked_out_in_double():
    sampler = LML(DDIM(10), kappa=0.2, damping=1.0)
    grid = sampler.grid(MIXTURE.path, Uniform())
    start = Noise(0, range(8), (2,)).normal(-1)
    single = GaussianMixture(dtype="float32")
    found = sample(single, sampler, grid, range(8), start=start).x
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), sample(MIXTURE, sampler, grid, range(8), start=start.double()).x, atol=1e-3)


def test_half_precision_is_refused():
    mixture = GaussianMixture(dtype="bfloat16")
    grid = DDIM(4).grid(mixture.path, Uniform())
    with pytest.raises(CompositionError, match="half precision"):
        sample(mixture, LML(DDIM(4)), grid, range(2))


def test_evaluations_and_resampling():
    sampler, rows = LML(DPMSolverPP(8), kappa=0.2, damping=1.0), torch.tensor([2, 0])
    grid = sampler.grid(MIXTURE.path, Uniform())
    drawn = sample(MIXTURE, sampler, grid, range(3))
    assert drawn.evaluations == sampler.evaluations(grid) == 8
    evaluator, noise = Evaluator(MIXTURE), Noise(0, range(3), (2,), torch.float64)
    state = sampler.start(noise.normal(-1), noise, grid)
    for _ in range(4):
        state = sampler.step(state, evaluator, grid)
    chosen = sampler.solve(state.select(rows), evaluator, grid).x
    assert torch.allclose(chosen, sampler.solve(state, evaluator, grid).x[rows], atol=1e-12)


@pytest.mark.parametrize("options", [{"kappa": 1.0}, {"kappa": -0.1}, {"damping": 0}, {"linear": "velocity"}])
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        LML(DDIM(4), **options)
