# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
"""DPS: one step by hand, its bias beside the exact posterior of a Gaussian, through a decoder, with every solver."""

from __future__ import annotations

import pytest
import torch

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import Evaluator, GaussianMixture, Grid, Measurement, Noise, Observed, State, sample
from lightrail_generation.guidance.dps import DPS, norms
from lightrail_generation.measurements.inpaint import Inpaint
from lightrail_generation.samplers.bdia import BDIA
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.dpm_solver_v3 import DPMSolverV3
from lightrail_generation.samplers.edm import EDMHeun
from lightrail_generation.samplers.flow import FlowHeun
from lightrail_generation.samplers.unipc import UniPC
from lightrail_generation.samplers.usf import USF
from lightrail_generation.time_grids.uniform import Uniform
from lightrail_generation.wrappers.time_shift import TimeShift

MIXTURE = GaussianMixture()
SECOND = Inpaint(hidden=[0])
SECOND.prepare((2,))


class All(Measurement):
    """Every entry."""

    def apply(self, x):
        return x

    def adjoint(self, y):
        return y


class Cubic(GaussianMixture):
    """Samples that are no affine function of the states, as a latent model's."""

    def decode(self, x):
        return x + x**3 / 3


def observed(count, value=0.7, operator=SECOND):
    return Observed(operator, torch.full((count, 1), value, dtype=torch.float64))


def drawn(guidance, sampler=None, indices=range(6), denoiser=MIXTURE, seen=None):
    sampler = sampler or DDIM(10)
    grid = sampler.grid(denoiser.path, Uniform())
    seen = observed(len(indices)) if seen is None else seen
    return sample(denoiser, sampler, grid, indices, seed=2, guidance=guidance, observed=seen)


def residual(found, value=0.7):
    return float((found.x[:, 1] - value).abs().mean())


@pytest.mark.parametrize("denoiser", [MIXTURE, Cubic()])
def test_one_step_by_hand(denoiser):
    path, zeta = denoiser.path, 0.3
    grid, noise = Grid(path, (path.level(0.6), path.level(0.4))), Noise(0, range(3), (2,), torch.float64)
    start, seen = noise.normal(-1), observed(3)
    evaluator = Evaluator(denoiser, guidance=[DPS(zeta)], grid=grid, noise=noise, observed=seen)
    state = evaluator.after_step(DDIM(1).step(State(start, noise), evaluator, grid))
    x = start.clone().requires_grad_()
    wanted = DDIM(1).step(State(start, noise), Evaluator(denoiser), grid).x
    for row in range(3):
        off = (seen.value[row] - denoiser.decode(denoiser.predict(x, grid[0]).data)[row, 1:]).norm()
        wanted = wanted - zeta * torch.autograd.grad(off, x)[0]
    torch.testing.assert_close(state.x, wanted, rtol=1e-12, atol=1e-12)


def test_nothing_is_moved_where_nothing_is_left_of_the_residual():
    r = torch.zeros(1, 3, requires_grad=True)
    norms(r).sum().backward()
    assert r.grad.tolist() == [[0.0, 0.0, 0.0]]


def test_zeta_zero_is_the_sampler_alone():
    torch.testing.assert_close(drawn([DPS(0)]).x, drawn([]).x, rtol=1e-12, atol=1e-12)
    assert not DPS(0).needs_gradient


def test_a_sample_is_the_same_in_any_batch():
    together, alone = drawn([DPS(0.3)]), drawn([DPS(0.3)], indices=[4])
    torch.testing.assert_close(alone.x[0], together.x[4], rtol=1e-12, atol=1e-12)


def test_the_bias_beside_the_exact_posterior():
    # Data from N(0, 1), y = x + 0.5 z = 1: the posterior is N(0.8, 0.2).
    normal = GaussianMixture(means=[[0.0]], weights=[1.0], variances=[1.0])
    seen = observed(1000, 1.0, All(0.5))
    found = {zeta: drawn([DPS(zeta)], DDIM(100), range(1000), normal, seen).x for zeta in (0.04, 0.2)}
    assert float(found[0.04].mean()) == pytest.approx(0.82, abs=0.03)
    assert float(found[0.04].var()) == pytest.approx(0.16, abs=0.03)
    assert float(found[0.2].mean()) == pytest.approx(1.0, abs=0.03)
    assert float(found[0.2].var()) < 0.02


@pytest.mark.parametrize("sampler", [DPMSolverPP(30), UniPC(30), EDMHeun(30), FlowHeun(30), DDIM(30, 1.0)])
def test_every_solver_is_drawn_to_what_was_measured(sampler):
    plain, guided = drawn([], sampler), drawn([DPS(0.1)], sampler)
    assert residual(guided) < 0.7 * residual(plain)
    assert guided.evaluations == plain.evaluations


def test_through_a_decoder():
    cubic = Cubic()
    plain, guided = (cubic.decode(drawn(each, DDIM(40), denoiser=cubic).x)[:, 1] for each in ([], [DPS(0.1)]))
    assert float((guided - 0.7).abs().mean()) < 0.3 * float((plain - 0.7).abs().mean())


@pytest.mark.parametrize(
    "sampler",
    [
        BDIA(5),
        TimeShift(BDIA(5)),
        DPMSolverV3(5, statistics="data", corrector=True),
        USF(schedule=[{}, {"back": 1, "derivatives": "exact"}, {}]),
    ],
)
def test_solvers_that_go_on_from_earlier_states_are_refused(sampler):
    with pytest.raises(CompositionError, match="goes on from earlier ones") as caught:
        DPS().prepare(MIXTURE, sampler)
    assert all((caught.value.found, caught.value.allowed, caught.value.remedy))


def test_other_solvers_are_not_refused():
    for sampler in (DDIM(5), DPMSolverV3(5, statistics="data", corrector=False), USF(schedule=[{}, {}])):
        DPS().prepare(MIXTURE, sampler)


def test_an_option_out_of_range():
    with pytest.raises(ConfigurationError, match="zeta is out of range"):
        DPS(-1)
