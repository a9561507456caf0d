# pyright: reportArgumentType=false
"""DEIS: errors and orders, the integrals, what it shares with its relatives, and diffusers' scheduler of that name."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from lightrail.errors import ConfigurationError
from lightrail.generation import GaussianMixture, Noise, Prediction, State, VariancePreserving, sample
from lightrail.traits import traits_of
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.deis import DEIS, METHODS, multistep_weights
from lightrail_generation.samplers.edm import EDMHeun
from lightrail_generation.samplers.pndm import PLMS
from lightrail_generation.time_grids.explicit import Explicit
from lightrail_generation.time_grids.karras import Karras
from lightrail_generation.time_grids.quadratic import Quadratic
from lightrail_generation.time_grids.uniform import Uniform
from lightrail_generation.time_grids.uniform_lambda import UniformLambda

START = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 2)))
MIXTURE = GaussianMixture()
GRIDS = {"uniform_lambda": UniformLambda(stop=0.05, end="minimum"), "uniform": Uniform(stop=0.05, end="minimum")}
POLYNOMIAL = ["tab", "rhoab", "loglam"]


@functools.cache
def end():
    return MIXTURE.exact(START, 1.0, [0.05])[0]


def rms(x):
    return float(x.square().mean().sqrt())


def off(sampler, grid):
    levels = GRIDS[grid].grid(MIXTURE.path, sampler.steps)
    return rms(sample(MIXTURE, sampler, levels, range(64), start=START).x - end())


MULTISTEP = [
    ("tab", 1, 4.2e-2, 1.99, 3.2e-2, 1.98),
    ("tab", 2, 1.6e-2, 2.96, 2.2e-2, 2.98),
    ("tab", 3, 8.8e-3, 3.90, 2.5e-2, 4.07),
    ("rhoab", 1, 6.5e-2, 1.98, 4.8e-2, 1.98),
    ("rhoab", 2, 5.0e-2, 2.95, 3.1e-2, 2.97),
    ("rhoab", 3, 4.4e-2, 3.89, 2.7e-2, 3.90),
    ("loglam", 1, 3.0e-2, 1.99, 2.2e-2, None),
    ("loglam", 2, 5.3e-3, 2.99, 3.4e-2, None),
    ("loglam", 3, 5.0e-3, 4.04, 4.4e-2, None),
    ("ipndm", 3, 1.6e-2, 2.00, 2.6e-2, None),
]


@pytest.mark.parametrize(("method", "order", "error", "slope", "error_t", "slope_t"), MULTISTEP)
def test_error_and_order_of_multistep_methods(method, order, error, slope, error_t, slope_t):
    for grid, bar, rate in (("uniform_lambda", error, slope), ("uniform", error_t, slope_t)):
        assert off(DEIS(10, method, order), grid) == pytest.approx(bar, rel=0.03)
        if rate:
            slope = math.log2(off(DEIS(160, method, order), grid) / off(DEIS(320, method, order), grid))
            assert slope == pytest.approx(rate, abs=0.03)


@functools.cache
def exact_knots(steps):
    levels = GRIDS["uniform_lambda"].grid(MIXTURE.path, steps)
    return MIXTURE.exact(START[:16], 1.0, [levels[i].t for i in (1, 2, 3, -1)])


@pytest.mark.parametrize("method", POLYNOMIAL)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_order_once_the_history_is_right(method, order):
    def seeded(steps):
        exact = exact_knots(steps)

        def replaced(state):
            return dataclasses.replace(state, x=exact[state.index - 1]) if state.index <= 3 else state

        levels = GRIDS["uniform_lambda"].grid(MIXTURE.path, steps)
        sampler = DEIS(steps, method, order)
        return rms(sample(MIXTURE, sampler, levels, range(16), start=START[:16], after_step=replaced).x - exact[-1])

    assert order + 0.5 < math.log2(seeded(60) / seeded(120)) < order + 1.3


@pytest.mark.parametrize(
    ("method", "error", "slope", "error_t"),
    [
        ("rho_heun", 5.4e-2, 2.01, 3.6e-2),
        ("rho_midpoint", 4.7e-3, 1.99, 3.2e-3),
        ("rho_kutta3", 2.6e-3, 3.00, 1.2e-3),
        ("rho_rk4", 1.5e-3, 4.01, 5.3e-4),
    ],
)
def test_error_and_order_of_rules_of_runge_and_kutta(method, error, slope, error_t):
    assert off(DEIS(10, method), "uniform_lambda") == pytest.approx(error, rel=0.03)
    assert off(DEIS(10, method), "uniform") == pytest.approx(error_t, rel=0.03)
    few, many = (off(DEIS(n, method), "uniform_lambda") for n in (80, 160))
    assert math.log2(few / many) == pytest.approx(slope, abs=0.03)


def by_quadrature(path, there, knots, variable, j):
    """∫ L_j dρ by an adaptive rule, over log ρ where ρ is positive."""

    def place(level):
        return {"t": level.t, "rho": level.rho, "lam": level.lam}[variable]

    def basis(rho):
        at = place(path.level_at_lam(-math.log(rho)))
        rest = [place(knot) for i, knot in enumerate(knots) if i != j]
        return math.prod((at - each) / (place(knots[j]) - each) for each in rest)

    if there.is_clean:
        return quad(basis, knots[0].rho, 1e-12, epsrel=1e-9)[0]
    ends = math.log(knots[0].rho), math.log(there.rho)
    return quad(lambda u: basis(math.exp(u)) * math.exp(u), *ends, epsrel=1e-9)[0]


@pytest.mark.parametrize("path", ["linear", "edm", "flow"])
@pytest.mark.parametrize("variable", ["t", "rho", "lam"])
@pytest.mark.parametrize("times", [[0.9, 0.6, 0.5, 0.35, 0.2], [0.6, 0.3, 0.2, 0.1, 0.01], [0.4, 0.2, 0.1, 0.02, 0.0]])
def test_the_integrals(path, variable, times):
    path = GaussianMixture(path=path).path
    *knots, there = (path.level(t) for t in times)
    knots = tuple(reversed(knots))
    if there.is_clean and variable == "lam":
        assert multistep_weights(path, there, knots, variable) == (-knots[0].rho, 0, 0, 0)
        return
    weights = multistep_weights(path, there, knots, variable)
    assert sum(weights) == pytest.approx(there.rho - knots[0].rho, rel=1e-10)
    for j, weight in enumerate(weights):
        assert weight == pytest.approx(by_quadrature(path, there, knots, variable, j), rel=1e-7, abs=1e-9)


def test_a_left_sum_of_ten_thousand_terms_has_about_four_digits():
    path = MIXTURE.path
    knots, there = (path.level(0.5), path.level(0.6)), path.level(0.4)
    t = torch.linspace(0.5, 0.4, 10_001, dtype=torch.float64)
    basis = (0.6 - t[:-1]) / 0.1
    coarse = float((basis * (-path.lam(t)).exp().diff()).sum())
    assert 1e-6 < abs(coarse / multistep_weights(path, there, knots, "t")[0] - 1) < 1e-3


def end_of(sampler, form="noise", grid=GRIDS["uniform_lambda"], path="linear"):
    mixture = GaussianMixture(form=form, path=path)
    return sample(mixture, sampler, grid.grid(mixture.path, sampler.steps), range(64), start=START).x


@pytest.mark.parametrize("method", [*POLYNOMIAL, "ipndm"])
@pytest.mark.parametrize("form", ["data", "noise", "velocity"])
def test_looking_back_at_nothing_is_ddim(method, form):
    for grid in (*GRIDS.values(), UniformLambda()):
        ours, theirs = end_of(DEIS(8, method, 0), form, grid), end_of(DDIM(8), form, grid)
        assert float((ours - theirs).abs().max()) < 1e-10


@pytest.mark.parametrize("order", [1, 2, 3])
def test_ipndm_is_plms_and_on_equal_steps_in_rho_rhoab(order):
    assert torch.equal(end_of(DEIS(9, "ipndm", order)), end_of(PLMS(9, order=order + 1)))
    equal = Karras(stop=0.05, end="minimum", rho=1.0)
    for path in ("linear", "edm"):
        ours, theirs = (end_of(DEIS(9, method, order), grid=equal, path=path) for method in ("ipndm", "rhoab"))
        assert float((ours - theirs).abs().max() / ours.abs().max()) < 1e-10
        assert float((ours - end_of(DEIS(9, "loglam", order), grid=equal, path=path)).abs().max()) > 1e-3
    unequal = end_of(DEIS(9, "ipndm", order)) - end_of(DEIS(9, "rhoab", order))
    assert float(unequal.abs().max()) > 1e-2


def test_heun_is_edms_and_time_is_rho_where_the_path_says_so():
    for grid in (*GRIDS.values(), UniformLambda()):
        assert torch.equal(end_of(DEIS(7, "rho_heun"), grid=grid), end_of(EDMHeun(7), grid=grid))
    edm = UniformLambda(stop=0.05, end="minimum")
    both = [end_of(DEIS(9, method), grid=edm, path="edm") for method in ("tab", "rhoab")]
    assert float((both[0] - both[1]).abs().max()) < 1e-9


def scheduled(order, steps):
    diffusers = pytest.importorskip("diffusers")
    mixture = GaussianMixture(path="ddpm", form="noise")
    theirs = diffusers.DEISMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, solver_order=order, lower_order_final=False, timestep_spacing="trailing"
    )
    theirs.set_timesteps(steps)
    x = START
    for t in theirs.timesteps:
        x = theirs.step(mixture.predict(x, mixture.path.level(float(t))).noise, t, x).prev_sample
    grid = Explicit([*theirs.timesteps.tolist(), 0]).grid(mixture.path, steps)
    return mixture, grid, x


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [10, 20])
def test_diffusers_scheduler_is_loglam_and_none_of_the_papers(order, steps):
    mixture, grid, x = scheduled(order, steps)

    def apart(method):
        return float((sample(mixture, DEIS(steps, method, order - 1), grid, range(64), start=START).x - x).abs().max())

    assert apart("loglam") < 1e-5
    if order > 1:
        assert apart("tab") > 1e-2
        assert apart("rhoab") > 1e-2


class SquaredSine(VariancePreserving):
    """The path behind diffusers' IPNDMScheduler: σ = sin²(π t/2)."""

    def log_alpha(self, t):
        return torch.log1p(-((torch.pi * t / 2).sin() ** 4)) / 2

    def log_alpha_rate(self, t):
        angle = torch.pi * t / 2
        return -torch.pi * angle.sin() ** 3 * angle.cos() / (1 - angle.sin() ** 4)


