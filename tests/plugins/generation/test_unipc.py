# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""UniPC: predictor and corrector of each order, against the exact flow, the equations of the paper and diffusers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from lightrail.errors import ConfigurationError
from lightrail.generation import Evaluator, GaussianMixture, LinearFlow, Noise, sample
from lightrail.traits import traits_of
from lightrail_generation.samplers.exponential import phi
from lightrail_generation.samplers.unipc import UniPC, corrector_weights, predictor_weights
from lightrail_generation.time_grids.explicit import Explicit
from lightrail_generation.time_grids.uniform import Uniform
from lightrail_generation.time_grids.uniform_lambda import UniformLambda

MIXTURE = GaussianMixture()
TABLE = GaussianMixture(path="ddpm")
START = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 2)))
EXACT = MIXTURE.exact(START, 1.0, [0.05])[0]
PLAIN = {"lower_order_final": False}


def solved(sampler, times, mixture=MIXTURE, start=START, **options):
    return sample(mixture, sampler, sampler.grid(mixture.path, times), range(len(start)), start=start, **options)


def rms(difference):
    return float(difference.square().mean().sqrt())


def corrected_throughout(sampler, times):
    """The error of the run with its last state corrected too, for one more evaluation."""
    grid, predict = sampler.grid(MIXTURE.path, times), Evaluator(MIXTURE)
    state = sampler.solve(sampler.start(START, Noise(0, range(64), (2,)), grid), predict, grid)
    here, there, lams = grid[-2], grid[-1], [each.level.lam for each in state.history[: state.memory["predicted"]]]
    old = predictor_weights(here, there, lams, sampler.form, sampler.b)
    new = corrector_weights(here, there, lams, sampler.form, sampler.b)
    values = [each.get(sampler.form) for each in (predict(state.x, there), *state.history)]
    x = state.x + sum((n - o) * m for n, o, m in zip(new, [0.0, *old], values, strict=False))
    return rms(x - EXACT)


@pytest.mark.parametrize(
    ("order", "b", "times", "wanted", "slope"),
    [
        (2, "bh2", UniformLambda, 8.7e-3, 2.98),
        (2, "bh2", Uniform, 2.5e-2, 2.96),
        (3, "bh2", UniformLambda, 1.7e-2, 3.99),
        (3, "bh2", Uniform, 3.5e-2, 4.01),
        (2, "bh1", UniformLambda, 2.4e-2, 3.00),
        (2, "bh1", Uniform, 4.8e-2, 2.98),
        (2, "vary", UniformLambda, 1.2e-2, 2.99),
    ],
)
def test_error_and_order(order, b, times, wanted, slope):
    grid = times(1.0, 0.05, "minimum")
    errors = {n: corrected_throughout(UniPC(n, order, b=b, **PLAIN), grid) for n in (10, 160, 320)}
    assert errors[10] == pytest.approx(wanted, rel=0.05)
    assert math.log2(errors[160] / errors[320]) == pytest.approx(slope, abs=0.1)


@pytest.mark.parametrize(("b", "form"), [("bh2", "data"), ("bh1", "noise"), ("vary", "data")])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("corrector", [True, False])
def test_the_corrector_raises_the_order_by_one(order, b, form, corrector):
    times = UniformLambda(1.0, 0.05, "minimum")
    errors = []
    for n in (60, 120):
        sampler = UniPC(n, order, form, b, corrector=corrector, **PLAIN)
        grid = sampler.grid(MIXTURE.path, times)
        seeds = MIXTURE.exact(START[:8], 1.0, [level.t for level in grid.levels[1 : order + 1]])

        def seeded(state, seeds=seeds):
            # An exact state is not one to correct.
            if state.index > len(seeds):
                return state
            return dataclasses.replace(state, x=seeds[state.index - 1], memory={})

        errors.append(rms(solved(sampler, times, start=START[:8], after_step=seeded).x - EXACT[:8]))
    slope = math.log2(errors[0] / errors[1])
    assert order + corrector - 0.3 < slope < order + corrector + 0.8


def equations(nodes, z, shortcut, b):
    """ρ/r of each node from Σ ρ_j r_jⁱ⁻¹ = i! z φ_{i+1}(z)/B, times B/z: the weights of m_j − m_0 over the scale h."""
    share = 1.0 if b == "bh1" else phi(1, z)
    if shortcut:
        return [0.5 * share / nodes[0]]
    matrix = np.array([[r**i for r in nodes] for i in range(len(nodes))])
    right = np.array([math.factorial(i + 1) * phi(i + 2, z) / share for i in range(len(nodes))])
    return [share * rho / r for rho, r in zip(np.linalg.solve(matrix, right), nodes, strict=True)]


