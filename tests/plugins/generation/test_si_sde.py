"""The interpolant's stochastic equation: marginals that do not depend on ε, and the weak orders of its two methods."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from lightrail.errors import ConfigurationError
from lightrail.generation import Evaluator, GaussianMixture, State, sample
from lightrail.traits import traits_of
from lightrail_generation.samplers import si_sde
from lightrail_generation.samplers.flow import FlowEuler
from lightrail_generation.samplers.si_sde import SISDE, diffusion
from lightrail_generation.time_grids.uniform import Uniform

VARIANCE, MEAN = 0.3, 0.8


def gaussian(variance=VARIANCE, path="flow"):
    return GaussianMixture(means=[[MEAN]], weights=[1], variances=[variance], path=path)


class Numbers:
    """Noise that is given numbers."""

    def normal(self, step, draw=0):
        return torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64)


def moments(sampler, mixture, grid):
    """The mean and variance that a run has exactly: on a Gaussian a step is x' = a x + b + g z."""
    first = grid[0]
    mean = first.alpha * MEAN
    variance = first.alpha**2 * float(mixture.variances[0]) + first.sigma**2
    evaluator = Evaluator(mixture)
    x = torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64)
    for index in range(grid.steps):
        b, a, g = sampler.step(State(x, Numbers(), index), evaluator, grid).x[:, 0].tolist()  # type: ignore[arg-type]
        mean, variance = (a - b) * mean + b, (a - b) ** 2 * variance + (g - b) ** 2
    return mean, variance


def misses(steps, epsilon=1.0, shape="constant", method="euler", stop=0.1, sampler=None, path="flow"):
    sampler = sampler or SISDE(steps, epsilon, shape, method)
    mixture = gaussian(path=path)
    grid = sampler.grid(mixture.path, Uniform(start=0.9, stop=stop, end="minimum"))
    mean, variance = moments(sampler, mixture, grid)
    last = grid[-1]
    return abs(mean - last.alpha * MEAN), abs(variance - last.alpha**2 * VARIANCE - last.sigma**2)


@pytest.mark.parametrize("shape", ["constant", "noise", "bridge"])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_the_marginals_are_the_paths_whatever_epsilon_is(epsilon, shape, method):
    mean, variance = misses(300, epsilon, shape, method)
    assert mean < 1e-12  # α is linear in t
    assert variance < (4e-3 if method == "euler" else 2e-4)
    assert variance < 0.6 * misses(100, epsilon, shape, method)[1]


def test_half_of_the_noise_would_change_them(monkeypatch):
    assert misses(300, 2.0)[1] < 4e-3
    whole = Numbers.normal
    monkeypatch.setattr(Numbers, "normal", lambda *args: whole(*args) / 2**0.5)
    assert misses(300, 2.0)[1] > 0.05


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("shape", ["constant", "bridge"])
def test_the_weak_order_is_one_or_two(method, order, shape):
    coarse, fine = misses(75, 0.4, shape, method)[1], misses(300, 0.4, shape, method)[1]
    assert order - 0.2 < math.log(coarse / fine, 4) < order + 0.3


class BothAtTheEnd(SISDE):
    """The published step, whose two slopes are both taken at the end."""

    def step(self, state, predict, grid):
        here, there = grid[state.index], grid[state.index + 1]
        h, epsilon = there.t - here.t, diffusion(self.epsilon, self.shape, here, there)
        kicked = state.x + math.sqrt(2 * epsilon * -h) * state.normal()
        drift = self._drift(kicked, there, predict, epsilon)
        again = self._drift(kicked + h * drift, there, predict, epsilon)
        return state.next(kicked + h / 2 * (drift + again))


def test_slopes_both_taken_at_the_end_are_of_order_one():
    coarse, fine = (misses(n, 0.4, sampler=BothAtTheEnd(n, 0.4))[1] for n in (75, 300))
    assert math.log(coarse / fine, 4) < 1.2
    assert fine > 10 * misses(300, 0.4, method="heun")[1]


def test_without_noise_it_is_the_flow():
    mixture = GaussianMixture(path="flow")
    grid = SISDE(steps=10).grid(mixture.path, Uniform())
    found = sample(mixture, SISDE(steps=10, epsilon=0), grid, range(8)).x
    assert torch.equal(found, sample(mixture, FlowEuler(steps=10), grid, range(8)).x)


def test_no_fresh_noise_is_left_in_the_data():
    mixture = gaussian(variance=1e-12)
    for method, count in (("euler", 12), ("heun", 23)):
        sampler = SISDE(steps=12, epsilon=2.0, method=method)
        grid = sampler.grid(mixture.path, Uniform())
        drawn = sample(mixture, sampler, grid, range(64))
        assert float((drawn.x - MEAN).abs().max()) < 1e-9
        assert drawn.evaluations == count == sampler.evaluations(grid)


def test_without_the_bound_the_score_of_narrow_data_would_blow_up(monkeypatch):
    mixture, sampler = gaussian(variance=1e-4), SISDE(steps=40, epsilon=1.0)
    grid = sampler.grid(mixture.path, Uniform())
    assert float((sample(mixture, sampler, grid, range(64)).x - MEAN).std()) < 0.03
    monkeypatch.setattr(si_sde, "diffusion", lambda epsilon, shape, here, there: epsilon)
    assert float((sample(mixture, sampler, grid, range(64)).x - MEAN).std()) > 0.2


def test_the_bound_vanishes_as_steps_get_finer():
    path = gaussian().path
    here = path.level(0.3)
    assert diffusion(1.0, "constant", here, path.level(0.299)) == 1.0
    assert diffusion(1.0, "constant", here, path.level(0.1)) == pytest.approx(0.01 / 0.8)
    assert diffusion(1.0, "constant", here, path.level(0.0)) == 0
    assert diffusion(2.0, "noise", here, path.level(0.2999)) == pytest.approx(0.6)
    assert diffusion(2.0, "bridge", here, path.level(0.2999)) == pytest.approx(0.42)


@pytest.mark.parametrize(("path", "stop"), [("linear", 0.1), ("edm", 5.0)])
def test_it_works_on_other_paths_too(path, stop):
    mixture, sampler = gaussian(path=path), SISDE(200, 1.0, "constant", "heun")
    grid = sampler.grid(mixture.path, Uniform(stop=stop, end="minimum"))
    mean, variance = moments(sampler, mixture, grid)
    last = grid[-1]
    assert mean == pytest.approx(last.alpha * MEAN, abs=2e-3)
    assert variance == pytest.approx(last.alpha**2 * VARIANCE + last.sigma**2, rel=1e-2)


def test_a_sample_is_the_same_alone():
    mixture, sampler = GaussianMixture(path="flow"), SISDE(steps=6)
    grid = sampler.grid(mixture.path, Uniform())
    together = sample(mixture, sampler, grid, range(5), seed=3).x
    assert torch.allclose(together[3:4], sample(mixture, sampler, grid, [3], seed=3).x, atol=1e-12)
    assert not torch.allclose(together, sample(mixture, sampler, grid, range(5), seed=4).x)


def test_its_traits_follow_its_options():
    assert traits_of(SISDE).is_stochastic
    assert traits_of(SISDE, {"epsilon": 1.0}).order is None
    quiet = traits_of(SISDE, {"epsilon": 0, "method": "heun"})
    assert (quiet.is_stochastic, quiet.order) == (False, 2)
    assert dataclasses.asdict(quiet)["needs_predictions"] == ("flow", "score")


@pytest.mark.parametrize("options", [{"epsilon": -1}, {"shape": "square"}, {"method": "rk4"}, {"steps": 0}])
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        SISDE(**options)
