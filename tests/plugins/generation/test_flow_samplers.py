# pyright: reportArgumentType=false
"""Runge–Kutta solvers of a flow: their orders, their last step, DDIM and other libraries' Euler."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightrail.errors import ConfigurationError
from lightrail.generation import Evaluator, GaussianMixture, LinearFlow, sample
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.flow import (
    EULER,
    HEUN,
    MIDPOINT,
    RALSTON,
    RALSTON3,
    RK4,
    FlowEuler,
    FlowHeun,
    FlowMidpoint,
    FlowRK4,
    runge_kutta,
)
from lightrail_generation.time_grids.explicit import Explicit
from lightrail_generation.time_grids.uniform import Uniform

SOLVERS = {FlowEuler: 1, FlowHeun: 2, FlowMidpoint: 2, FlowRK4: 4}
BEGIN = 0.98  # a time with α > 0, from which the exact solution is known


def start(count=16):
    return torch.from_numpy(np.random.default_rng(0).standard_normal((count, 2)))


def error(solver, mixture, steps, begin=BEGIN, x=None, **times):
    sampler = solver(steps=steps)
    grid = sampler.grid(mixture.path, Uniform(start=begin, **times))
    x = start() if x is None else x
    found = sample(mixture, sampler, grid, range(len(x)), start=x).x
    return float((found - exact(mixture, begin, grid[-1].t)).square().mean().sqrt())


KNOWN = {}


def exact(mixture, begin, end):
    key = (type(mixture.path).__name__, begin, end)
    if key not in KNOWN:
        KNOWN[key] = mixture.exact(start(), begin, [end])[0]
    return KNOWN[key]


@pytest.mark.parametrize(
    ("rule", "order"), [(EULER, 1), (MIDPOINT, 2), (HEUN, 2), (RALSTON, 2), (RALSTON3, 3), (RK4, 4)]
)
def test_a_rule_meets_the_conditions_of_its_order_and_not_the_next(rule, order):
    b, c = np.array(rule.weights), np.array(rule.nodes)
    a = np.zeros((len(b), len(b)))
    for i, row in enumerate(rule.coupling, 1):
        a[i, : len(row)] = row
    ac = a @ c
    conditions = {
        1: [b.sum() - 1],
        2: [b @ c - 1 / 2],
        3: [b @ c**2 - 1 / 3, b @ ac - 1 / 6],
        4: [b @ c**3 - 1 / 4, b @ (c * ac) - 1 / 8, b @ (a @ c**2) - 1 / 12, b @ (a @ ac) - 1 / 24],
        5: [b @ c**4 - 1 / 5],
    }
    assert np.allclose(a.sum(1), c)
    assert all(abs(left) < 1e-14 for k in range(1, order + 1) for left in conditions[k])
    assert any(abs(left) > 1e-3 for left in conditions[order + 1])


@pytest.mark.parametrize(("solver", "order"), SOLVERS.items())
@pytest.mark.parametrize("times", [{"stop": 0.05, "end": "minimum"}, {}], ids=["to t=0.05", "to the data"])
def test_the_order_on_a_flow_is_the_declared_one(solver, order, times):
    mixture = GaussianMixture(path="flow")
    coarse, fine = (error(solver, mixture, steps, **times) for steps in (40, 160))
    assert order - 0.2 < math.log(coarse / fine, 4) < order + 0.35
    assert solver.traits.order == order


@pytest.mark.parametrize(("solver", "order"), SOLVERS.items())
def test_the_order_holds_to_the_data_of_a_path_whose_noise_rises_like_a_root(solver, order):
    mixture = GaussianMixture(path="linear")
    coarse, fine = (error(solver, mixture, steps, begin=1.0) for steps in (40, 160))
    assert math.log(coarse / fine, 4) > order - 0.2


def test_an_end_by_eulers_method_would_leave_rk4_at_order_two(monkeypatch):
    mixture = GaussianMixture(path="flow")
    right = error(FlowRK4, mixture, 160)
    monkeypatch.setattr(FlowRK4, "last_rule", EULER)
    coarse, fine = error(FlowRK4, mixture, 40), error(FlowRK4, mixture, 160)
    assert math.log(coarse / fine, 4) < 2.4
    assert fine > 100 * right


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("form", ["data", "flow"])
def test_the_network_is_never_asked_at_the_data_and_counted_exactly(solver, form):
    mixture, sampler = GaussianMixture(path="flow", form=form), solver(steps=3)
    for end in ("zero", "minimum", "denoise"):
        grid = sampler.grid(mixture.path, Uniform(end=end, stop=None if end == "zero" else 0.1))
        asked, evaluator = [], Evaluator(mixture)

        def predict(x, level, network_time=None, asked=asked, evaluator=evaluator):
            asked.append(level.t)
            return evaluator(x, level, network_time=network_time)

        mixture_noise = start(4) * grid[0].sigma
        state = sampler.start(mixture_noise, None, grid)
        found = sampler.solve(state, predict, grid).x
        assert bool(found.isfinite().all())
        assert min(asked) > 0
        assert evaluator.evaluations == sampler.evaluations(grid)
    assert grid[0].alpha == 0  # it starts from pure noise


def test_the_flow_at_the_data_cannot_be_had_from_a_data_prediction():
    mixture = GaussianMixture(path="flow")
    x, here, there = start(2), mixture.path.level(0.2), mixture.path.level(0.0)
    with pytest.raises(ZeroDivisionError):
        runge_kutta(x, here, there, mixture.path, mixture.predict, HEUN)


@pytest.mark.parametrize("path", ["flow", "edm"])
def test_euler_is_ddim_where_alpha_and_sigma_are_linear_in_time(path):
    mixture = GaussianMixture(path=path)
    grid = FlowEuler(steps=12).grid(mixture.path, Uniform(start=mixture.path.t_finite))
    found = sample(mixture, FlowEuler(steps=12), grid, range(16)).x
    expected = sample(mixture, DDIM(steps=12), grid, range(16)).x
    assert float((found - expected).abs().max()) < 1e-11


def test_one_step_of_euler_reaches_a_single_point():
    mixture = GaussianMixture(means=[[0.7, -0.2]], weights=[1], variances=[1e-12], path="flow")
    sampler = FlowEuler(steps=1)
    found = sample(mixture, sampler, sampler.grid(mixture.path, Uniform()), range(8)).x
    assert float((found - mixture.means).abs().max()) < 1e-12


def test_euler_agrees_with_diffusers():
    from diffusers.schedulers import FlowMatchEulerDiscreteScheduler

    mixture = GaussianMixture(path="flow", dtype="float32", form="flow")
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.45, 0.2, 0.05])
    x = start().float()
    theirs = x
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        flow = mixture.predict(theirs, mixture.path.level(float(sigma))).flow
        theirs = scheduler.step(flow, t, theirs, return_dict=False)[0]
    grid = FlowEuler(steps=5).grid(mixture.path, Explicit([1.0, 0.7, 0.45, 0.2, 0.05, 0.0]))
    ours = sample(mixture, FlowEuler(steps=5), grid, range(16), start=x).x
    assert float((ours - theirs).abs().max()) < 1e-5


def test_heun_agrees_with_diffusers_but_for_its_last_step_of_euler():
    from diffusers.schedulers import FlowMatchHeunDiscreteScheduler

    mixture = GaussianMixture(path="flow", dtype="float32", form="flow")
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(6)
    x = start().float()
    theirs, states = x, []
    for index, t in enumerate(scheduler.timesteps):
        level = mixture.path.level(float(scheduler.sigmas[index]))
        theirs = scheduler.step(mixture.predict(theirs, level).flow, t, theirs, return_dict=False)[0]
        states.append(theirs)
    knots = [float(s) for s in scheduler.sigmas.unique().flip(0)]
    grid = FlowHeun(steps=6).grid(mixture.path, Explicit(knots))
    assert grid[-1].is_clean
    ours = []
    sample(mixture, FlowHeun(steps=6), grid, range(16), start=x, after_step=lambda s: ours.append(s.x) or s)
    assert float((ours[4] - states[9]).abs().max()) < 1e-5
    euler = ours[4] + (knots[6] - knots[5]) * mixture.predict(ours[4], grid[5]).flow
    assert float((euler - states[10]).abs().max()) < 1e-5


@pytest.mark.parametrize("solver", SOLVERS)
def test_fewer_steps_than_one_are_refused(solver):
    with pytest.raises(ConfigurationError, match="steps"):
        solver(steps=0)


def test_the_times_between_are_the_paths_own():
    path, seen = LinearFlow(), []
    mixture = GaussianMixture(path="flow")

    def predict(x, level, network_time=None):
        seen.append((level.t, level.alpha))
        return mixture.predict(x, level)

    runge_kutta(start(2), path.level(0.8), path.level(0.4), path, predict, RK4)
    assert np.allclose(seen, [(0.8, 0.2), (0.6, 0.4), (0.6, 0.4), (0.4, 0.6)])
