# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""MCG: the projection, what it keeps, the history that it ends, and the operators that it refuses."""

from __future__ import annotations

import pytest
import torch

from lightrail.errors import CompositionError
from lightrail.generation import Evaluator, GaussianMixture, Grid, Measurement, Noise, Observed, State, sample
from lightrail_generation.guidance.dps import DPS
from lightrail_generation.guidance.mcg import MCG, projected
from lightrail_generation.measurements.inpaint import Inpaint
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.ddpm import DDPM
from lightrail_generation.samplers.deis import DEIS
from lightrail_generation.samplers.dmcmc import DMCMC
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.edm import EDMHeun
from lightrail_generation.samplers.pndm import FPNDM
from lightrail_generation.samplers.unipc import UniPC
from lightrail_generation.time_grids.uniform import Uniform

MIXTURE = GaussianMixture()
A = torch.tensor([[1.0, 2.0]], dtype=torch.float64)


class Matrix(Measurement):
    def apply(self, x):
        return x @ A.T

    def adjoint(self, y):
        return y @ A


class Rough(Matrix):
    def pseudo_inverse(self, y):
        return self.adjoint(y)


def operator_of(kind):
    made = kind() if kind is not Inpaint else Inpaint(hidden=[0])
    made.prepare((2,))
    return made


def drawn(guidance, sampler=None, indices=range(6), kind=Inpaint, denoiser=MIXTURE):
    sampler = sampler or DDIM(10)
    observed = Observed(operator_of(kind), torch.full((len(indices), 1), 0.7, dtype=torch.float64))
    grid = sampler.grid(denoiser.path, Uniform())
    return sample(denoiser, sampler, grid, indices, seed=2, guidance=guidance, observed=observed)


def test_a_projected_state_is_seen_as_y_at_its_level_and_moves_no_further():
    level, x = MIXTURE.path.level(0.4), torch.randn(3, 2, dtype=torch.float64)
    z = torch.randn(3, 2, dtype=torch.float64)
    measured = Observed(Matrix(), torch.full((3, 1), 0.7, dtype=torch.float64)).on_states(MIXTURE)
    found = projected(x, measured, level, z)
    torch.testing.assert_close(found @ A.T, level.alpha * 0.7 + level.sigma * z @ A.T, rtol=1e-10, atol=1e-10)
    across = torch.tensor([[2.0], [-1.0]], dtype=torch.float64)
    torch.testing.assert_close(found @ across, x @ across, rtol=1e-10, atol=1e-10)


def test_one_step_is_that_of_dps_and_the_projection():
    path = MIXTURE.path
    grid, noise = Grid(path, (path.level(0.6), path.level(0.4))), Noise(0, range(3), (2,), torch.float64)
    observed = Observed(operator_of(Inpaint), torch.full((3, 1), 0.7, dtype=torch.float64))
    found = []
    for guidance in (MCG(0.3), DPS(0.3)):
        evaluator = Evaluator(MIXTURE, guidance=[guidance], grid=grid, noise=noise, observed=observed)
        found.append(evaluator.after_step(DDIM(1).step(State(noise.normal(-1), noise), evaluator, grid)).x)
    z = noise.normal(0, 1000)[:, 1]
    torch.testing.assert_close(found[0][:, 0], found[1][:, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[0][:, 1], grid[1].alpha * 0.7 + grid[1].sigma * z, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("zeta", [0.0, 0.2])
@pytest.mark.parametrize("solver", [DDIM, DDPM, DPMSolverPP, UniPC, DEIS, FPNDM, EDMHeun])
def test_what_was_measured_is_in_the_samples(solver, zeta):
    sampler = solver(10)
    plain, guided = drawn([], sampler), drawn([MCG(zeta)], sampler)
    assert float((guided.x[:, 1] - 0.7).abs().max()) < 1e-12
    assert float(guided.x.abs().max()) < 3
    assert guided.evaluations == plain.evaluations or isinstance(sampler, FPNDM)  # whose warm-up comes again


def test_operators_without_orthonormal_rows():
    found = drawn([MCG(0.1)], kind=Matrix).x
    torch.testing.assert_close(found @ A.T, torch.full((6, 1), 0.7, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_a_multistep_solver_starts_its_history_anew():
    lengths = []

    class Watching(DPMSolverPP):
        def step(self, state, predict, grid):
            lengths.append(len(state.history))
            return super().step(state, predict, grid)

    drawn([MCG(0.1)], Watching(6, order=3))
    assert lengths == [0] * 6


def test_a_sample_is_the_same_in_any_batch():
    together, alone = drawn([MCG(0.3)]), drawn([MCG(0.3)], indices=[4])
    torch.testing.assert_close(alone.x[0], together.x[4], rtol=1e-12, atol=1e-12)


def test_what_is_refused():
    class Cubic(GaussianMixture):
        def decode(self, x):
            return x + x**3

    for refused in (
        lambda: drawn([MCG()], kind=Rough),
        lambda: drawn([MCG()], denoiser=Cubic()),
        lambda: MCG().prepare(MIXTURE, DMCMC(5)),
    ):
        with pytest.raises(CompositionError) as caught:
            refused()
        assert all((caught.value.what, caught.value.found, caught.value.allowed, caught.value.remedy))