@pytest.mark.parametrize("form", ["data", "noise"])
@pytest.mark.parametrize("b", ["bh1", "bh2"])
@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_weights_solve_the_equations_of_the_paper(p, b, form):
    there, here, *older = (MIXTURE.path.level(t) for t in (0.3, 0.37, 0.5, 0.55, 0.7))
    levels = [here, *older][:p]
    h, lams = there.lam - here.lam, [level.lam for level in levels]
    z, scale = (-h, there.alpha * h) if form == "data" else (h, -there.sigma * h)
    past = [(lam - here.lam) / h for lam in lams[1:]]
    slopes = equations(past, z, p == 2, b) if past else []
    wanted = [scale * (phi(1, z) - sum(slopes)), *(scale * s for s in slopes)]
    assert predictor_weights(here, there, lams, form, b) == pytest.approx(wanted, rel=1e-9)
    ahead, *slopes = equations([1.0, *past], z, p == 1, b)
    wanted = [scale * ahead, scale * (phi(1, z) - ahead - sum(slopes)), *(scale * s for s in slopes)]
    assert corrector_weights(here, there, lams, form, b) == pytest.approx(wanted, rel=1e-9)


def published_vary(here, there, lams):
    """The corrector weights as the published code has them, in data form: it never uses the last of the equations."""
    h = there.lam - here.lam
    nodes = [*((lam - here.lam) / h for lam in lams[1:]), 1.0]
    k = len(nodes)
    columns = np.array([[r**i / math.factorial(i + 1) for i in range(k)] for r in nodes])
    inverse = np.linalg.inv(columns)
    values = np.zeros(k)  # of (m_j − m_0)/r_j
    for row in range(k - 1):
        values[:-1] += h * phi(row + 2, -h) * inverse[row][:-1]
    values[-1] += h * phi(k + 1, -h) * inverse[max(k - 2, 0)][-1]
    slopes = there.alpha * values / np.array(nodes)
    base = there.alpha * h * phi(1, -h)
    return [float(slopes[-1]), float(base - slopes.sum()), *(float(s) for s in slopes[:-1])]


@pytest.mark.parametrize("order", [2, 3])
def test_vary_needs_all_equations(order, monkeypatch):
    from lightrail_generation.samplers import unipc

    def slope():
        times = UniformLambda(1.0, 0.05, "minimum")
        errors = [rms(solved(UniPC(n, order, b="vary", **PLAIN), times).x - EXACT) for n in (80, 160)]
        return math.log2(errors[0] / errors[1])

    assert slope() == pytest.approx(order + 1, abs=0.15)
    exact = unipc.corrector_weights

    def faulty(here, there, lams, form, b):
        return published_vary(here, there, lams) if len(lams) == order else exact(here, there, lams, form, b)

    monkeypatch.setattr(unipc, "corrector_weights", faulty)
    assert slope() == pytest.approx(1.0, abs=0.15)


def test_the_corrector_as_it_is_written():
    """Algorithm 1 for p = 1: each corrected state starts from the corrected state before, not from the predicted."""
    times = Uniform(0.9, 0.1, "minimum")
    grid = times.grid(MIXTURE.path, 4)
    x = START
    data = MIXTURE.predict(x, grid[0]).data
    for index in range(4):
        here, there = grid[index], grid[index + 1]
        h = there.lam - here.lam
        base = there.sigma / here.sigma * x - there.alpha * math.expm1(-h) * data
        if index == 3:
            x = base
            break
        new = MIXTURE.predict(base, there).data
        x = base - there.alpha * math.expm1(-h) * 0.5 * (new - data)
        data = new
    found = solved(UniPC(4, order=1), times).x
    torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-10)


def with_diffusers(steps, **options):
    """What the scheduler makes of the exact prediction of the noise, and the times that it asked at."""
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", **options)
    scheduler.set_timesteps(steps)
    x = START.float()
    for t in scheduler.timesteps:
        predicted = TABLE.predict(x.double(), TABLE.path.level(float(t))).noise.float()
        x = scheduler.step(predicted, t, x).prev_sample
    return x.double(), [float(t) for t in scheduler.timesteps]