def test_diffusers_ipndm():
    diffusers = pytest.importorskip("diffusers")
    steps, mixture = 12, GaussianMixture(path=SquaredSine(), form="velocity")
    times = [1 - i / steps for i in range(steps)] + [0.0]
    theirs = diffusers.IPNDMScheduler()
    theirs.set_timesteps(steps)
    theirs.set_begin_index(0)
    levels = [mixture.path.level(t) for t in times[1:]]
    x, states = START, []
    for i, t in enumerate(theirs.timesteps):
        # Its first level is pure noise, where the velocity is not read.
        velocity = torch.zeros_like(x) if i == 0 else mixture.predict(x, levels[i - 1]).velocity
        x = theirs.step(velocity, t, x).prev_sample
        states.append(x)
    # From its second level on, with what it saw at the first, the noise itself, in the history.
    grid = Explicit(times[1:]).grid(mixture.path, steps - 1)
    seen = Prediction(START, mixture.path.level(0.99), "noise", START)
    noise = Noise(0, range(64), (2,), torch.float64)
    state = State(states[0], noise, history=(seen,))
    ours = DEIS(steps - 1, "ipndm").solve(state, mixture.predict, grid).x
    assert float((ours - x).abs().max()) < 1e-5


def counted(method, end="zero", steps=6):
    class Spy(GaussianMixture):
        def output(self, x, t, condition):
            assert float(t.min()) > 0
            return super().output(x, t, condition)

    mixture, sampler = Spy(), DEIS(steps, method)
    grid = Quadratic(stop=0.05, end=end).grid(mixture.path, steps)
    drawn = sample(mixture, sampler, grid, range(3))
    assert bool(drawn.x.isfinite().all())
    assert drawn.evaluations == sampler.evaluations(grid)
    return drawn.evaluations


