# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""Active subsampling: where particles disagree, by hand; a mask that grows and is shared; only what is taken counts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import GaussianMixture, Generated, Measurement, Observed, sample
from lightrail_generation.guidance.active_subsampling import ActiveSubsampling, disagreement, groups_of
from lightrail_generation.guidance.dps import DPS
from lightrail_generation.measurements.inpaint import Inpaint
from lightrail_generation.measurements.mask_fourier import MaskFourier
from lightrail_generation.samplers.bdia import BDIA
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.edm import EDMHeun
from lightrail_generation.time_grids.uniform_lambda import UniformLambda


class Identity(Measurement):
    def apply(self, x):
        return x

    def adjoint(self, y):
        return y


# The first three entries are ±1, each by a coin; the others are what they always are.
CORNERS = [[*corner, 0.5, -0.5, 0.0] for corner in itertools.product([-1.0, 1.0], repeat=3)]
MIXTURE = GaussianMixture(CORNERS, [1.0] * 8, [0.01] * 8)


def drawn(guided, truth, sampler=None, first=0, value=None):
    """One population for each row of the truth."""
    sampler = sampler or DDIM(30)
    rows = truth.repeat_interleave(guided[0].population, 0) if guided[0].population > 1 else truth
    observed = Observed(Identity(), rows if value is None else value, rows)
    grid = sampler.grid(MIXTURE.path, UniformLambda())
    indices = range(first, first + len(rows))
    return sample(MIXTURE, sampler, grid, indices, seed=1, guidance=guided, observed=observed)


class Seen(ActiveSubsampling):
    def after_step(self, state, moment):
        state = super().after_step(state, moment)
        SEEN.append(moment.memory["taken"])
        return state


SEEN: list[torch.Tensor] = []
TRUTH = torch.tensor([CORNERS[2], CORNERS[5]], dtype=torch.float64)


def test_disagreement_by_hand():
    y = torch.tensor([[[0.0, 2.0], [0.3, 2.1], [1.0, 1.7]]], dtype=torch.float64)
    found = disagreement(y, torch.arange(2), 0.5)
    for a in range(2):
        sums = [sum(math.exp(-((y[0, i, a] - y[0, j, a]) ** 2) / 0.5) for j in range(3)) for i in range(3)]
        assert float(found[0, a]) == pytest.approx(-math.log(sum(math.log(each) for each in sums)), rel=1e-12)


@pytest.mark.parametrize("apart", [0.1, 1.0, 1e2, 1e6])
def test_of_two_particles_the_entry_of_the_largest_variance_is_taken(apart):
    y = apart * torch.tensor([[[0.0, 0.0, 0.0, 1.0], [0.5, -1.001, 1.0, 1.0]]], dtype=torch.float64)
    found = disagreement(y, torch.arange(4), 0.04)
    assert bool(found.isfinite().all())
    assert found.argsort(descending=True).tolist() == y.var(1).argsort(descending=True).tolist() == [[1, 2, 0, 3]]


def test_entries_of_a_group_are_measured_together():
    y = torch.tensor([[[0.0, 0.0, 0.0], [0.6, 0.0, 0.8]]])
    found = disagreement(y, torch.tensor([0, 1, 0]), 1.0)
    torch.testing.assert_close(found[:, 0], disagreement(torch.tensor([[[0.0], [1.0]]]), torch.tensor([0]), 1.0)[:, 0])


def test_groups_of_operators():
    assert groups_of(Identity(), (2, 2, 3), "pixel").tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert groups_of(Identity(), (2, 2, 3), "column").tolist() == [0, 1, 2] * 4
    assert groups_of(Identity(), (4,), "pixel").tolist() == [0, 1, 2, 3]
    inpaint = Inpaint(box=[0.0, 0.0, 0.5, 0.5])
    inpaint.prepare((2, 2, 2))
    assert groups_of(inpaint, (6,), "pixel").tolist() == [0, 1, 2] * 2
    assert groups_of(inpaint, (6,), "column").tolist() == [1, 0, 1] * 2
    fourier = MaskFourier(share=0.5, center=0.0)
    fourier.prepare((1, 4, 4))
    shape = tuple(fourier.apply(torch.zeros(1, 1, 4, 4)).shape[1:])
    columns = groups_of(fourier, shape, "column")
    assert columns.bincount().tolist() == [8, 8]
    assert groups_of(fourier, shape, "pixel").bincount().tolist() == [2] * 8


