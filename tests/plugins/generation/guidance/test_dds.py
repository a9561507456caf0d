# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""DDS: its Krylov steps against dense algebra, the noise that it keeps, exact measurements, every solver."""

from __future__ import annotations

import math

import pytest
import torch

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import Evaluator, GaussianMixture, Grid, Measurement, Noise, Observed, State, sample
from lightrail_generation.guidance.dds import DDS, carried_noise, consistent_data
from lightrail_generation.measurements.inpaint import Inpaint
from lightrail_generation.samplers.bdia import BDIA
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.ddpm import DDPM, posterior
from lightrail_generation.samplers.deis import DEIS
from lightrail_generation.samplers.dmcmc import DMCMC
from lightrail_generation.samplers.dpm_solver import DPMSolver
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.edm import EDMEuler, EDMHeun
from lightrail_generation.samplers.flow import FlowEuler, FlowHeun
from lightrail_generation.samplers.pndm import FPNDM
from lightrail_generation.samplers.si_sde import SISDE
from lightrail_generation.samplers.unipc import UniPC
from lightrail_generation.time_grids.uniform import Uniform
from lightrail_generation.wrappers.time_shift import TimeShift

MIXTURE = GaussianMixture()
FOUR = GaussianMixture(means=[[1.0, 0.0, -1.0, 0.5], [-1.0, 1.0, 0.0, 0.0]], weights=[0.5, 0.5], variances=[0.3, 0.2])
A = torch.tensor([[1.0, 2.0, 0.0, 0.5], [0.0, 1.0, -1.0, 0.0], [0.3, 0.0, 0.0, 1.0]], dtype=torch.float64)
SECOND = Inpaint(hidden=[0])
SECOND.prepare((2,))


class Matrix(Measurement):
    def __init__(self, matrix, noise=0.0):
        super().__init__(noise)
        self.matrix = matrix

    def apply(self, x):
        return x @ self.matrix.to(x.dtype).T

    def adjoint(self, y):
        return y @ self.matrix.to(y.dtype)


def seen_by(operator, count, value=0.7):
    size = operator.apply(torch.zeros(1, 4 if isinstance(operator, Matrix) else 2, dtype=torch.float64)).shape[1]
    return Observed(operator, torch.full((count, size), value, dtype=torch.float64))


def drawn(guidance, sampler=None, indices=range(6), denoiser=MIXTURE, operator=SECOND, seed=2):
    sampler = sampler or DDIM(10)
    grid = sampler.grid(denoiser.path, Uniform())
    observed = seen_by(operator, len(indices))
    for each in guidance:
        each.prepare(denoiser, sampler)
    return sample(denoiser, sampler, grid, indices, seed=seed, guidance=guidance, observed=observed)


@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_as_many_steps_as_there_are_eigenvalues_solve_exactly(gamma):
    data = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    measured = seen_by(Matrix(A), 3).on_states(FOUR)
    left = torch.eye(4, dtype=torch.float64) + gamma * A.T @ A
    wanted = torch.linalg.solve(left, (data + gamma * measured.value @ A).T).T
    torch.testing.assert_close(consistent_data(data, measured, gamma, 4), wanted, rtol=1e-9, atol=1e-9)
    one = consistent_data(data, measured, gamma, 1)

    def cost(x):
        off = measured.value - x @ A.T
        return gamma / 2 * off.square().sum(1) + (x - data).square().sum(1) / 2

    assert bool((cost(wanted) < cost(one)).all())
    assert bool((cost(one) < cost(data)).all())


def test_an_exact_measurement_is_met_and_the_null_space_left_alone():
    data = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    measured = seen_by(Matrix(A), 3).on_states(FOUR)
    found = consistent_data(data, measured, math.inf, 3)
    torch.testing.assert_close(found @ A.T, measured.value, rtol=1e-8, atol=1e-8)
    wanted = data + (measured.value - data @ A.T) @ torch.linalg.pinv(A).T
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


