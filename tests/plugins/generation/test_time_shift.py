"""Time shift: the base alone with a window of one, the time that a variance belongs to, and whose variance it is."""

from __future__ import annotations

import pytest
import torch

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import Evaluator, GaussianMixture, Noise, State, sample
from lightrail_generation.samplers.bdia import BDIA
from lightrail_generation.samplers.ddim import DDIM, transfer
from lightrail_generation.samplers.flow import FlowRK4
from lightrail_generation.time_grids.training_steps import TrainingSteps
from lightrail_generation.time_grids.uniform import Uniform
from lightrail_generation.wrappers.time_shift import TimeShift, nearest_time

MIXTURE = GaussianMixture()
N = 4096


def model(variance, path="linear"):
    """A Gaussian in many dimensions, whose samples' elements vary by ``variance``."""
    return GaussianMixture(means=[[0.0] * N], weights=[1], variances=[variance], path=path)


def told(wrapped, mixture, grid, count=64, at=None):
    """The times that the network is told by the step at ``grid[at]``, from states of that very level."""
    index = grid.steps // 2 if at is None else at
    level, noise = grid[index], Noise(0, range(count), mixture.shape, torch.float64)
    clean = mixture.variances[0].sqrt() * noise.normal(-5)
    state = State(level.alpha * clean + level.sigma * noise.normal(-6), noise, index)
    seen = []

    def predict(x, level, network_time=None):
        seen.append(torch.as_tensor(level.t, dtype=torch.float64).reshape(-1).expand(len(x)))
        return mixture.predict(x, level, network_time=network_time)

    wrapped.step(state, predict, grid)
    return seen[0]


def test_a_window_of_one_is_the_sampler_alone():
    for sampler in (DDIM(10), BDIA(10), FlowRK4(3)):
        grid = sampler.grid(MIXTURE.path, Uniform())
        found = sample(MIXTURE, TimeShift(sampler, window=1, cutoff=0), grid, range(8)).x
        assert torch.equal(found, sample(MIXTURE, sampler, grid, range(8)).x)


def test_the_nearest_of_the_candidates_is_chosen():
    path = MIXTURE.path
    candidates = torch.tensor([0.3, 0.4, 0.5, 0.6]).double()
    variances = torch.cat((path.sigma(candidates) ** 2 + 1e-4, torch.tensor([0.0, 2.0]).double()))
    assert nearest_time(variances, candidates, path, 0.0).tolist() == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.3, 0.6])
    spread = path.sigma(candidates) ** 2 + 0.1 * path.alpha(candidates) ** 2
    assert torch.allclose(nearest_time(spread, candidates.expand(4, 4), path, 0.1), candidates)


def shift_of(variance, data_variance, window=41):
    mixture, wrapped = model(variance), TimeShift(DDIM(10), window, 0.0, data_variance)
    grid = wrapped.grid(mixture.path, Uniform())
    return (told(wrapped, mixture, grid, at=6) - grid[6].t) * 1000


def test_states_without_variance_of_their_own_are_told_their_time_on_average():
    shifts = shift_of(1e-12, 0.0)
    assert abs(float(shifts.mean())) < 3
    assert 2 < float(shifts.std()) < 15
    assert float(shifts.abs().max()) <= 20.0001
    assert torch.allclose(shifts, shifts.round(), atol=1e-9)


def test_the_datas_variance_pulls_to_the_noisiest_time_unless_it_is_given():
    assert torch.allclose(shift_of(1.0, 0.0), torch.tensor(20.0).double())
    assert float(shift_of(0.25, 0.0).mean()) > 19
    assert abs(float(shift_of(0.25, 0.25).mean())) < 4


