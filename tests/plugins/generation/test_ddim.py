# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""DDIM: the affine maps between levels, against the exact flow, other forms of it, and diffusers."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import Evaluator, GaussianMixture, Grid, LinearVP, Noise, State, invert, sample
from lightrail.traits import traits_of
from lightrail_generation.samplers.ddim import DDIM, transfer
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.unipc import UniPC
from lightrail_generation.time_grids.explicit import Explicit
from lightrail_generation.time_grids.uniform import Uniform
from lightrail_generation.time_grids.uniform_lambda import UniformLambda

MIXTURE = GaussianMixture()
TABLE = GaussianMixture(path="ddpm")
START = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 2)))
EXACT = MIXTURE.exact(START, 1.0, [0.05])[0]
SCHEDULE = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def solved(sampler, times, mixture=MIXTURE, start=START, seed=0):
    grid = sampler.grid(mixture.path, times)
    return sample(mixture, sampler, grid, range(len(start)), start=start, seed=seed)


def rms(difference):
    return float(difference.square().mean().sqrt())


def with_diffusers(scheduler, steps, seed=None):
    """What a scheduler makes of the exact prediction of the noise, and the times that it asked at."""
    scheduler.set_timesteps(steps)
    noise, x = Noise(seed or 0, range(64), (2,), torch.float64), START.float()
    for index, t in enumerate(scheduler.timesteps):
        predicted = TABLE.predict(x.double(), TABLE.path.level(float(t))).noise.float()
        fresh = {} if seed is None else {"eta": 0.6, "variance_noise": noise.normal(index).float()}
        x = scheduler.step(predicted, t, x, **fresh).prev_sample
    return x.double(), [float(t) for t in scheduler.timesteps]


@pytest.mark.parametrize(("times", "wanted"), [(UniformLambda, 1.2e-1), (Uniform, 1.1e-1)])
def test_error_and_order(times, wanted):
    errors = {n: rms(solved(DDIM(n), times(1.0, 0.05, "minimum")).x - EXACT) for n in (10, 160, 320)}
    assert errors[10] == pytest.approx(wanted, rel=0.05)
    assert math.log2(errors[160] / errors[320]) == pytest.approx(1.0, abs=0.03)


def test_it_is_euler_in_rho():
    times = UniformLambda(1.0, 0.05, "minimum")
    grid = DDIM(10).grid(MIXTURE.path, times)
    y = START / grid[0].alpha
    for here, there in itertools.pairwise(grid):
        y = y + (there.rho - here.rho) * MIXTURE.predict(here.alpha * y, here).noise
    torch.testing.assert_close(solved(DDIM(10), times).x, grid[-1].alpha * y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("end", ["minimum", "zero", "denoise"])
def test_first_order_exponential_solvers_are_the_same(end):
    times = UniformLambda(end=end)
    wanted = solved(DDIM(8), times).x
    for other in (DPMSolverPP(8, order=1), UniPC(8, order=1, corrector=False)):
        torch.testing.assert_close(solved(other, times).x, wanted, rtol=1e-10, atol=1e-10)
    noise = UniPC(8, order=1, corrector=False, form="noise")
    torch.testing.assert_close(solved(noise, times).x, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", ["linear", "cosine", "edm", "flow"])
def test_ancestral_sampling_is_the_first_order_stochastic_solver(path):
    mixture, times = GaussianMixture(path=path), UniformLambda()
    start = START * mixture.path.starting_scale(times.grid(mixture.path, 10)[0])
    ours = solved(DDIM(10, eta=1.0), times, mixture, start, seed=3).x
    theirs = solved(DPMSolverPP(10, order=1, stochastic=True), times, mixture, start, seed=3).x
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_the_noise_of_the_paper_on_a_variance_preserving_path():
    path, eta = LinearVP(), 0.4
    here, there = path.level(0.6), path.level(0.3)
    grid, noise = Grid(path, (here, there)), Noise(5, range(64), (2,), torch.float64)
    state = DDIM(1, eta).step(State(START, noise), Evaluator(MIXTURE), grid)
    prediction, z = MIXTURE.predict(START, here), noise.normal(0)
    s = eta * there.sigma / here.sigma * math.sqrt(1 - here.alpha**2 / there.alpha**2)
    wanted = there.alpha * prediction.data + math.sqrt(there.sigma**2 - s**2) * prediction.noise + s * z
    torch.testing.assert_close(state.x, wanted, rtol=1e-10, atol=1e-10)


def test_fresh_noise_keeps_the_distribution():
    mixture = GaussianMixture(means=[[0.5] * 64], weights=[1.0], variances=[0.3])
    sampler = DDIM(200, eta=1.0)
    x = sample(mixture, sampler, sampler.grid(mixture.path, UniformLambda()), range(64), seed=2).x
    assert float(x.mean()) == pytest.approx(0.5, abs=0.04)
    assert float(x.var()) == pytest.approx(0.3, abs=0.03)


def test_the_last_step_returns_the_predicted_data():
    grid = DDIM(4).grid(MIXTURE.path, UniformLambda())
    before = sample(MIXTURE, DDIM(4), Grid(grid.path, grid.levels[:-1]), range(64), start=START).x
    torch.testing.assert_close(solved(DDIM(4), UniformLambda()).x, MIXTURE.predict(before, grid[-2]).data)
    with_noise = solved(DDIM(4, eta=1.0), UniformLambda()).x
    assert bool(with_noise.isfinite().all())


@pytest.mark.parametrize(("spacing", "first"), [("leading", 900.0), ("trailing", 999.0)])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_diffusers(spacing, first, eta):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, timestep_spacing=spacing)
    theirs, times = with_diffusers(scheduler, 10, seed=4 if eta else None)
    assert times[0] == first
    ours = solved(DDIM(10, eta), Explicit([*times, -1.0]), TABLE, seed=4).x
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_step_goes_to_the_next_knot_and_not_by_a_fixed_stride():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, timestep_spacing="linspace")
    theirs, times = with_diffusers(scheduler, 10)
    ours = solved(DDIM(10), Explicit([*times, -1.0]), TABLE).x
    exact = TABLE.exact(START, times[0], [-1.0])[0]
    # With that spacing the scheduler goes to t − 1000/10, 11 short of where it is asked next.
    x = START
    for t in times:
        there = max(t - 100, -1.0)
        x = transfer(TABLE.predict(x, TABLE.path.level(t)), TABLE.path.level(there))
    torch.testing.assert_close(theirs, x, rtol=0, atol=1e-5)
    assert float((ours - theirs).abs().max()) > 0.05
    # At the first step ours is where it says, to second order of the step; the stride's is off by the missed gap.
    reached = TABLE.exact(START, times[0], [times[1]])[0]
    of_next, of_stride = (
        rms(transfer(TABLE.predict(START, TABLE.path.level(times[0])), TABLE.path.level(t)) - reached)
        for t in (times[1], times[0] - 100)
    )
    assert of_stride > 3 * of_next
    assert rms(ours - exact) < 0.2