def test_evaluations_and_sigma_zero():
    counts = {method: [counted(method, end) for end in ("zero", "minimum", "denoise")] for method in METHODS}
    for method in (*POLYNOMIAL, "ipndm"):
        assert counts[method] == [6, 6, 7]
    assert counts["rho_heun"] == [11, 12, 13]
    assert counts["rho_midpoint"] == [12, 12, 13]
    assert counts["rho_kutta3"] == [16, 18, 19]
    assert counts["rho_rk4"] == [21, 24, 25]


@functools.cache
def run_to_the_data(path):
    mixture = GaussianMixture(path=path)
    levels = [mixture.path.level_at_lam(lam) for lam in np.linspace(-2.0, 4.0, 31)]
    grid = Explicit([*(level.t for level in levels), mixture.path.t_zero]).grid(mixture.path, 31)
    start = START[:16] * math.sqrt(levels[0].alpha ** 2 + levels[0].sigma ** 2)
    return mixture, grid, start, mixture.exact(start, grid[0].t, [grid[-1].t])[0]


@pytest.mark.parametrize("path", ["linear", "edm", "flow", "ddpm", "cosine"])
@pytest.mark.parametrize("method", METHODS)
def test_comes_close_to_the_exact_flow_on_every_path(path, method):
    mixture, grid, start, exact = run_to_the_data(path)
    ours = sample(mixture, DEIS(31, method), grid, range(16), start=start).x
    assert rms(ours - exact) < (2e-2 if method == "rhoab" else 1e-2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["data", "noise"])
