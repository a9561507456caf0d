# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""DPM-Solver++: multistep, single and stochastic, against the exact flow, other solvers and diffusers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from lightrail.errors import ConfigurationError
from lightrail.generation import Evaluator, GaussianMixture, Grid, LinearFlow, Noise, Prediction, sample
from lightrail.traits import traits_of
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP, final_order, multistep_weights, thresholded
from lightrail_generation.samplers.exponential import adams_weights
from lightrail_generation.samplers.unipc import UniPC
from lightrail_generation.time_grids.explicit import Explicit
from lightrail_generation.time_grids.uniform import Uniform
from lightrail_generation.time_grids.uniform_lambda import UniformLambda

MIXTURE = GaussianMixture()
TABLE = GaussianMixture(path="ddpm")
START = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 2)))
EXACT = MIXTURE.exact(START, 1.0, [0.05])[0]
SCHEDULE = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
PLAIN = {"lower_order_final": False}


def solved(sampler, times, mixture=MIXTURE, start=START, **options):
    return sample(mixture, sampler, sampler.grid(mixture.path, times), range(len(start)), start=start, **options)


def rms(difference):
    return float(difference.square().mean().sqrt())


def error(sampler, times=UniformLambda):
    return rms(solved(sampler, times(1.0, 0.05, "minimum")).x - EXACT)


