# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""DPM-Solver: orders, exact counts of evaluations, and steps chosen by the error of each sample."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from lightrail.errors import ConfigurationError
from lightrail.generation import GaussianMixture, sample
from lightrail.traits import traits_of
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.dpm_solver import DPMSolver, levels_between, orders_within, stage_weights
from lightrail_generation.samplers.exponential import adams_weights
from lightrail_generation.time_grids.explicit import Explicit
from lightrail_generation.time_grids.uniform import Uniform
from lightrail_generation.time_grids.uniform_lambda import UniformLambda

MIXTURE = GaussianMixture()
START = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 2)))
EXACT = MIXTURE.exact(START, 1.0, [0.05])[0]


def solved(sampler, times, mixture=MIXTURE, start=START, **options):
    return sample(mixture, sampler, sampler.grid(mixture.path, times), range(len(start)), start=start, **options)


def error(sampler, times=UniformLambda):
    return float((solved(sampler, times(1.0, 0.05, "minimum")).x - EXACT).square().mean().sqrt())


@pytest.mark.parametrize(
    ("options", "times", "wanted", "slope"),
    [
        ({"order": 2}, UniformLambda, 2.5e-2, 2.0),
        ({"order": 2}, Uniform, 2.5e-2, 2.0),
        ({"order": 2, "solver_type": "taylor"}, UniformLambda, 9.0e-3, 2.0),
        ({"order": 3}, UniformLambda, 4.5e-4, 3.0),
        ({"order": 3}, Uniform, 2.0e-3, 3.0),
    ],
)
def test_error_and_order(options, times, wanted, slope):
    assert error(DPMSolver(10, **options), times) == pytest.approx(wanted, rel=0.05)
    measured = math.log2(error(DPMSolver(60, **options), times) / error(DPMSolver(120, **options), times))
    assert measured == pytest.approx(slope, abs=0.06)


def test_order_two_as_the_paper_writes_it():
    path = MIXTURE.path
    s, t = path.level(0.6), path.level(0.4)
    h = t.lam - s.lam
    m = path.level_at_lam(s.lam + h / 2)
    e_s = MIXTURE.predict(START, s).noise
    u = m.alpha / s.alpha * START - m.sigma * math.expm1(h / 2) * e_s
    wanted = t.alpha / s.alpha * START - t.sigma * math.expm1(h) * MIXTURE.predict(u, m).noise
    found = solved(DPMSolver(1, order=2), Explicit([0.6, 0.4])).x
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_order_three_as_the_paper_writes_it():
    path = MIXTURE.path
    s, t = path.level(0.6), path.level(0.4)
    h = t.lam - s.lam
    r1, r2 = 1 / 3, 2 / 3
    one, two = (path.level_at_lam(s.lam + r * h) for r in (r1, r2))
    e_s = MIXTURE.predict(START, s).noise
    u1 = one.alpha / s.alpha * START - one.sigma * math.expm1(r1 * h) * e_s
    d1 = MIXTURE.predict(u1, one).noise - e_s
    u2 = two.alpha / s.alpha * START - two.sigma * math.expm1(r2 * h) * e_s
    u2 = u2 - two.sigma * r2 / r1 * (math.expm1(r2 * h) / (r2 * h) - 1) * d1
    d2 = MIXTURE.predict(u2, two).noise - e_s
    wanted = t.alpha / s.alpha * START - t.sigma * math.expm1(h) * e_s - t.sigma / r2 * (math.expm1(h) / h - 1) * d2
    found = solved(DPMSolver(1, order=3), Explicit([0.6, 0.4])).x
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", ["data", "noise"])
def test_taylor_weights_integrate_a_straight_line_exactly(form):
    path = MIXTURE.path
    here, node, there = levels_between(path, path.level(0.5), path.level(0.3), 2)
    found = stage_weights(there, there.lam - here.lam, form, 0.5)
    assert found == pytest.approx(adams_weights(here, there, [here.lam, node.lam], form), rel=1e-10)
    half = stage_weights(there, there.lam - here.lam, form, 0.5, "midpoint")
    assert sum(half) == pytest.approx(sum(found), rel=1e-12)
    assert half != pytest.approx(found, rel=1e-2)


@pytest.mark.parametrize("end", ["zero", "minimum", "denoise"])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("n", range(2, 25))
def test_fast_asks_exactly_as_often_as_it_is_told(n, order, end):
    sampler = DPMSolver(n, order, "fast")
    grid = sampler.grid(MIXTURE.path, UniformLambda(end=end))
    assert sampler.evaluations(grid) == n
    assert max(sampler.orders(grid)) <= order
    assert solved(sampler, UniformLambda(end=end), start=START[:2]).evaluations == n


@pytest.mark.parametrize(
    ("n", "wanted"), [(5, [3, 2]), (6, [3, 2, 1]), (7, [3, 3, 1]), (9, [3, 3, 2, 1]), (15, [3, 3, 3, 3, 2, 1])]
)
def test_fast_orders_are_the_published_ones(n, wanted):
    sampler = DPMSolver(n, variant="fast")
    assert sampler.orders(sampler.grid(MIXTURE.path, UniformLambda(end="minimum"))) == wanted


def test_orders_end_at_one_where_the_data_are_reached():
    assert orders_within(8, 4, 3, ends_clean=True) == [3, 3, 1, 1]
    assert orders_within(8, 3, 3, ends_clean=False) == [3, 3, 2]
    # On a grid too short for them no step to the data has a higher order.
    assert orders_within(9, 3, 3, ends_clean=True) == [3, 3, 1]