def test_each_sample_has_step_lengths_of_its_own():
    data = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    data[0] *= 100
    together = consistent_data(data, seen_by(Matrix(A), 3).on_states(FOUR), 5.0, 2)
    alone = consistent_data(data[1:2], seen_by(Matrix(A), 1).on_states(FOUR), 5.0, 2)
    torch.testing.assert_close(alone[0], together[1], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("eta", [0.0, 0.85])
def test_no_steps_are_the_sampler_alone(eta):
    sampler = DDIM(10, eta)
    torch.testing.assert_close(drawn([DDS(steps=0)], sampler).x, drawn([], sampler).x, rtol=1e-12, atol=1e-12)


def test_when_all_is_measured_that_is_the_sample():
    operator = Matrix(torch.eye(4, dtype=torch.float64))
    found = drawn([DDS(steps=1)], denoiser=FOUR, operator=operator).x
    torch.testing.assert_close(found, torch.full_like(found, 0.7), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "sampler",
    [DDIM(1), DPMSolverPP(1, order=1), EDMEuler(1), FlowEuler(1), DPMSolver(1, order=2), DDIM(1, eta=0.6), DDPM(1)],
    ids=lambda sampler: type(sampler).__name__,
)
def test_the_noise_of_the_network_is_kept(sampler):
    path, noise = (GaussianMixture(path="flow") if isinstance(sampler, FlowEuler) else MIXTURE).path, None
    mixture = GaussianMixture(path=path)
    grid, noise = Grid(path, (path.level(0.6), path.level(0.55))), Noise(0, range(3), (2,), torch.float64)
    here, there, x = grid[0], grid[1], noise.normal(-1)
    observed = seen_by(SECOND, 3)
    guidance = DDS()
    guidance.prepare(mixture, sampler)
    evaluator = Evaluator(mixture, guidance=[guidance], grid=grid, noise=noise, observed=observed)
    state = evaluator.after_step(sampler.step(State(x, noise), evaluator, grid))
    plain = mixture.predict(x, here)
    data = plain.data.clone()
    data[:, 1] = 0.7
    eta = sampler.eta if isinstance(sampler, DDIM) else float(isinstance(sampler, DDPM))
    fresh = eta * there.sigma * math.sqrt(-math.expm1(-2 * (there.lam - here.lam)))
    kept = math.sqrt(there.sigma**2 - fresh**2)
    wanted = there.alpha * data + kept * plain.noise + fresh * noise.normal(0)
    order_two = isinstance(sampler, DPMSolver)
    torch.testing.assert_close(state.x, wanted, rtol=0, atol=0.05 if order_two else 1e-12)


def test_what_is_carried_is_what_ancestral_sampling_takes_of_the_state():
    here, there = MIXTURE.path.level(0.6), MIXTURE.path.level(0.4)
    assert carried_noise(here, there, 1.0) == pytest.approx(posterior(here, there, "small")[1], rel=1e-12)
    assert carried_noise(here, there, 0.0) == pytest.approx(there.sigma / here.sigma, rel=1e-12)


def test_the_noise_follows_where_that_is_asked():
    found = drawn([DDS(keep_noise=False)]).x
    assert not torch.allclose(found, drawn([DDS()]).x)
    assert float((found[:, 1] - 0.7).abs().max()) < 1e-12


@pytest.mark.parametrize(
    "sampler",
    [
        DDIM(12, eta=0.85),
        DDPM(12),
        DPMSolverPP(12, order=3),
        DPMSolverPP(12, stochastic=True),
        UniPC(12, order=3),
        DEIS(12),
        FPNDM(12),
        EDMHeun(12),
        FlowHeun(12),
        TimeShift(DDIM(12)),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_every_solver_meets_what_was_measured(sampler):
    plain, guided = drawn([], sampler), drawn([DDS()], sampler)
    # The last step of the first ones does not end at the data that were predicted for it.
    extrapolates = isinstance(sampler, DEIS | FPNDM | FlowHeun)
    assert float((guided.x[:, 1] - 0.7).abs().max()) < (0.1 if extrapolates else 1e-6)
    assert guided.evaluations == plain.evaluations
    assert float(guided.x[:, 0].abs().max()) < 3


def test_the_posterior_of_correlated_data():
    # x1 given x2 = 1 of two components at (1, 1) and (−1, −1) is N(1, 0.05).
    pair = GaussianMixture(means=[[1.0, 1.0], [-1.0, -1.0]], weights=[0.5, 0.5], variances=[0.05, 0.05])
    found = drawn([DDS()], DDIM(50, eta=0.85), range(100), pair, seed=4).x
    assert float((found[:, 0] > 0).double().mean()) > 0.95
    assert float(found[:, 0].mean()) == pytest.approx(1.0, abs=0.15)


def test_a_measurement_with_noise_is_not_met_exactly():
    noisy = Inpaint(hidden=[0], noise=0.3)
    noisy.prepare((2,))
    off = [float((drawn([DDS(**o)], operator=noisy).x[:, 1] - 0.7).abs().mean()) for o in ({}, {"noiseless": True})]
    assert off[1] < 1e-12
    assert 1e-3 < off[0] < 0.3


def test_a_sample_is_the_same_in_any_batch():
    sampler = DDIM(10, eta=0.85)
    together, alone = drawn([DDS()], sampler), drawn([DDS()], sampler, indices=[4])
    torch.testing.assert_close(alone.x[0], together.x[4], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampler", [BDIA(5), SISDE(5), DMCMC(5), EDMHeun(5, s_churn=4.0), TimeShift(SISDE(5))])
def test_solvers_that_carry_something_else_along_are_refused(sampler):
    with pytest.raises(CompositionError) as caught:
        DDS().prepare(MIXTURE, sampler)
    assert all((caught.value.what, caught.value.found, caught.value.allowed, caught.value.remedy))
    DDS(keep_noise=False).prepare(MIXTURE, sampler)


def test_a_latent_model_is_refused():
    class Cubic(GaussianMixture):
        def decode(self, x):
            return x + x**3

    with pytest.raises(CompositionError, match="cannot be carried over"):
        drawn([DDS()], denoiser=Cubic())


def test_options_out_of_range():
    for options in ({"steps": -1}, {"gamma": 0.0}):
        with pytest.raises(ConfigurationError):
            DDS(**options)