def test_the_noise_is_that_of_the_told_time_and_the_coefficients_are_the_grids():
    mixture, wrapped = model(1.0), TimeShift(DDIM(10), window=41, cutoff=0.0)
    grid = wrapped.grid(mixture.path, Uniform())
    noise = Noise(0, range(4), mixture.shape, torch.float64)
    state = State(noise.normal(-1), noise, 5)
    found = wrapped.step(state, mixture.predict, grid).x
    level = mixture.path.level(grid[5].t + 0.02)
    seen = mixture.predict(state.x, level).noise
    here, there = grid[5], grid[6]
    data = (state.x - here.sigma * seen) / here.alpha
    assert torch.allclose(found, there.alpha * data + there.sigma * seen, atol=1e-12)
    assert not torch.allclose(found, transfer(mixture.predict(state.x, here), there), atol=1e-4)


def test_pure_noise_and_times_below_the_cutoff_are_left_alone():
    mixture, wrapped = model(1.0), TimeShift(DDIM(10), window=5, cutoff=0.45)
    grid = wrapped.grid(mixture.path, Uniform())
    for index, is_shifted in ((0, False), (1, True), (5, True), (6, False), (9, False)):
        times = told(wrapped, mixture, grid, 3, at=index)
        assert bool((times != grid[index].t).any()) == is_shifted
    assert sample(mixture, wrapped, grid, range(2)).evaluations == wrapped.evaluations(grid) == 10


def test_a_network_of_whole_times_is_told_whole_times():
    mixture = GaussianMixture(means=[[0.0] * N], weights=[1], variances=[1e-12], path="ddpm")
    wrapped = TimeShift(DDIM(10), window=9, cutoff=0.3)
    grid = wrapped.grid(mixture.path, TrainingSteps())
    times = told(wrapped, mixture, grid)
    assert torch.allclose(times, times.round())
    assert float((times - grid[5].t).abs().max()) <= 4
    assert len(times.unique()) > 2
    assert TimeShift(DDIM(2), training_steps=50).training_steps == 50


def test_each_sample_is_told_its_own():
    wrapped = TimeShift(DDIM(8), window=101, cutoff=0.1)
    grid = wrapped.grid(MIXTURE.path, Uniform())
    together = sample(MIXTURE, wrapped, grid, range(6)).x
    assert torch.allclose(sample(MIXTURE, wrapped, grid, [2], start=None).x, together[2:3], atol=1e-12)
    assert not torch.allclose(together, sample(MIXTURE, DDIM(8), grid, range(6)).x, atol=1e-3)


def test_it_can_go_around_a_sampler_of_several_stages():
    sampler = FlowRK4(4)
    wrapped = TimeShift(sampler, window=21, cutoff=0.2)
    grid = wrapped.grid(MIXTURE.path, Uniform())
    found = sample(MIXTURE, wrapped, grid, range(4))
    assert bool(found.x.isfinite().all())
    assert found.evaluations == sampler.evaluations(grid) == 15


def test_a_single_element_has_no_variance():
    mixture = GaussianMixture(means=[[0.0]], weights=[1], variances=[1.0])
    wrapped = TimeShift(DDIM(4), cutoff=0.0)
    with pytest.raises(CompositionError, match="element"):
        sample(mixture, wrapped, wrapped.grid(mixture.path, Uniform()), range(2))


def test_a_time_that_the_sampler_tells_itself_is_kept():
    class Telling(DDIM):
        def step(self, state, predict, grid):
            prediction = predict(state.x, grid[state.index], network_time=0.123)
            return state.next(transfer(prediction, grid[state.index + 1]))

    seen = []

    class Watched(Evaluator):
        def __call__(self, x, level, *, network_time=None):
            seen.append(network_time)
            return super().__call__(x, level, network_time=network_time)

    wrapped = TimeShift(Telling(4), window=99, cutoff=0.0)
    grid = wrapped.grid(MIXTURE.path, Uniform())
    noise = Noise(0, range(2), (2,), torch.float64)
    wrapped.solve(State(noise.normal(-1), noise), Watched(MIXTURE), grid)
    assert seen == [0.123] * 4


@pytest.mark.parametrize(
    "options", [{"window": 0}, {"cutoff": 1.5}, {"data_variance": -1}, {"training_steps": 0}, {"window": 2.5}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        TimeShift(DDIM(4), **options)