@pytest.mark.parametrize("disabled", [[], [0]])
@pytest.mark.parametrize("form", ["data", "noise"])
@pytest.mark.parametrize("b", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_diffusers(order, b, form, disabled):
    options = {"solver_order": order, "solver_type": b, "predict_x0": form == "data", "disable_corrector": disabled}
    wanted, times = with_diffusers(12, final_sigmas_type="sigma_min", **options)
    sampler = UniPC(12, order, form, b, corrector_start=len(disabled))
    # In single precision, order 4 on the noise amplifies the scheduler's rounding.
    atol = 5e-5 if order == 4 and form == "noise" else 1e-5
    torch.testing.assert_close(solved(sampler, Explicit([*times, 0.0]), TABLE).x, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_diffusers_to_the_data(order):
    wanted, times = with_diffusers(10, solver_order=order)
    found = solved(UniPC(10, order), Explicit([*times, -1.0]), TABLE).x
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("b", "form"), [("bh1", "data"), ("bh1", "noise"), ("bh2", "noise")])
def test_the_data_are_reached_where_the_scheduler_is_not_finite(b, form):
    wanted, times = with_diffusers(10, solver_type=b, predict_x0=form == "data")
    assert bool(wanted.isnan().any())
    found = solved(UniPC(10, form=form, b=b), Explicit([*times, -1.0]), TABLE).x
    assert rms(found - TABLE.exact(START, times[0], [-1.0])[0]) < 0.1


@pytest.mark.parametrize("form", ["data", "noise"])
@pytest.mark.parametrize("end", ["zero", "minimum", "denoise"])
def test_evaluations_are_one_a_step(form, end):
    sampler = UniPC(9, 3, form)
    found = solved(sampler, UniformLambda(end=end))
    assert found.evaluations == sampler.evaluations(sampler.grid(MIXTURE.path, UniformLambda(end=end)))
    assert found.evaluations == 9 + (end == "denoise")
    assert bool(found.x.isfinite().all())


def test_where_the_corrector_starts():
    times = UniformLambda(end="minimum")
    without = solved(UniPC(6, corrector=False), times).x
    torch.testing.assert_close(solved(UniPC(6, corrector_start=5), times).x, without, rtol=0, atol=0)
    assert float((solved(UniPC(6, corrector_start=4), times).x - without).abs().max()) > 1e-8
    assert float((solved(UniPC(6), times).x - solved(UniPC(6, corrector_start=1), times).x).abs().max()) > 1e-8


def test_the_last_orders():
    times = UniformLambda(1.0, 0.05, "minimum")
    wanted = []

    def watch(state):
        wanted.append(state.memory["predicted"])
        return state

    solved(UniPC(6, 3), times, after_step=watch)
    assert wanted == [1, 2, 3, 3, 2, 1]
    wanted.clear()
    solved(UniPC(6, 3, **PLAIN), times, after_step=watch)
    assert wanted == [1, 2, 3, 3, 3, 3]
    wanted.clear()
    solved(UniPC(6, 3, form="noise", **PLAIN), UniformLambda(), after_step=watch)
    assert wanted == [1, 2, 3, 3, 3, 1]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("b", ["bh1", "bh2", "vary"])
def test_from_pure_noise_where_alpha_is_zero(order, b):
    mixture = GaussianMixture(path="flow")
    grid = Uniform().grid(LinearFlow(), 10, finite=False)
    assert grid[0].alpha == 0
    x = sample(mixture, UniPC(10, order, b=b), grid, range(16), start=START[:16]).x
    assert rms(x - mixture.exact(START[:16], 1 - 1e-9, [0.0])[0]) < 0.3


def test_samples_can_change_places_midway():
    sampler, times = UniPC(8, 3), UniformLambda(end="minimum")
    order = torch.tensor([3, 0, 2, 1])
    straight = solved(sampler, times, start=START[:4])
    moved = solved(
        sampler, times, start=START[:4], after_step=lambda state: state.select(order) if state.index == 4 else state
    )
    torch.testing.assert_close(moved.x, straight.x[order], rtol=1e-12, atol=1e-12)


def test_a_sampler_serves_many_batches():
    sampler, times = UniPC(8, 3), UniformLambda()
    first = solved(sampler, times, start=START[:3]).x
    solved(sampler, times, start=START[3:9])
    torch.testing.assert_close(solved(sampler, times, start=START[:3]).x, first, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["data", "noise"])
@pytest.mark.parametrize("path", ["linear", "cosine", "edm", "flow", "ddpm"])
def test_half_precision_on_every_path(form, path):
    mixture = GaussianMixture(path=path, dtype="bfloat16", form="noise")
    sampler = UniPC(8, 3, form)
    x = sample(mixture, sampler, sampler.grid(mixture.path, UniformLambda()), range(4)).x
    assert x.dtype == torch.bfloat16
    assert bool(x.isfinite().all())


def test_traits_follow_the_options():
    assert traits_of(UniPC, {"order": 3, "lower_order_final": False}).order == 4
    assert traits_of(UniPC, {"order": 3, "corrector": False, "lower_order_final": False}).order == 3
    assert traits_of(UniPC, {"order": 3}).order == 2
    assert traits_of(UniPC, {"form": "noise"}).needs_predictions == ("noise",)
    assert traits_of(UniPC, {"steps": 5}) == UniPC.traits


@pytest.mark.parametrize(
    "options", [{"order": 0}, {"order": 5}, {"form": "flow"}, {"b": "bh3"}, {"corrector_start": -1}, {"steps": 0}]
)
def test_options_out_of_range(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        UniPC(**options)
