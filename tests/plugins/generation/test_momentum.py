# pyright: reportArgumentType=false
"""Momentum: errors and orders, the members that coincide, and how far the regions of stability reach."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from lightrail.errors import ConfigurationError
from lightrail.generation import GaussianMixture, KarrasVE, Noise, Prediction, State, sample
from lightrail.traits import traits_of
from lightrail_generation.samplers.adams import adams_bashforth
from lightrail_generation.samplers.momentum import GHVB, HeavyBall, Nesterov, damping, generalized_weights
from lightrail_generation.samplers.pndm import PLMS
from lightrail_generation.time_grids.explicit import Explicit
from lightrail_generation.time_grids.uniform import Uniform
from lightrail_generation.time_grids.uniform_lambda import UniformLambda

START = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 2)))
MIXTURE = GaussianMixture()
GRIDS = {"uniform_lambda": UniformLambda(stop=0.05, end="minimum"), "uniform": Uniform(stop=0.05, end="minimum")}
KINDS = [HeavyBall, Nesterov, GHVB]


@pytest.fixture(scope="module")
def exact():
    return MIXTURE.exact(START, 1.0, [0.05])[0]


def rms(x):
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize(
    ("kind", "number", "error", "order"),
    [
        (HeavyBall, 1.8, 7.1e-2, 1.01),
        (HeavyBall, 3.8, 3.1e-2, 0.98),
        (Nesterov, 3.8, 8.4e-3, 0.93),
        (GHVB, 0.5, 2.9e-1, 1.00),
        (GHVB, 1.5, 5.0e-2, 1.99),
        (GHVB, 2.5, 6.7e-3, 1.99),
        (GHVB, 3.5, 1.6e-2, 2.01),
    ],
)
def test_error_and_order(kind, number, error, order, exact):
    def off(steps):
        levels = GRIDS["uniform_lambda"].grid(MIXTURE.path, steps)
        return rms(sample(MIXTURE, kind(steps, number), levels, range(64), start=START).x - exact)

    assert off(10) == pytest.approx(error, rel=0.02)
    assert math.log2(off(160) / off(320)) == pytest.approx(order, abs=0.02)


@pytest.mark.parametrize("number", [1.5, 2.5, 3.5])
def test_the_generalized_method_has_the_order_of_its_name_on_equal_steps(number):
    mixture = GaussianMixture(path="edm")
    n = math.ceil(number)

    def off(steps):
        levels = [mixture.path.level(t) for t in np.linspace(1.0, 0.4, steps + 1)]
        states = mixture.exact(math.sqrt(2) * START[:16], 1.0, [level.t for level in levels])
        sampler, grid = GHVB(steps, number), Explicit([level.t for level in levels]).grid(mixture.path, steps)
        noise = Noise(0, range(16), (2,), torch.float64)
        state = sampler.start(states[0], noise, grid)
        while state.index < steps:
            state = sampler.step(state, mixture.predict, grid)
            if state.index <= steps // 2:  # long enough for the mean to forget how it began
                state = dataclasses.replace(state, x=states[state.index])
        return rms(state.x - states[-1])

    assert math.log2(off(60) / off(120)) == pytest.approx(n, abs=0.15)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
@pytest.mark.parametrize("beta", [0.2, 0.5, 0.8, 1.0])
def test_the_weights_make_up_for_the_lag_of_the_mean(n, beta):
    # On f = kᵐ at step k, m < n, the mean lags behind; the weights give ∫ f from 0 to 1, once the start is forgotten.
    weights = generalized_weights(n, beta)
    assert sum(weights) == pytest.approx(1, abs=1e-12)
    ages = np.arange(600)
    for power in range(n):
        means = [(beta * (1 - beta) ** ages * (-(ages + j) * 1.0) ** power).sum() for j in range(n)]
        assert sum(w * v for w, v in zip(weights, means, strict=True)) == pytest.approx(1 / (power + 1), abs=1e-8)


def test_the_weights_are_the_papers():
    b = 0.3
    assert generalized_weights(1, b) == pytest.approx((1,))
    assert generalized_weights(2, b) == pytest.approx(((2 + b) / 2 / b, -(2 - b) / 2 / b))
    third = ((18 + 5 * b) / 12 / b, -(24 - 8 * b) / 12 / b, (6 - b) / 12 / b)
    assert generalized_weights(3, b) == pytest.approx(third)
    fourth = [(46 + 9 * b) / 24 / b, -(78 - 19 * b) / 24 / b, (42 - 5 * b) / 24 / b, -(10 - b) / 24 / b]
    assert generalized_weights(4, b) == pytest.approx(fourth)
    fifth = [1650 + 251 * b, -(3420 - 646 * b), 2880 - 264 * b, -(1380 - 106 * b), 270 - 19 * b]
    assert generalized_weights(5, b) == pytest.approx([c / 720 / b for c in fifth])
    for n in range(1, 6):
        assert generalized_weights(n, 1.0) == pytest.approx(adams_bashforth(n), abs=1e-12)


def end_of(sampler, form="noise", grid=GRIDS["uniform_lambda"]):
    mixture = GaussianMixture(form=form)
    return sample(mixture, sampler, grid.grid(mixture.path, sampler.steps), range(64), start=START).x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_whole_orders_are_plms(kind, number):
    for grid in GRIDS.values():
        theirs = end_of(PLMS(9, order=number), grid=grid)
        assert float((end_of(kind(9, number), grid=grid) - theirs).abs().max()) < 1e-10
        assert float((end_of(kind(9, number - 0.1), grid=grid) - theirs).abs().max()) > 1e-4


@pytest.mark.parametrize("beta", [0.2, 0.5, 0.8])
def test_of_one_prediction_both_are_the_same(beta):
    assert float((end_of(HeavyBall(9, beta)) - end_of(GHVB(9, beta))).abs().max()) < 1e-12
    assert float((end_of(Nesterov(9, beta)) - end_of(GHVB(9, beta))).abs().max()) > 1e-3


def by_hand(x, grid, kind, number):
    n, beta = math.ceil(number), number - math.ceil(number) + 1
    bashforth = {1: (1,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
    kept, v = [], None
    for here, there in zip(grid.levels, grid.levels[1:], strict=False):
        g = MIXTURE.predict(x, here).noise
        v = g if v is None else v
        if kind is GHVB:
            v = (1 - beta) * v + beta * g
            kept = [v, *kept][:n]
            weights = generalized_weights(len(kept), beta)
            move = sum(w * each for w, each in zip(weights, kept, strict=True))
        else:
            kept = [g, *kept][:n]
            p = sum(b * e for b, e in zip(bashforth[len(kept)], kept, strict=True))
            v = (1 - beta) * v + beta * p
            move = v if kind is HeavyBall else (1 - beta) * v + beta * p
        x = there.alpha * (x / here.alpha + (there.rho - here.rho) * move)
    return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [0.5, 1.8, 3.3])
@pytest.mark.parametrize("form", ["data", "noise", "velocity"])
def test_equals_the_published_recursion(kind, number, form):
    grid = GRIDS["uniform"].grid(MIXTURE.path, 9)
    ours = end_of(kind(9, number), form, GRIDS["uniform"])
    assert float((ours - by_hand(START, grid, kind, number)).abs().max()) < 1e-10


def growth(sampler, z, steps=900):
    """By how much y grows from the middle third of a run to the last, where ρ falls by 1 a step and dy/dρ = z y."""
    grid = Explicit(np.arange(steps + 1, 0, -1)).grid(KarrasVE(1.0, 1e6), steps)
    sizes = []

    def predict(x, level, network_time=None):
        return Prediction(x, level, "noise", x * z)

    def look(state):
        sizes.append(float(state.x.abs()))
        return state

    sampler.solve(State(torch.ones(1, 1).double(), Noise(0, [0], (1,), torch.float64)), predict, grid, look)
    third = len(sizes) // 3
    return max(sizes[-third:]) / max(sizes[third : 2 * third])


AB_LIMITS = {1: 2.0, 2: 1.0, 3: 6 / 11, 4: 0.3}
GHVB_LIMITS = [
    *((n - 1 + beta, 2 * (2 - beta) / beta) for n in (1,) for beta in (0.2, 0.5, 0.8)),
    *((n - 1 + beta, 2 - beta) for n in (2,) for beta in (0.2, 0.5, 0.8)),
    (2.8, 0.643),
    (2.5, 0.783),
    (3.8, 0.353),
    (3.5, 0.429),
    (3.2, 0.501),
]


def check_limit(kind, number, limit):
    assert growth(kind(900, number), 0.98 * limit) < 0.9
    assert growth(kind(900, number), 1.02 * limit) > 1.1


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("beta", [1.0, 0.8, 0.5, 0.2])
def test_damping_stretches_the_stable_interval(n, beta):
    check_limit(HeavyBall, n - 1 + beta, AB_LIMITS[n] * (2 - beta) / beta)


@pytest.mark.parametrize(("number", "limit"), GHVB_LIMITS)
def test_how_far_the_generalized_method_is_stable(number, limit):
    check_limit(GHVB, number, limit)


def test_a_stiff_equation_diverges_with_plms_and_not_with_momentum():
    assert growth(PLMS(900, order=4), 0.36) > 100
    assert growth(GHVB(900, 3.5), 0.36) < 1e-3
    assert growth(HeavyBall(900, 3.5), 0.36) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_evaluations_sigma_zero_and_memory(kind):
    class Spy(GaussianMixture):
        def output(self, x, t, condition):
            assert float(t.min()) > 0
            return super().output(x, t, condition)

    mixture, sampler = Spy(), kind(8)
    grid = Uniform().grid(mixture.path, 8)
    sizes = []
    drawn = sample(mixture, sampler, grid, range(3), after_step=lambda s: sizes.append((len(s.history), s.memory)) or s)
    assert drawn.evaluations == sampler.evaluations(grid) == 8
    assert bool(drawn.x.isfinite().all())
    assert max(size for size, _ in sizes) == (0 if kind is GHVB else 3)
    assert set(sizes[-1][1]) == {"momentum"}
    if kind is GHVB:
        assert len(sizes[-1][1]["momentum"]) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["data", "noise"])
def test_half_precision_single_samples_and_chosen_ones(kind, form):
    mixture = GaussianMixture(dtype="bfloat16", form=form)
    grid = Uniform().grid(mixture.path, 12)
    x = sample(mixture, kind(12), grid, range(8)).x
    assert x.dtype == torch.bfloat16
    assert bool(x.isfinite().all())
    assert float(x.abs().max()) < 6
    double = GaussianMixture(form=form)
    many = sample(double, kind(12), grid, range(8), seed=3).x
    assert torch.allclose(sample(double, kind(12), grid, [5], seed=3).x[0], many[5], atol=1e-12)
    rows = torch.tensor([6, 1])
    chosen = sample(
        double, kind(12), grid, range(8), seed=3, after_step=lambda s: s.select(rows) if s.index == 6 else s
    )
    assert torch.allclose(chosen.x, many[rows], atol=1e-12)


def test_what_they_say_of_themselves_and_what_they_refuse():
    assert damping(1.8) == (2, pytest.approx(0.8))
    assert damping(4) == (4, 1)
    assert [traits_of(GHVB, {"order": number}).order for number in (0.5, 1.5, 3.5)] == [1, 2, 2]
    assert [traits_of(HeavyBall, {"order": number}).order for number in (1, 1.8, 3)] == [1, 1, 2]
    assert traits_of(Nesterov).order == 1
    for kind in KINDS:
        for number in (0, -1, 5.5, "3"):
            with pytest.raises(ConfigurationError):
                kind(order=number)
