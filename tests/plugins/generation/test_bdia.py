"""BDIA: its published form, its accuracy, its exact inverse and how rounding grows in it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import Evaluator, GaussianMixture, Noise, State, invert, sample
from lightrail.traits import traits_of
from lightrail_generation.samplers.bdia import BDIA, leap, leap_back
from lightrail_generation.samplers.ddim import DDIM, transfer
from lightrail_generation.time_grids.uniform import Uniform
from lightrail_generation.time_grids.uniform_lambda import UniformLambda

START = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 2)))
MIXTURE = GaussianMixture()
GRIDS = {"uniform_lambda": UniformLambda(stop=0.05, end="minimum"), "uniform": Uniform(stop=0.05, end="minimum")}


@pytest.fixture(scope="module")
def exact():
    return MIXTURE.exact(START, 1.0, [0.05])[0]


def solved(sampler, times, mixture=MIXTURE, x=START):
    """The last state of a run, with its memory."""
    grid = sampler.grid(mixture.path, times)
    noise = Noise(0, range(len(x)), (2,), mixture.dtype)
    return sampler.solve(sampler.start(x, noise, grid), Evaluator(mixture), grid), grid


def rms(x):
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize(
    ("gamma", "grid", "error", "order"),
    [
        (1.0, "uniform_lambda", 1.9e-2, 2.00),
        (0.5, "uniform_lambda", 4.0e-2, 1.00),
        (1.0, "uniform", 2.3e-2, 2.00),
        (0.5, "uniform", 4.9e-2, 1.02),
    ],
)
def test_error_and_order_are_the_known_ones(gamma, grid, error, order, exact):
    errors = [rms(solved(BDIA(n, gamma), GRIDS[grid])[0].x - exact) for n in (10, 160, 320)]
    assert errors[0] == pytest.approx(error, rel=0.05)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.03)
    assert traits_of(BDIA, {"gamma": gamma}).order == round(order)


@pytest.mark.parametrize("gamma", [0.3, 1.0])
def test_a_leap_is_the_published_sum_of_steps(gamma):
    before, here, there = (MIXTURE.path.level(t) for t in (0.8, 0.6, 0.3))
    prediction = MIXTURE.predict(START, here)
    previous = START.flip(0)
    backward, forward = transfer(prediction, before) - START, transfer(prediction, there) - START
    published = previous - (1 - gamma) * (previous - START) - gamma * backward + forward
    found = leap(prediction, previous, before, there, gamma)
    assert rms(found - published) < 1e-14
    assert rms(leap_back(prediction, found, before, there, gamma) - previous) < 1e-13


def test_the_first_step_is_ddims_and_without_gamma_all_are():
    first, grid = solved(BDIA(1, 1.0), Uniform(stop=0.9, end="minimum"))
    assert torch.equal(first.x, transfer(MIXTURE.predict(START, grid[0]), grid[1]))
    plain = solved(BDIA(20, 0.0), Uniform())[0].x
    assert rms(plain - solved(DDIM(20), Uniform())[0].x) < 1e-14


def round_trip(count, gamma, dtype, times=None):
    mixture = GaussianMixture(dtype=dtype)
    sampler = BDIA(count, gamma)
    state, grid = solved(sampler, times or UniformLambda(stop=0.05, end="minimum"), mixture, START.to(mixture.dtype))
    back = sampler.invert(state, Evaluator(mixture), grid)
    assert back.index == 0
    return rms(back.x.double() - START)


@pytest.mark.parametrize("times", [*GRIDS.values(), Uniform(), UniformLambda()])
@pytest.mark.parametrize("count", [1, 2, 20, 50])
def test_from_the_last_two_states_it_comes_back_exactly(times, count):
    assert round_trip(count, 1.0, "float64", times) < 1e-12


def test_rounding_grows_like_the_powers_of_one_over_gamma():
    assert round_trip(20, 1.0, "float32") < 1e-6
    assert 5e-3 < round_trip(20, 0.5, "float32") < 5e-1
    assert 1e6 < round_trip(50, 0.5, "float32") < 1e9
    few, many = round_trip(12, 0.5, "float64"), round_trip(32, 0.5, "float64")
    assert 2**17 < many / few < 2**23


def test_one_state_is_inverted_to_first_order():
    errors = []
    for count in (20, 80):
        sampler = BDIA(count)
        state, grid = solved(sampler, UniformLambda(stop=0.05, end="minimum"))
        found = invert(MIXTURE, sampler, grid, state.x, range(64))
        assert found.evaluations == count
        errors.append(rms(found.x - START))
    assert errors[1] < 0.5 * errors[0] < 0.2


@pytest.mark.parametrize("times", [UniformLambda(stop=0.05, end="minimum"), Uniform()])
def test_from_the_noise_found_for_an_image_it_comes_back_to_the_image(times):
    sampler = BDIA(20)
    image = torch.from_numpy(np.random.default_rng(1).standard_normal((8, 2)))
    grid = sampler.grid(MIXTURE.path, times)
    noise = Noise(0, range(8), (2,), torch.float64)
    evaluator = Evaluator(MIXTURE)
    start = sampler.invert(State(image, noise, index=20), evaluator, grid)
    again = sampler.solve(start, evaluator, grid)
    assert rms(again.x - image) < 1e-11
    forgotten = sampler.solve(State(start.x, noise), evaluator, grid)
    assert rms(forgotten.x - image) > 1e-4


def test_the_data_are_reached_without_asking_there():
    sampler = BDIA(8)
    grid = sampler.grid(MIXTURE.path, Uniform())
    drawn = sample(MIXTURE, sampler, grid, range(4))
    assert grid[-1].is_clean
    assert bool(drawn.x.isfinite().all())
    assert drawn.evaluations == sampler.evaluations(grid) == 8


def test_its_memory_follows_the_samples():
    sampler, rows = BDIA(6), torch.tensor([3, 0])
    grid = sampler.grid(MIXTURE.path, Uniform())
    evaluator = Evaluator(MIXTURE)
    state = State(START[:4], Noise(0, range(4), (2,), torch.float64))
    for _ in range(3):
        state = sampler.step(state, evaluator, grid)
    chosen = sampler.solve(state.select(rows), evaluator, grid).x
    assert torch.allclose(chosen, sampler.solve(state, evaluator, grid).x[rows], atol=1e-13)


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_with_a_smaller_gamma_one_state_is_not_enough(gamma):
    sampler = BDIA(5, gamma)
    grid = sampler.grid(MIXTURE.path, Uniform())
    assert not traits_of(BDIA, {"gamma": gamma}).is_invertible
    with pytest.raises(CompositionError, match="gamma"):
        invert(MIXTURE, sampler, grid, START[:2], range(2))


def test_the_last_state_alone_would_be_amplified(monkeypatch):
    state, grid = solved(BDIA(20, 0.5), UniformLambda(stop=0.05, end="minimum"))
    guessed = DDIM(1).invert(
        dataclasses.replace(state, index=1), Evaluator(MIXTURE), dataclasses.replace(grid, levels=grid.levels[-2:])
    )
    state = dataclasses.replace(state, memory={"previous": guessed.x})
    assert rms(BDIA(20, 0.5).invert(state, Evaluator(MIXTURE), grid).x - START) > 100


@pytest.mark.parametrize("options", [{"gamma": -0.1}, {"gamma": 1.1}, {"steps": 0}])
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        BDIA(**options)