def test_half_precision_single_samples_and_chosen_ones(method, form):
    mixture, sampler = GaussianMixture(dtype="bfloat16", form=form), DEIS(12, method)
    grid = sampler.grid(mixture.path, Quadratic())
    x = sample(mixture, sampler, grid, range(8)).x
    assert x.dtype == torch.bfloat16
    assert bool(x.isfinite().all())
    assert float(x.abs().max()) < 8
    double = GaussianMixture(form=form)
    many = sample(double, sampler, grid, range(8), seed=3).x
    assert torch.allclose(sample(double, sampler, grid, [5], seed=3).x[0], many[5], atol=1e-12)
    rows = torch.tensor([6, 1])
    chosen = sample(double, sampler, grid, range(8), seed=3, after_step=lambda s: s.select(rows) if s.index == 6 else s)
    assert torch.allclose(chosen.x, many[rows], atol=1e-12)


def test_what_it_says_of_itself_and_what_it_refuses():
    assert traits_of(DEIS).order == 4
    orders = {
        "tab": 3,
        "rhoab": 3,
        "loglam": 3,
        "ipndm": 2,
        "rho_heun": 2,
        "rho_midpoint": 2,
        "rho_kutta3": 3,
        "rho_rk4": 4,
    }
    assert {method: traits_of(DEIS, {"method": method, "order": 2}).order for method in METHODS} == orders
    assert traits_of(DEIS, {"method": "ipndm", "order": 0}).order == 1
    assert DEIS.grid_name == "quadratic"
    for options in ({"method": "rk45"}, {"order": 4}, {"order": -1}, {"order": 1.5}):
        with pytest.raises(ConfigurationError):
            DEIS(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DEIS()