def test_inversion_is_right_to_first_order():
    errors = []
    for n in (20, 40, 80):
        times = UniformLambda(0.9, 0.05, "minimum")
        sampler = DDIM(n)
        grid = sampler.grid(MIXTURE.path, times)
        start = MIXTURE.exact(START, 1.0, [0.9])[0]
        x = sample(MIXTURE, sampler, grid, range(64), start=start).x
        back = invert(MIXTURE, sampler, grid, x, range(64))
        assert back.evaluations == n
        errors.append(rms(back.x - start))
    assert errors[0] < 0.2
    assert errors[1] / errors[2] == pytest.approx(2.0, abs=0.3)


def test_inversion_from_the_data_themselves():
    grid = DDIM(200).grid(MIXTURE.path, UniformLambda(0.9))
    start = MIXTURE.exact(START, 1.0, [0.9])[0]
    x = MIXTURE.exact(start, 0.9, [0.0])[0]
    assert rms(invert(MIXTURE, DDIM(200), grid, x, range(64)).x - start) < 0.05


def test_with_fresh_noise_there_is_no_inverse():
    grid = DDIM(4, eta=0.5).grid(MIXTURE.path, UniformLambda())
    with pytest.raises(CompositionError, match="backwards"):
        invert(MIXTURE, DDIM(4, eta=0.5), grid, START, range(64))


def test_samples_do_not_depend_on_their_batch_nor_on_their_order():
    sampler = DDIM(6, eta=0.5)
    grid = sampler.grid(MIXTURE.path, UniformLambda())
    everyone = sample(MIXTURE, sampler, grid, range(8), seed=1)
    some = sample(MIXTURE, sampler, grid, [5, 2], seed=1)
    torch.testing.assert_close(some.x, everyone.x[[5, 2]], rtol=1e-12, atol=1e-12)
    assert everyone.evaluations == sampler.evaluations(grid) == 6


def test_half_precision_stays_finite():
    mixture = GaussianMixture(dtype="bfloat16", form="noise")
    for end in ("zero", "minimum", "denoise"):
        sampler = DDIM(10, eta=1.0)
        x = sample(mixture, sampler, sampler.grid(mixture.path, UniformLambda(end=end)), range(16)).x
        assert x.dtype == torch.bfloat16
        assert bool(x.isfinite().all())


def test_traits_follow_eta():
    assert traits_of(DDIM, {"steps": 5}).is_invertible
    noisy = traits_of(DDIM, {"eta": 1.0})
    assert noisy.is_stochastic
    assert not noisy.is_invertible
    assert noisy.fresh_noise == 1
    assert noisy.solves_reverse_diffusion
    assert not traits_of(DDIM, {"eta": 0.5}).solves_reverse_diffusion
    same = {"is_stochastic": False, "order": 1, "is_invertible": True}
    plain = dataclasses.replace(noisy, **same, fresh_noise=None, solves_reverse_diffusion=False)
    assert plain == DDIM.traits


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_eta_out_of_range(eta):
    with pytest.raises(ConfigurationError, match="eta"):
        DDIM(5, eta)
