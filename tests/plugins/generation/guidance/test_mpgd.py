# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""MPGD: the gradient at the data in closed form, its step by hand, through a decoder, with every solver."""

from __future__ import annotations

import pytest
import torch

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import Evaluator, GaussianMixture, Grid, Measurement, Noise, Observed, State, sample
from lightrail_generation.guidance.mpgd import MPGD
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.edm import EDMHeun
from lightrail_generation.samplers.flow import FlowHeun
from lightrail_generation.samplers.si_sde import SISDE
from lightrail_generation.samplers.unipc import UniPC
from lightrail_generation.time_grids.uniform import Uniform

MIXTURE = GaussianMixture()
A = torch.tensor([[1.0, 2.0]], dtype=torch.float64)


class Matrix(Measurement):
    def apply(self, x):
        return x @ A.T

    def adjoint(self, y):
        return y @ A


class Cubic(GaussianMixture):
    def decode(self, x):
        return x + x**3 / 3


def observed(count):
    return Observed(Matrix(), torch.full((count, 1), 1.5, dtype=torch.float64))


def drawn(guidance, sampler=None, indices=range(6), denoiser=MIXTURE):
    sampler = sampler or DDIM(20)
    for each in guidance:
        each.prepare(denoiser, sampler)
    grid, seen = sampler.grid(denoiser.path, Uniform()), observed(len(indices))
    return sample(denoiser, sampler, grid, indices, seed=2, guidance=guidance, observed=seen)


def residual(found, denoiser=MIXTURE):
    return float((denoiser.decode(found.x) @ A.T - 1.5).abs().mean())


def test_one_step_in_closed_form():
    path, scale = MIXTURE.path, 0.2
    grid, noise = Grid(path, (path.level(0.5), path.level(0.4))), Noise(0, range(3), (2,), torch.float64)
    x, here, there = noise.normal(-1), grid[0], grid[1]
    evaluator = Evaluator(MIXTURE, guidance=[MPGD(scale)], grid=grid, noise=noise, observed=observed(3))
    state = evaluator.after_step(DDIM(1).step(State(x, noise), evaluator, grid))
    plain = MIXTURE.predict(x, here)
    off = 1.5 - plain.data @ A.T
    data = plain.data + scale / here.alpha * off / off.norm(dim=1, keepdim=True) @ A
    torch.testing.assert_close(state.x, there.alpha * data + there.sigma * plain.noise, rtol=1e-12, atol=1e-12)


def test_scale_zero_is_the_sampler_alone():
    torch.testing.assert_close(drawn([MPGD(0)]).x, drawn([]).x, rtol=1e-12, atol=1e-12)


def test_a_sample_is_the_same_in_any_batch():
    together, alone = drawn([MPGD(0.05)]), drawn([MPGD(0.05)], indices=[4])
    torch.testing.assert_close(alone.x[0], together.x[4], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampler", [DDIM(30, 0.5), DPMSolverPP(30), UniPC(30), EDMHeun(30), FlowHeun(30)])
def test_every_solver_is_drawn_to_what_was_measured(sampler):
    plain, guided = drawn([], sampler), drawn([MPGD(0.05)], sampler)
    assert residual(guided) < 0.5 * residual(plain)
    assert guided.evaluations == plain.evaluations


def test_through_a_decoder_and_not_through_the_network():
    class Black(Cubic):
        def output(self, x, t, condition):
            return super().output(x.detach(), t, condition).detach()

    assert residual(drawn([MPGD(0.05)], denoiser=Black()), Black()) < 0.5 * residual(
        drawn([], denoiser=Black()), Black()
    )


def test_it_starts_where_nothing_of_the_data_is_left():
    flow = GaussianMixture(path="flow")
    found = drawn([MPGD(0.05)], FlowHeun(20), denoiser=flow)
    assert bool(found.x.isfinite().all())


def test_what_is_refused():
    with pytest.raises(ConfigurationError, match="scale is out of range"):
        MPGD(-1)
    with pytest.raises(CompositionError, match="cannot keep the noise"):
        MPGD().prepare(MIXTURE, SISDE(5))