@pytest.mark.parametrize("end", ["zero", "minimum", "denoise"])
@pytest.mark.parametrize("order", [2, 3])
def test_single_evaluations_and_finite_ends(order, end):
    sampler = DPMSolver(5, order)
    found = solved(sampler, UniformLambda(end=end))
    assert found.evaluations == sampler.evaluations(sampler.grid(MIXTURE.path, UniformLambda(end=end)))
    assert found.evaluations == {"zero": 4 * order + 1, "minimum": 5 * order, "denoise": 5 * order + 1}[end]
    assert bool(found.x.isfinite().all())


def test_the_step_to_the_data_returns_what_is_predicted():
    torch.testing.assert_close(
        solved(DPMSolver(1), Explicit([0.3, 0.0])).x, solved(DDIM(1), Explicit([0.3, 0.0])).x, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("order", [2, 3])
def test_adaptive_error_falls_with_the_tolerance(order):
    found = []
    for rtol in (1e-1, 1e-2, 1e-4):
        sampler = DPMSolver(1, order, "adaptive", rtol=rtol, atol=rtol)
        run = solved(sampler, UniformLambda(1.0, 0.05, "minimum"))
        found.append((float((run.x - EXACT).square().mean().sqrt()), run.evaluations))
    errors, evaluations = zip(*found, strict=True)
    assert errors[0] > 2 * errors[1] > 20 * errors[2]
    assert errors[2] < 1e-3
    assert evaluations[0] < evaluations[1] < evaluations[2]
    assert all(n % order == 0 for n in evaluations)
    grid = UniformLambda().grid(MIXTURE.path, 1)
    assert DPMSolver(1, order, "adaptive").evaluations(grid) is None


def test_adaptive_defaults_are_accurate_enough():
    run = solved(DPMSolver(1, 3, "adaptive"), UniformLambda(1.0, 0.05, "minimum"))
    of_samples = (run.x - EXACT).square().mean(1).sqrt()
    assert float(of_samples.median()) < 0.02
    assert float(of_samples.max()) < 0.5
    assert run.evaluations < 100


@pytest.mark.parametrize("end", ["zero", "minimum", "denoise"])
def test_adaptive_controls_each_sample_on_its_own(end):
    sampler = DPMSolver(2, 3, "adaptive", rtol=1e-2, atol=1e-3)
    # One far away needs shorter steps than the others; they must not see it.
    start = torch.cat((START[:5], 30 * START[5:6]))
    together = solved(sampler, UniformLambda(end=end), start=start)
    alone = solved(sampler, UniformLambda(end=end), start=start[:5])
    torch.testing.assert_close(together.x[:5], alone.x, rtol=1e-12, atol=1e-12)
    assert bool(together.x.isfinite().all())


@pytest.mark.parametrize("times", [UniformLambda, Uniform])
def test_adaptive_reaches_the_data(times):
    sampler = DPMSolver(1, 3, "adaptive", rtol=1e-3, atol=1e-3)
    grid = sampler.grid(MIXTURE.path, times())
    assert grid[-1].is_clean
    assert grid[-2].t == pytest.approx(MIXTURE.path.t_min)
    exact = MIXTURE.exact(START, 1.0, [0.0])[0]
    assert float((solved(sampler, times()).x - exact).square().mean().sqrt()) < 0.02


def test_adaptive_ends_where_the_network_says_nothing():
    mixture = GaussianMixture()
    mixture.output = lambda x, t, condition: torch.full_like(x, math.nan)
    run = solved(DPMSolver(1, 2, "adaptive"), UniformLambda(1.0, 0.05, "minimum"), mixture, START[:2])
    assert run.evaluations < 30


@pytest.mark.parametrize("variant", ["single", "fast", "adaptive"])
def test_samples_can_change_places_midway(variant):
    sampler, times = DPMSolver(6, 3, variant), UniformLambda(end="minimum")
    order = torch.tensor([3, 0, 2, 1])
    straight = solved(sampler, times, start=START[:4])
    moved = solved(
        sampler, times, start=START[:4], after_step=lambda state: state.select(order) if state.index == 2 else state
    )
    torch.testing.assert_close(moved.x, straight.x[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", ["single", "fast", "adaptive"])
@pytest.mark.parametrize("path", ["linear", "cosine", "edm", "flow", "ddpm"])
def test_half_precision_on_every_path(variant, path):
    mixture = GaussianMixture(path=path, dtype="bfloat16", form="noise")
    sampler = DPMSolver(6, 2, variant)
    x = sample(mixture, sampler, sampler.grid(mixture.path, UniformLambda()), range(4)).x
    assert x.dtype == torch.bfloat16
    assert bool(x.isfinite().all())


def test_traits_follow_the_options():
    assert traits_of(DPMSolver, {"order": 2}).order == 2
    assert traits_of(DPMSolver, {"variant": "adaptive"}).order is None
    assert dataclasses.replace(traits_of(DPMSolver, {"order": 2}), order=3) == DPMSolver.traits


@pytest.mark.parametrize(
    "options",
    [
        {"order": 1},
        {"order": 4},
        {"order": 2.5},
        {"variant": "multistep"},
        {"solver_type": "heun"},
        {"atol": 0},
        {"rtol": -1},
        {"safety": 1.5},
        {"first_step": 0},
        {"steps": 0},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        DPMSolver(**options)


def test_too_few_evaluations_or_times_that_do_not_fit():
    with pytest.raises(ConfigurationError, match="too few"):
        DPMSolver(1, 3, "fast").grid(MIXTURE.path, UniformLambda(end="denoise"))
    with pytest.raises(ConfigurationError, match="times"):
        DPMSolver(12, 3, "fast").grid(MIXTURE.path, Explicit([0.9, 0.5, 0.1]))
