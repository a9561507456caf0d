# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""Time travel: the noise that is added, which steps are taken again, and that the distribution stays."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lightrail.catalogue import available, load
from lightrail.errors import CompositionError, ConfigurationError, UserError
from lightrail.generation import GaussianMixture, Guidance, LinearFlow, LinearVP, Noise, Sampler, sample
from lightrail.traits import traits_of
from lightrail_generation.guidance.time_travel import TimeTravel, renoised
from lightrail_generation.samplers.bdia import BDIA
from lightrail_generation.samplers.ddim import DDIM, transfer
from lightrail_generation.samplers.ddpm import DDPM
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.edm import EDMHeun
from lightrail_generation.samplers.unipc import UniPC
from lightrail_generation.samplers.usf import USF
from lightrail_generation.time_grids.uniform import Uniform
from lightrail_generation.wrappers.time_shift import TimeShift

MIXTURE = GaussianMixture()


def drawn(guidance, sampler, model=MIXTURE, indices=range(4), end="zero", **options):
    for each in guidance:
        each.prepare(model, sampler)
    grid = sampler.grid(model.path, Uniform(end=end))
    return sample(model, sampler, grid, indices, seed=3, guidance=guidance, **options)


@pytest.mark.parametrize("path", [LinearVP(), LinearFlow()], ids=["vp", "flow"])
@pytest.mark.parametrize("times", [(0.0, 0.3), (0.4, 0.7), (0.6, 1.0), (0.5, 0.5)])
def test_noise_is_added_up_to_the_level(path, times):
    here, there = (path.level(t) for t in times)
    data, e, z = torch.randn(3, 200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = renoised(here.alpha * data + here.sigma * e, here, there, z)
    noise = found - there.alpha * data
    assert noise.var().item() == pytest.approx(there.sigma**2, rel=0.02, abs=1e-12)
    # By hand, at one value.
    ratio = there.alpha / here.alpha
    wanted = ratio * 2.0 + math.sqrt(max(0.0, there.sigma**2 - ratio**2 * here.sigma**2)) * 3.0
    one = renoised(torch.tensor([2.0]).double(), here, there, torch.tensor([3.0]).double())
    assert one.item() == pytest.approx(wanted, rel=1e-12)


def test_levels_of_each_sample_are_their_own():
    path, times = LinearVP(), torch.tensor([[0.2, 0.5], [0.6, 0.9]])
    here, there = path.levels(times[:, 0], 2), path.levels(times[:, 1], 2)
    x, z = torch.randn(2, 3).double(), torch.randn(2, 3).double()
    found = renoised(x, here, there, z)
    for row in range(2):
        near, far = (path.level(float(t)) for t in times[row])
        torch.testing.assert_close(found[row], renoised(x[row], near, far, z[row]), rtol=1e-6, atol=1e-6)


def test_a_step_is_taken_again_from_its_level_with_new_noise():
    sampler, travel = DDIM(4), TimeTravel(repeats=2, length=1, start=0.5, stop=0.75)  # the third step
    grid = sampler.grid(MIXTURE.path, Uniform())
    start = torch.randn(2, 2).double()
    found = sample(MIXTURE, sampler, grid, range(2), seed=3, start=start, guidance=[travel])
    noise = Noise(3, range(2), (2,), torch.float64)
    x = start
    for index in range(4):
        x = transfer(MIXTURE.predict(x, grid[index]), grid[index + 1])
        if index == 2:
            for draw in range(2):
                back = renoised(x, grid[3], grid[2], noise.normal(2, 1000 + 1_000_000 * draw))
                x = transfer(MIXTURE.predict(back, grid[2]), grid[3])
    torch.testing.assert_close(found.x, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({"repeats": 0}, 0),
        ({"repeats": 1, "length": 1, "start": 0.0, "stop": 1.0}, 10),
        ({"repeats": 3, "length": 1, "start": 0.3, "stop": 0.7}, 12),
        ({"repeats": 2, "length": 3, "start": 0.2, "stop": 0.9}, 12),  # two stretches, and one step that is none
        ({"repeats": 2, "length": 10, "start": 0.0, "stop": 1.0}, 20),
        ({"repeats": 2, "length": 5, "start": 0.4, "stop": 0.8}, 0),
        ({"repeats": 2, "start": 0.5, "stop": 0.5}, 0),
        ({"repeats": 1, "start": 0.25, "stop": 0.65}, 3),  # steps 3, 4 and 5
    ],
    ids=str,
)
def test_steps_are_counted(options, more):
    found = drawn([TimeTravel(**options)], DDIM(10))
    assert found.evaluations == 10 + more
    assert found.x.isfinite().all()


def test_without_repetitions_it_is_the_run_alone():
    for sampler in (DDIM(6), DPMSolverPP(6), UniPC(6), EDMHeun(6), DDPM(6)):
        assert torch.equal(drawn([TimeTravel(repeats=0)], sampler).x, drawn([], sampler).x)


