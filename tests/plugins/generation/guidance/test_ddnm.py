# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""DDNM: what was measured replaces what was predicted, with noise no more of it than a state may hold."""

from __future__ import annotations

import math

import pytest
import torch

from lightrail.generation import GaussianMixture, Measurement, Observed, sample
from lightrail_generation.guidance.ddnm import DDNM, null_space_data, share_of_measured
from lightrail_generation.guidance.dds import DDS
from lightrail_generation.measurements.inpaint import Inpaint
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.ddpm import DDPM, posterior
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.edm import EDMHeun
from lightrail_generation.time_grids.uniform import Uniform

MIXTURE = GaussianMixture()
A = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]], dtype=torch.float64)


class Matrix(Measurement):
    def apply(self, x):
        return x @ A.T

    def adjoint(self, y):
        return y @ A


def drawn(guidance, sampler=None, indices=range(6), noise=0.0):
    sampler = sampler or DDPM(20)
    operator = Inpaint(hidden=[0], noise=noise)
    operator.prepare((2,))
    for each in guidance:
        each.prepare(MIXTURE, sampler)
    observed = Observed(operator, torch.full((len(indices), 1), 0.7, dtype=torch.float64))
    grid = sampler.grid(MIXTURE.path, Uniform())
    return sample(MIXTURE, sampler, grid, indices, seed=2, guidance=guidance, observed=observed)


def test_what_is_measured_is_replaced_and_the_null_space_stays():
    data = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    triple = GaussianMixture(means=[[0.0] * 3], weights=[1.0], variances=[1.0])
    measured = Observed(Matrix(), torch.tensor([[1.0, 2.0], [0.0, -1.0]], dtype=torch.float64)).on_states(triple)
    found = null_space_data(data, measured)
    torch.testing.assert_close(found @ A.T, measured.value, rtol=1e-9, atol=1e-9)
    null = torch.eye(3, dtype=torch.float64) - torch.linalg.pinv(A) @ A
    torch.testing.assert_close(found @ null, data @ null, rtol=1e-9, atol=1e-9)
    assert torch.equal(null_space_data(data, measured, 0.0), data)


def test_the_share_is_what_the_noise_of_an_ancestral_step_allows():
    here, there = MIXTURE.path.level(0.3), MIXTURE.path.level(0.2)
    of_data, _, spread = posterior(here, there, "small")
    for noise in (0.05, 5.0):
        assert float(share_of_measured(here, there, noise)) == pytest.approx(min(1.0, spread / (of_data * noise)))
    assert float(share_of_measured(here, None, 0.1)) == 0.0
    assert share_of_measured(here, there, 0.0) == 1.0
    assert math.isfinite(float(share_of_measured(here, here, 0.1)))


@pytest.mark.parametrize("sampler", [DDPM(20), DDIM(20), DPMSolverPP(20), EDMHeun(20)])
def test_an_exact_measurement_is_met(sampler):
    found = drawn([DDNM()], sampler)
    torch.testing.assert_close(found.x[:, 1], torch.full((6,), 0.7, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    assert found.evaluations == drawn([], sampler).evaluations


def test_it_is_noiseless_dds_to_the_end():
    for keep_noise in (False, True):
        ours, theirs = DDNM(keep_noise=keep_noise), DDS(steps=5, keep_noise=keep_noise)
        torch.testing.assert_close(drawn([ours]).x, drawn([theirs]).x, rtol=1e-9, atol=1e-9)


def test_noise_is_not_taken_into_the_samples():
    found = drawn([DDNM()], noise=0.5).x
    off = (found[:, 1] - 0.7).abs()
    assert 1e-3 < float(off.mean()) < 1.0
    torch.testing.assert_close(drawn([DDNM()], noise=1e6).x, drawn([]).x, rtol=1e-4, atol=1e-4)


def test_a_sample_is_the_same_in_any_batch():
    together, alone = drawn([DDNM()], noise=0.1), drawn([DDNM()], indices=[4], noise=0.1)
    torch.testing.assert_close(alone.x[0], together.x[4], rtol=1e-12, atol=1e-12)