def test_the_mask_grows_evenly_and_is_shared_within_a_population():
    SEEN.clear()
    guided = Seen(measurements=3, particles=4, zeta=0.1, start=0.2, stop=0.8)
    assert drawn([guided], TRUTH, DDIM(10)).evaluations == 10
    assert [int(mask[0].sum()) for mask in SEEN] == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3]
    for before, after in itertools.pairwise(SEEN):
        assert not bool((before & ~after).any())
    for mask in SEEN:
        populations = mask.view(2, 4, 6)
        assert bool((populations == populations[:, :1]).all())


def test_no_more_is_taken_than_there_is():
    SEEN.clear()
    drawn([Seen(measurements=50, particles=2, zeta=0.1)], TRUTH, DDIM(10))
    assert bool(SEEN[-1].all())


def test_what_is_always_the_same_is_not_measured():
    SEEN.clear()
    drawn([Seen(measurements=3, particles=8, zeta=0.1, start=0.3)], TRUTH)
    assert SEEN[-1][0].tolist() == [True] * 3 + [False] * 3


def test_measuring_where_particles_disagree_beats_measuring_at_random():
    errors = {}
    for acquisition in ("entropy", "random"):
        guided = ActiveSubsampling(3, 8, zeta=0.3, stop=0.4, acquisition=acquisition)
        truth = MIXTURE.examples(8)
        found = drawn([guided], truth)
        rows = truth.repeat_interleave(8, 0)
        observed = Observed(Identity(), rows, rows)
        errors[acquisition] = guided.measure(Generated(found.x, found.start, observed=observed))["rmse"]
    assert errors["entropy"] < 0.4 * errors["random"]


def test_what_is_not_taken_is_not_used():
    guided = [ActiveSubsampling(2, 4, zeta=0.2)]
    rows = TRUTH[:1].repeat_interleave(4, 0)
    SEEN.clear()
    plain = drawn([Seen(2, 4, zeta=0.2)], TRUTH[:1])
    other = torch.where(SEEN[-1], rows, rows + 100.0)
    assert torch.equal(drawn(guided, TRUTH[:1], value=other).x, plain.x)


@pytest.mark.parametrize("sampler", [DDIM(10), DPMSolverPP(10), EDMHeun(10)], ids=type)
def test_all_at_once_is_dps(sampler):
    everything = ActiveSubsampling(6, 2, zeta=0.1, stop=1e-6)
    dps = drawn([DPS(zeta=0.1)], TRUTH.repeat_interleave(2, 0), sampler)
    found = drawn([everything], TRUTH, sampler)
    torch.testing.assert_close(found.x, dps.x, rtol=1e-12, atol=1e-12)
    assert found.evaluations == dps.evaluations


@pytest.mark.parametrize("acquisition", ["entropy", "random"])
def test_a_population_does_not_depend_on_another(acquisition):
    guided = [ActiveSubsampling(2, 4, zeta=0.1, acquisition=acquisition)]
    together = drawn(guided, TRUTH).x
    alone = drawn(guided, TRUTH[1:], first=4).x
    torch.testing.assert_close(together[4:], alone, rtol=1e-12, atol=1e-12)


def test_no_step_is_the_sampler_alone():
    plain = drawn([DPS(zeta=0.0)], TRUTH.repeat_interleave(4, 0))
    assert torch.equal(drawn([ActiveSubsampling(2, 4, zeta=0.0)], TRUTH).x, plain.x)


@pytest.mark.parametrize(
    "options",
    [
        {"measurements": 0},
        {"particles": 1},
        {"unit": "row"},
        {"sigma": 0.0},
        {"zeta": -1.0},
        {"start": 0.8, "stop": 0.8},
        {"stop": 1.1},
        {"acquisition": "greedy"},
    ],
    ids=str,
)
def test_bad_options(options):
    with pytest.raises(ConfigurationError) as caught:
        ActiveSubsampling(**options)
    assert caught.value.remedy


def test_a_sampler_that_goes_on_from_earlier_states_is_refused():
    with pytest.raises(CompositionError, match="BDIA"):
        ActiveSubsampling().prepare(MIXTURE, BDIA(10))


def test_without_the_truth_nothing_is_measured():
    samples = torch.zeros(2, 6)
    assert ActiveSubsampling().measure(Generated(samples, samples)) == {}
