# pyright: reportArgumentType=false
"""Pseudo numerical methods: errors and orders, diffusers' scheduler, and the levels that are asked."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from lightrail.errors import ConfigurationError
from lightrail.generation import GaussianMixture, KarrasVE, Noise, Prediction, State, sample
from lightrail.traits import traits_of
from lightrail_generation.samplers.adams import adams_bashforth, along_rho, combined, of_differences, terms_of
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.edm import EDMHeun
from lightrail_generation.samplers.pndm import FPNDM, PLMS, SPNDM
from lightrail_generation.time_grids.explicit import Explicit
from lightrail_generation.time_grids.karras import Karras
from lightrail_generation.time_grids.uniform import Uniform
from lightrail_generation.time_grids.uniform_lambda import UniformLambda

START = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 2)))
MIXTURE = GaussianMixture()
GRIDS = {"uniform_lambda": UniformLambda(stop=0.05, end="minimum"), "uniform": Uniform(stop=0.05, end="minimum")}


@pytest.fixture(scope="module")
def exact():
    return MIXTURE.exact(START, 1.0, [0.05])[0]


def rms(x):
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize(
    ("kind", "grid", "error", "order"),
    [
        (SPNDM, "uniform_lambda", 2.1e-2, 2.00),
        (SPNDM, "uniform", 2.9e-2, 1.98),
        (FPNDM, "uniform_lambda", 1.6e-2, 2.00),
        (FPNDM, "uniform", 2.7e-2, 2.00),
        (PLMS, "uniform_lambda", 1.6e-2, 2.00),
        (PLMS, "uniform", 2.7e-2, 2.00),
    ],
)
def test_error_and_order(kind, grid, error, order, exact):
    def off(steps):
        levels = GRIDS[grid].grid(MIXTURE.path, steps)
        return rms(sample(MIXTURE, kind(steps), levels, range(64), start=START).x - exact)

    assert off(10) == pytest.approx(error, rel=0.03)
    assert math.log2(off(160) / off(320)) == pytest.approx(order, abs=0.02)


def on_equal_steps(sampler, steps, seeded=0):
    """The error at the end of a run on equal steps in ρ, its first levels replaced by exact ones."""
    mixture = GaussianMixture(path="edm")
    grid = Karras(start=1.0, stop=0.4, end="minimum", rho=1.0).grid(mixture.path, steps)
    start = math.sqrt(2) * START[:16]
    exact = mixture.exact(start, 1.0, [level.t for level in grid.levels[1:]])

    def replaced(state):
        return dataclasses.replace(state, x=exact[state.index - 1]) if state.index <= seeded else state

    return rms(sample(mixture, sampler(steps), grid, range(16), start=start, after_step=replaced).x - exact[-1])


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_the_order_on_equal_steps_once_the_history_is_right(order):
    few, many = (on_equal_steps(lambda n: PLMS(n, order=order), n, seeded=4) for n in (40, 80))
    assert math.log2(few / many) == pytest.approx(order, abs=0.06)


def test_the_first_steps_limit_the_order():
    few, many = (on_equal_steps(PLMS, n) for n in (40, 80))
    assert math.log2(few / many) == pytest.approx(2, abs=0.06)
    few, many = (on_equal_steps(lambda n: PLMS(n, warmup="heun"), n) for n in (40, 80))
    assert math.log2(few / many) == pytest.approx(3, abs=0.06)


@pytest.mark.parametrize("form", ["data", "noise", "velocity", "score"])
def test_the_first_step_of_plms_is_ddim_and_with_heun_is_heun(form):
    mixture = GaussianMixture(form=form)
    grid = UniformLambda(stop=0.2, end="minimum").grid(mixture.path, 1)
    for ours, theirs in ((PLMS(1), DDIM(1)), (PLMS(1, warmup="heun"), EDMHeun(1)), (SPNDM(1), EDMHeun(1))):
        a, b = (sample(mixture, sampler, grid, range(64), start=START).x for sampler in (ours, theirs))
        assert float((a - b).abs().max()) < 1e-10
    for order in (1, 3):
        long = UniformLambda().grid(mixture.path, 6)
        a = sample(mixture, PLMS(6, order=order), long, range(8)).x
        assert (float((a - sample(mixture, DDIM(6), long, range(8)).x).abs().max()) < 1e-10) is (order == 1)


def by_hand(mixture, x, grid, kind):
    """The published method on the noise, with the transfer φ(x, ε, s, t) of its equation on ᾱ."""

    def transfer(x, e, here, there):
        a, b = here.alpha**2, there.alpha**2
        inner = math.sqrt(a) * (math.sqrt((1 - b) * a) + math.sqrt((1 - a) * b))
        return math.sqrt(b / a) * x - (b - a) / inner * e

    def ask(x, level):
        return mixture.predict(x, level).noise

    kept = []
    for here, there in zip(grid.levels, grid.levels[1:], strict=False):
        e1 = ask(x, here)
        kept.insert(0, e1)
        if kind == "F" and len(kept) < 4:
            middle = mixture.path.level((here.t + there.t) / 2)
            e2 = ask(transfer(x, e1, here, middle), middle)
            e3 = ask(transfer(x, e2, here, middle), middle)
            e4 = ask(transfer(x, e3, here, there), there)
            e = (e1 + 2 * e2 + 2 * e3 + e4) / 6
        elif kind == "F":
            e = (55 * kept[0] - 59 * kept[1] + 37 * kept[2] - 9 * kept[3]) / 24
        elif len(kept) == 1:
            e = (e1 + ask(transfer(x, e1, here, there), there)) / 2
        else:
            e = (3 * kept[0] - kept[1]) / 2
        x = transfer(x, e, here, there)
    return x


@pytest.mark.parametrize(("kind", "sampler"), [("S", SPNDM), ("F", FPNDM)])
@pytest.mark.parametrize("form", ["data", "noise", "velocity"])
def test_equals_the_published_formulas(kind, sampler, form):
    mixture = GaussianMixture(path="ddpm", form=form)
    grid = Explicit([*range(959, 0, -80), -1]).grid(mixture.path, 12)
    ours = sample(mixture, sampler(12), grid, range(64), start=START).x
    assert float((ours - by_hand(mixture, START, grid, kind)).abs().max()) < 1e-10


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("steps", [10, 20, 50])
def test_equals_diffusers(skip, steps):
    diffusers = pytest.importorskip("diffusers")
    mixture = GaussianMixture(path="ddpm", form="noise", dtype="float32")
    theirs = diffusers.PNDMScheduler(
        beta_start=1e-4, beta_end=0.02, skip_prk_steps=skip, set_alpha_to_one=True, timestep_spacing="leading"
    )
    theirs.set_timesteps(steps)
    start = x = START[:16].float()
    for t in theirs.timesteps:
        x = theirs.step(mixture.predict(x, mixture.path.level(float(t))).noise, t, x).prev_sample
    times = [*range(1000 - 1000 // steps, -1, -1000 // steps), -1]
    grid = Explicit(times).grid(mixture.path, steps)
    for sampler in [PLMS(steps, warmup="heun")] if skip else [FPNDM(steps), FPNDM(steps, whole_times=True)]:
        drawn = sample(mixture, sampler, grid, range(16), start=start)
        assert float((drawn.x - x).abs().max()) < 1e-5
        assert drawn.evaluations == sampler.evaluations(grid) == len(theirs.timesteps) == steps + (1 if skip else 9)


def asked_times(sampler, times):
    seen = []

    class Spy(GaussianMixture):
        def output(self, x, t, condition):
            seen.append(float(t[0]))
            return super().output(x, t, condition)

    mixture = Spy(path="ddpm")
    sample(mixture, sampler, Explicit(times).grid(mixture.path, len(times) - 1), range(2))
    return seen


def test_the_middle_of_a_step_is_halfway_in_time_or_rounded_down():
    times = [875, 750, 625, 500, 375, 250]
    between = [875, 812.5, 812.5, 750, 750, 687.5, 687.5, 625, 625, 562.5, 562.5, 500, 500, 375]
    assert asked_times(FPNDM(5), times) == between
    assert asked_times(FPNDM(5, whole_times=True), times) == [math.floor(t) for t in between]
    # Grids round, and 398.9999999999999 is a whole time.
    slightly = asked_times(FPNDM(1, whole_times=True), [501, 398.9999999999999])
    assert slightly[1:3] == [450, 450]
    assert asked_times(FPNDM(1, whole_times=True), [400, 399])[1:3] == [399, 399]
    grid = Uniform(stop=0.1, end="minimum").grid(MIXTURE.path, 6)
    with pytest.raises(ConfigurationError, match="whole time"):
        sample(MIXTURE, FPNDM(6, whole_times=True), grid, range(2))


@pytest.mark.parametrize("kind", [SPNDM, FPNDM, PLMS])
def test_is_exact_where_all_predictions_are_equal(kind):
    path = GaussianMixture().path
    noise = Noise(1, range(3), (2,), torch.float64)
    data, e = torch.ones(3, 2).double(), noise.normal(0)
    grid = Uniform(stop=0.01, end="minimum").grid(path, 7)

    def predict(x, level, network_time=None):
        return Prediction(x, level, "noise", e)

    x = grid[0].alpha * data + grid[0].sigma * e
    x = kind(7).solve(State(x, noise), predict, grid).x
    assert float((x - grid[-1].alpha * data - grid[-1].sigma * e).abs().max()) < 1e-10


@pytest.mark.parametrize(
    ("sampler", "extra"),
    [
        (PLMS(8), 0),
        (PLMS(8, warmup="heun"), 1),
        (SPNDM(8), 1),
        (FPNDM(8), 9),
        (FPNDM(3), 6),
        (FPNDM(2), 3),
        (SPNDM(1), 0),
    ],
)
def test_evaluations_and_sigma_zero(sampler, extra):
    class Spy(GaussianMixture):
        def output(self, x, t, condition):
            assert float(t.min()) > 0
            return super().output(x, t, condition)

    mixture = Spy()
    grid = Uniform().grid(mixture.path, sampler.steps)
    assert grid[-1].is_clean
    drawn = sample(mixture, sampler, grid, range(3))
    assert drawn.evaluations == sampler.evaluations(grid) == sampler.steps + extra
    assert bool(drawn.x.isfinite().all())
    last = Uniform(stop=0.05, end="denoise").grid(mixture.path, sampler.steps)
    assert sample(mixture, sampler, last, range(3)).evaluations == sampler.evaluations(last)


@pytest.mark.parametrize("kind", [SPNDM, FPNDM, PLMS])
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


def test_the_history_is_no_longer_than_it_must_be():
    kept = []
    for sampler in (PLMS(7), PLMS(7, order=2), SPNDM(7), FPNDM(7)):
        sizes = []
        grid = Uniform().grid(MIXTURE.path, 7)
        sample(MIXTURE, sampler, grid, range(2), after_step=lambda s, sizes=sizes: sizes.append(len(s.history)) or s)
        kept.append(max(sizes))
    assert kept == [3, 1, 1, 3]


def test_weights_of_adams_and_bashforth():
    assert adams_bashforth(1) == (1,)
    assert adams_bashforth(2) == (1.5, -0.5)
    assert [12 * b for b in adams_bashforth(3)] == pytest.approx([23, -16, 5], abs=1e-12)
    assert [24 * b for b in adams_bashforth(4)] == pytest.approx([55, -59, 37, -9], abs=1e-12)
    assert [720 * b for b in adams_bashforth(5)] == pytest.approx([1901, -2774, 2616, -1274, 251], abs=1e-10)
    assert of_differences([0, 0, 1]) == (1, -2, 1)


@pytest.mark.parametrize("path", ["linear", "edm", "flow"])
@pytest.mark.parametrize("form", ["data", "noise", "velocity", "flow", "score"])
def test_folded_conversions_are_the_conversions(path, form):
    mixture = GaussianMixture(path=path, form=form)
    level = mixture.path.level(0.4)
    prediction = mixture.predict(START, level)
    for wanted in ("data", "noise"):
        terms = terms_of(prediction, wanted, 0.7)
        assert form == wanted or wanted not in prediction.known
        assert torch.allclose(combined(*terms), 0.7 * prediction.get(wanted), atol=1e-12)
    # Some guidance says both.
    changed = prediction.with_data(prediction.data + 1)
    changed.known["noise"] = prediction.noise
    assert torch.equal(combined(*terms_of(changed, "noise", 1.0)), prediction.noise)


def test_a_tensor_that_comes_up_twice_is_read_once(monkeypatch):
    from lightrail_generation.samplers import adams

    counts = []
    summed = adams.weighted_sum
    monkeypatch.setattr(adams, "weighted_sum", lambda *terms: counts.append(len(terms)) or summed(*terms))
    path = KarrasVE()
    there = path.level(1.0)
    prediction = Prediction(START, path.level(2.0), "data", START / 5)
    along_rho(START, prediction.level, there, (-1.0, prediction))
    assert counts == [2]


def test_what_they_say_of_themselves_and_what_they_refuse():
    assert [traits_of(PLMS, {"order": order}).order for order in (1, 2, 4)] == [1, 2, 2]
    assert [traits_of(kind).order for kind in (PLMS, SPNDM, FPNDM)] == [2, 2, 2]
    assert traits_of(SPNDM, {"steps": 5}).rule == SPNDM.traits.rule
    for options in ({"order": 0}, {"order": 6}, {"order": 2.5}, {"warmup": "euler"}, {"steps": 0}):
        with pytest.raises(ConfigurationError):
            PLMS(**options)
    grid = Explicit([1.0, 0.5, 0.0]).grid(GaussianMixture(path="flow").path, 2)
    with pytest.raises(ConfigurationError, match="nothing of the data"):
        sample(GaussianMixture(path="flow"), PLMS(2), grid, range(2))