def test_the_state_goes_back_without_what_was_carried_along():
    seen = []

    class Sees(Guidance):
        def after_step(self, state, moment):
            seen.append((moment.index, state.index, len(state.history), dict(state.memory)))
            return state

    drawn([TimeTravel(repeats=1, length=2, start=0.25, stop=0.75), Sees()], DPMSolverPP(8, order=3))
    back = [each for each in seen if each[1] <= each[0]]
    assert [(index, left) for left, index, *_ in back] == [(2, 3), (4, 5)]
    assert all(length == 0 and not memory for *_, length, memory in back)
    assert {length for _, index, length, _ in seen if index in (1, 3, 5)} == {1, 2}


def test_the_distribution_stays_that_of_the_model():
    plain = drawn([], DDIM(30), indices=range(500)).x
    found = drawn([TimeTravel(repeats=2, length=2, start=0.3, stop=0.7)], DDIM(30), indices=range(500)).x
    torch.testing.assert_close(found.mean(0), plain.mean(0), atol=0.2, rtol=0)
    torch.testing.assert_close(found.T.cov(), plain.T.cov(), atol=0.2, rtol=0)
    assert (found - plain).abs().max() > 0.1


def test_a_sampler_that_draws_noise_draws_other_numbers_each_time():
    seen = []

    class Sees(Guidance):
        def after_step(self, state, moment):
            seen.append(state.noise.normal(moment.index))
            return state

    drawn([Sees(), TimeTravel(repeats=2, start=0.5, stop=0.75)], DDPM(4))
    assert len({float(each[0, 0]) for each in seen}) == len(seen) == 6


def test_the_variance_is_that_of_noise_that_is_all_fresh():
    # Of a standard normal model D = α x, so that a step is x' = a x + s z and variances follow by hand.
    normal = GaussianMixture(means=[[0.0] * 50], weights=[1.0], variances=[1.0])
    sampler = DDIM(6, eta=1.0)
    grid = sampler.grid(normal.path, Uniform(end="minimum"))
    variance = 1.0
    for here, there in itertools.pairwise(grid):
        s = there.sigma * math.sqrt(-math.expm1(-2 * (there.lam - here.lam)))
        a = there.alpha * here.alpha + math.sqrt(there.sigma**2 - s**2) * (1 - here.alpha**2) / here.sigma
        ratio = here.alpha / there.alpha
        for repetition in range(5):
            variance = a**2 * variance + s**2
            if repetition < 4:
                variance = ratio**2 * variance + here.sigma**2 - ratio**2 * there.sigma**2
    travel = TimeTravel(repeats=4, length=1, start=0.0, stop=1.0)
    found = drawn([travel], sampler, normal, range(160), end="minimum")
    assert variance < 0.9
    assert found.x.var().item() == pytest.approx(variance, rel=0.05)


def test_a_sample_does_not_depend_on_its_batch():
    travel = [TimeTravel(repeats=2, length=2, start=0.0, stop=1.0)]
    together = drawn(travel, UniPC(8))
    alone = drawn(travel, UniPC(8), indices=[2])
    torch.testing.assert_close(alone.x[0], together.x[2], rtol=1e-12, atol=1e-12)


def test_the_second_run_is_as_the_first():
    travel = [TimeTravel(repeats=2, length=1, start=0.0, stop=1.0)]
    assert torch.equal(drawn(travel, DDIM(6)).x, drawn(travel, DDIM(6)).x)


def test_it_works_with_every_sampler_or_refuses_it_by_name():
    refused, said = set(), []
    for name in available("sampler"):
        try:
            plugin = load("sampler", name)
        except UserError:
            continue
        if not (isinstance(plugin, type) and issubclass(plugin, Sampler)):
            continue
        sampler = plugin(**{**dict(traits_of(plugin).example), "steps": 6})
        travel = TimeTravel(repeats=1, length=2, start=0.3, stop=0.9)
        try:
            found = drawn([travel], sampler, end="minimum")
        except CompositionError as error:
            refused.add(name)
            said.append((plugin.__name__, error.what))
            continue
        assert found.x.isfinite().all(), name
        assert found.evaluations > drawn([], sampler, end="minimum").evaluations, name
    assert refused == {"bdia", "dmcmc"}
    assert all(name in what for name, what in said)


@pytest.mark.parametrize(
    ("sampler", "name"),
    [
        (TimeShift(BDIA(4)), "BDIA"),
        (USF(schedule=[{}, {"back": 1, "derivatives": "exact"}, {}]), "USF"),
        (USF(schedule=[{}, {"corrector": True}, {}]), "USF"),
    ],
    ids=["wrapped", "back", "corrector"],
)
def test_samplers_that_look_back_are_refused(sampler, name):
    with pytest.raises(CompositionError) as caught:
        TimeTravel().prepare(MIXTURE, sampler)
    assert name in caught.value.what
    assert caught.value.remedy


@pytest.mark.parametrize(
    "options",
    [{"repeats": -1}, {"repeats": 1.5}, {"length": 0}, {"start": -0.1}, {"stop": 1.1}, {"start": 0.7, "stop": 0.3}],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigurationError) as caught:
        TimeTravel(**options)
    assert next(iter(options)) in caught.value.found