def with_diffusers(steps, seed=None, **options):
    """What the scheduler makes of the exact prediction of the noise, and the times that it asked at."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(**SCHEDULE, **options)
    scheduler.set_timesteps(steps)
    noise, x = Noise(seed or 0, range(64), (2,), torch.float64), START.float()
    for index, t in enumerate(scheduler.timesteps):
        predicted = TABLE.predict(x.double(), TABLE.path.level(float(t))).noise.float()
        fresh = {} if seed is None else {"variance_noise": noise.normal(index).float()}
        x = scheduler.step(predicted, t, x, **fresh).prev_sample
    return x.double(), [*(float(t) for t in scheduler.timesteps), -1.0]


@pytest.mark.parametrize(
    ("options", "times", "wanted", "slope"),
    [
        ({"order": 2}, UniformLambda, 1.5e-2, 2.00),
        ({"order": 2}, Uniform, 5.0e-2, 2.02),
        ({"order": 2, "solver_type": "taylor"}, UniformLambda, 2.9e-2, 2.01),
        ({"order": 2, "solver_type": "taylor"}, Uniform, 7.1e-2, 2.02),
        ({"order": 3, "third_order": "compat"}, UniformLambda, 3.1e-2, 2.01),
        ({"order": 3, "third_order": "compat"}, Uniform, 6.6e-2, 1.85),
        ({"order": 3}, UniformLambda, 3.3e-2, 3.05),
        ({"order": 3}, Uniform, 7.1e-2, 3.06),
        ({"order": 2, "variant": "single"}, UniformLambda, 1.7e-2, 2.0),
        ({"order": 3, "variant": "single"}, UniformLambda, 6.8e-4, 3.0),
    ],
)
def test_error_and_order(options, times, wanted, slope):
    assert error(DPMSolverPP(10, **options, **PLAIN), times) == pytest.approx(wanted, rel=0.05)
    if options.get("variant") == "single":
        errors = [error(DPMSolverPP(n, **options, **PLAIN), times) for n in (60, 120)]
    else:
        errors = [error(DPMSolverPP(n, **options, **PLAIN), times) for n in (160, 320)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(slope, abs=0.1)


@pytest.mark.parametrize(("third_order", "slope"), [("exact", 3.0), ("compat", 2.0)])
def test_order_three_from_an_exact_history(third_order, slope):
    errors = []
    for n in (80, 160):
        sampler = DPMSolverPP(n, order=3, third_order=third_order, **PLAIN)
        times = UniformLambda(1.0, 0.05, "minimum")
        grid = sampler.grid(MIXTURE.path, times)
        seeds = MIXTURE.exact(START, 1.0, [level.t for level in grid.levels[1:3]])

        def seeded(state, seeds=seeds):
            return dataclasses.replace(state, x=seeds[state.index - 1]) if state.index <= 2 else state

        errors.append(rms(solved(sampler, times, after_step=seeded).x - EXACT))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(slope, abs=0.1)


def test_order_three_as_it_is_written_with_the_factor():
    older, old, here, there = (MIXTURE.path.level(t) for t in (0.8, 0.65, 0.5, 0.4))
    h, r0, r1 = there.lam - here.lam, here.lam - old.lam, old.lam - older.lam
    r0, r1 = r0 / h, r1 / h
    data = (0.3, -0.2, 1.1)
    a, b = (data[0] - data[1]) / r0, (data[1] - data[2]) / r1
    p2 = (math.exp(-h) - 1) / h + 1
    p3 = p2 / h - 0.5
    for third_order, factor in (("exact", 2), ("compat", 1)):
        d1, d2 = a + r0 / (r0 + r1) * (a - b), factor * (a - b) / (r0 + r1)
        wanted = there.alpha * (-(math.exp(-h) - 1) * data[0] + p2 * d1 - p3 * d2)
        weights = multistep_weights(here, there, [here.lam, old.lam, older.lam], third_order=third_order)
        assert sum(w * d for w, d in zip(weights, data, strict=True)) == pytest.approx(wanted, rel=1e-10)


def test_equivalences_of_the_orders():
    times = Uniform(1.0, 0.05, "minimum")
    midpoint, exact = solved(DPMSolverPP(12, **PLAIN), times).x, solved(DPMSolverPP(12, order=3, **PLAIN), times).x
    unip = {"corrector": False, "lower_order_final": False}
    torch.testing.assert_close(midpoint, solved(UniPC(12, order=2, **unip), times).x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(exact, solved(UniPC(12, order=3, **unip), times).x, rtol=1e-10, atol=1e-10)
    # bh1 differs by the warm-up of order 2 only, which is enough to see.
    other = solved(UniPC(12, order=3, b="bh1", **unip), times).x
    assert 1e-8 < float((exact - other).abs().max()) < 0.1


def test_taylor_is_the_exponential_adams_bashforth_method():
    older, here, there = (MIXTURE.path.level(t) for t in (0.6, 0.5, 0.4))
    lams = [here.lam, older.lam]
    exact = adams_weights(here, there, lams, "data")
    assert multistep_weights(here, there, lams, "taylor") == pytest.approx(exact, rel=1e-10)
    assert multistep_weights(here, there, lams, "midpoint") != pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize(("solver_type", "theirs"), [("midpoint", "midpoint"), ("taylor", "heun")])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("lower_order_final", [True, False])
def test_diffusers(order, solver_type, theirs, lower_order_final):
    wanted, times = with_diffusers(10, solver_order=order, solver_type=theirs, lower_order_final=lower_order_final)
    options = {"solver_type": solver_type, "third_order": "compat", "lower_order_final": lower_order_final}
    found = solved(DPMSolverPP(10, order, **options), Explicit(times), TABLE).x
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    if order == 3:
        mended = solved(DPMSolverPP(10, order, **{**options, "third_order": "exact"}), Explicit(times), TABLE).x
        assert float((mended - wanted).abs().max()) > 1e-3


def test_diffusers_to_the_smallest_level_it_knows():
    wanted, times = with_diffusers(12, solver_order=2, final_sigmas_type="sigma_min", lower_order_final=False)
    found = solved(DPMSolverPP(12, **PLAIN), Explicit([*times[:-1], 0.0]), TABLE).x
    torch.testing.assert_close(found, wanted, rtol=0, atol=3e-5)  # its table of σ is in single precision


@pytest.mark.parametrize(("solver_type", "theirs"), [("midpoint", "midpoint"), ("taylor", "heun")])
@pytest.mark.parametrize("order", [1, 2])
def test_diffusers_stochastic(order, solver_type, theirs):
    options = {"solver_order": order, "solver_type": theirs, "algorithm_type": "sde-dpmsolver++"}
    wanted, times = with_diffusers(10, seed=7, **options)
    sampler = DPMSolverPP(10, order, solver_type=solver_type, stochastic=True)
    torch.testing.assert_close(solved(sampler, Explicit(times), TABLE, seed=7).x, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("order", [1, 2])
def test_stochastic_runs_keep_the_distribution(order):
    mixture = GaussianMixture(means=[[0.5] * 64], weights=[1.0], variances=[0.3])
    sampler = DPMSolverPP({1: 160, 2: 50}[order], order=order, stochastic=True)
    x = sample(mixture, sampler, sampler.grid(mixture.path, UniformLambda()), range(64), seed=2).x
    assert float(x.mean()) == pytest.approx(0.5, abs=0.04)
    assert float(x.var()) == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("options", [{"order": n} for n in (1, 2, 3)] + [{"order": 2, "stochastic": True}])
def test_the_data_are_reached_from_any_start(options):
    sampler = DPMSolverPP(8, **options)
    grid = sampler.grid(MIXTURE.path, UniformLambda())
    state = sampler.start(START, Noise(0, range(64), (2,), torch.float64), grid)
    predict = Evaluator(MIXTURE)
    while state.index < grid.steps - 1:
        state = sampler.step(state, predict, grid)
    end = sampler.step(state, predict, grid)
    torch.testing.assert_close(end.x, MIXTURE.predict(state.x, grid[-2]).data, rtol=1e-12, atol=1e-12)
    assert predict.evaluations == sampler.evaluations(grid) == 8


@pytest.mark.parametrize("options", [{"order": 3}, {"order": 3, "variant": "single"}, {"stochastic": True}])
def test_from_pure_noise_where_alpha_is_zero(options):
    mixture = GaussianMixture(path="flow")
    grid = Uniform().grid(LinearFlow(), 8, finite=False)
    assert grid[0].alpha == 0
    start = sample(mixture, DPMSolverPP(8, **options), grid, range(16), start=START[:16]).x
    assert bool(start.isfinite().all())
    assert rms(start - mixture.exact(START[:16] * 1.0, 1 - 1e-9, [0.0])[0]) < (2 if "stochastic" in options else 0.3)


def test_the_last_orders_of_short_runs():
    path = MIXTURE.path
    short, long = (UniformLambda(end="minimum").grid(path, n) for n in (10, 15))
    assert [final_order(3, i, short, lowers=True) for i in (6, 7, 8, 9)] == [3, 3, 2, 1]
    assert [final_order(3, i, short, lowers=False) for i in (8, 9)] == [3, 3]
    assert final_order(3, 14, long, lowers=True) == 3
    to_data = UniformLambda().grid(path, 20)
    assert final_order(3, 19, to_data, lowers=False) == 1


@pytest.mark.parametrize("end", ["zero", "minimum", "denoise"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_single_counts_its_evaluations(order, end):
    sampler = DPMSolverPP(6, order, "single")
    found = solved(sampler, UniformLambda(end=end))
    assert found.evaluations == sampler.evaluations(sampler.grid(MIXTURE.path, UniformLambda(end=end)))
    assert bool(found.x.isfinite().all())


@pytest.mark.parametrize("end", ["zero", "minimum", "denoise"])
@pytest.mark.parametrize("order", [2, 3])
def test_fast_uses_the_evaluations_that_it_is_given(order, end):
    for steps in range(4, 12):
        sampler = DPMSolverPP(steps, order, "fast")
        grid = sampler.grid(MIXTURE.path, UniformLambda(end=end))
        found = sample(MIXTURE, sampler, grid, range(4), seed=1)
        assert found.evaluations == sampler.evaluations(grid) == steps


def test_fast_is_single_with_a_lower_order_at_the_end():
    grid = DPMSolverPP(5, 3, "fast").grid(MIXTURE.path, Explicit([0.9, 0.5, 0.2]))
    fast = sample(MIXTURE, DPMSolverPP(5, 3, "fast"), grid, range(4), start=START[:4]).x
    first = DPMSolverPP(1, 3, "single", **PLAIN)
    halfway = sample(MIXTURE, first, Grid(grid.path, grid.levels[:2]), range(4), start=START[:4]).x
    last = DPMSolverPP(1, 2, "single", **PLAIN)
    expected = sample(MIXTURE, last, Grid(grid.path, grid.levels[1:]), range(4), start=halfway).x
    torch.testing.assert_close(fast, expected, rtol=1e-12, atol=1e-12)


def test_single_of_order_two_as_the_paper_writes_it():
    path = MIXTURE.path
    s, t = path.level(0.6), path.level(0.4)
    h = t.lam - s.lam
    m = path.level_at_lam(s.lam + h / 2)
    d_s = MIXTURE.predict(START, s).data
    u = m.sigma / s.sigma * START - m.alpha * math.expm1(-h / 2) * d_s
    wanted = t.sigma / s.sigma * START - t.alpha * math.expm1(-h) * MIXTURE.predict(u, m).data
    found = solved(DPMSolverPP(1, 2, "single", **PLAIN), Explicit([0.6, 0.4])).x
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("quantile", [0.0001, 0.3, 0.995, 1.0])
def test_thresholding_is_per_sample(quantile):
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * torch.tensor([0.1, 1, 2, 3, 9]).view(
        -1, 1, 1, 1
    )
    prediction = Prediction(x, MIXTURE.path.level(0.5), "data", x)
    limit = x.flatten(1).abs().quantile(quantile, dim=1).clamp(min=1).view(-1, 1, 1, 1)
    found = thresholded(prediction, quantile).data
    torch.testing.assert_close(found, x.clamp(-limit, limit) / limit, rtol=1e-5, atol=1e-6)
    assert float(found.abs().max()) <= 1 + 1e-6
    torch.testing.assert_close(found[:1], x[:1].clamp(-1, 1))
    alone = thresholded(Prediction(x[3:4], MIXTURE.path.level(0.5), "data", x[3:4]), quantile).data
    torch.testing.assert_close(found[3:4], alone, rtol=0, atol=0)


@pytest.mark.parametrize("variant", ["multistep", "single"])
def test_thresholding_bounds_the_samples(variant):
    far = GaussianMixture(means=[[3.0, -3.0]], weights=[1.0], variances=[0.01])
    free, bounded = (
        solved(DPMSolverPP(8, variant=variant, dynamic_threshold=quantile), UniformLambda(), far).x
        for quantile in (None, 0.995)
    )
    assert float(free.abs().max()) > 2
    assert float(bounded.abs().max()) <= 1 + 1e-12


@pytest.mark.parametrize("options", [{"order": 3}, {"order": 2, "variant": "single"}])
def test_samples_can_change_places_midway(options):
    sampler, times = DPMSolverPP(8, **options), UniformLambda(end="minimum")
    order = torch.tensor([3, 0, 2, 1])
    straight = solved(sampler, times, start=START[:4])
    moved = solved(
        sampler, times, start=START[:4], after_step=lambda state: state.select(order) if state.index == 4 else state
    )
    torch.testing.assert_close(moved.x, straight.x[order], rtol=1e-12, atol=1e-12)


def test_samples_do_not_depend_on_their_batch():
    sampler = DPMSolverPP(8, stochastic=True, dynamic_threshold=0.9)
    grid = sampler.grid(MIXTURE.path, UniformLambda())
    everyone = sample(MIXTURE, sampler, grid, range(8), seed=1).x
    torch.testing.assert_close(
        sample(MIXTURE, sampler, grid, [5, 2], seed=1).x, everyone[[5, 2]], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    "options", [{"order": 3}, {"order": 3, "variant": "single"}, {"stochastic": True}, {"dynamic_threshold": 0.995}]
)
@pytest.mark.parametrize("path", ["linear", "cosine", "edm", "flow", "ddpm"])
def test_half_precision_on_every_path(options, path):
    mixture = GaussianMixture(path=path, dtype="bfloat16", form="noise")
    sampler = DPMSolverPP(8, **options)
    x = sample(mixture, sampler, sampler.grid(mixture.path, UniformLambda()), range(4)).x
    assert x.dtype == torch.bfloat16
    assert bool(x.isfinite().all())


def test_traits_follow_the_options():
    assert traits_of(DPMSolverPP, {"order": 3}).order == 3
    assert traits_of(DPMSolverPP, {"order": 3, "third_order": "compat"}).order == 2
    assert traits_of(DPMSolverPP, {"order": 3, "third_order": "compat", "variant": "single"}).order == 3
    noisy = traits_of(DPMSolverPP, {"stochastic": True})
    assert noisy.is_stochastic
    assert noisy.order is None


@pytest.mark.parametrize(
    "options",
    [
        {"order": 0},
        {"order": 4},
        {"order": 1.5},
        {"variant": "adaptive"},
        {"solver_type": "heun"},
        {"third_order": "published"},
        {"dynamic_threshold": 0.0},
        {"dynamic_threshold": 1.1},
        {"stochastic": True, "order": 3},
        {"stochastic": True, "variant": "single"},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        DPMSolverPP(**options)
