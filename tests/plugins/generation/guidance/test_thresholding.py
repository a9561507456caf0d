# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""Thresholding: by hand, in the range, the sampler's own, no-ops, and latents."""

from __future__ import annotations

import math

import pytest
import torch

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import GaussianMixture, Generated, Prediction, sample
from lightrail_generation.guidance.cfg import CFG
from lightrail_generation.guidance.thresholding import Thresholding
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.edm import EDMHeun
from lightrail_generation.samplers.unipc import UniPC
from lightrail_generation.time_grids.uniform import Uniform

MIXTURE = GaussianMixture()
LABELS = {"label": torch.tensor([0, 1, 2, 1])}
LEVEL = MIXTURE.path.level(0.5)


def drawn(sampler, guidance, labels=LABELS, indices=range(4)):
    grid = sampler.grid(MIXTURE.path, Uniform())
    return sample(MIXTURE, sampler, grid, indices, seed=1, condition=labels, guidance=guidance)


def corrected(guidance, data):
    x = torch.zeros_like(data)
    return guidance.correct(Prediction(x, LEVEL, "data", data), None)  # type: ignore[arg-type]


def test_static_by_hand():
    found = corrected(Thresholding("static", limit=2.0), torch.tensor([[-3.0, 0.5, 2.5]]).double())
    assert found.data.tolist() == [[-2.0, 0.5, 2.0]]
    # ε = (x − α D)/σ follows.
    torch.testing.assert_close(found.noise, -LEVEL.alpha * found.data / LEVEL.sigma)


def test_dynamic_by_hand():
    # The median of 1, 2, 4 is 2: clamp to ±2 and divide; the second sample is within ±1 and stays.
    data = torch.tensor([[1.0, -2.0, 4.0], [0.5, -0.2, 0.1]]).double()
    found = corrected(Thresholding(quantile=0.5), data).data
    torch.testing.assert_close(found, torch.tensor([[0.5, -1.0, 1.0], [0.5, -0.2, 0.1]]).double())


def test_another_limit_is_another_unit():
    data = 3 * torch.randn(4, 1, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = corrected(Thresholding(limit=2.5), 2.5 * data).data
    torch.testing.assert_close(found, 2.5 * corrected(Thresholding(), data).data)


@pytest.mark.parametrize("quantile", [0.5, 0.995, 1.0])
def test_it_is_the_samplers_own(quantile):
    for sampler, other in ((DPMSolverPP(8, dynamic_threshold=quantile), DPMSolverPP(8)),):
        wanted, found = drawn(sampler, [CFG(6.0)]), drawn(other, [CFG(6.0), Thresholding(quantile=quantile)])
        torch.testing.assert_close(found.x, wanted.x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("sampler", [DDIM(6), DPMSolverPP(6), UniPC(6), EDMHeun(6)])
def test_samples_end_within_the_limit(sampler, kind):
    found = drawn(sampler, [CFG(6.0), Thresholding(kind, limit=0.7)])
    assert float(drawn(sampler, [CFG(6.0)]).x.abs().max()) > 1.0
    assert float(found.x.abs().max()) <= 0.7 + 1e-12
    assert found.evaluations == 2 * drawn(sampler, []).evaluations


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_limit_that_is_not_reached_changes_nothing(kind):
    for sampler in (DDIM(6), DPMSolverPP(6)):
        found = drawn(sampler, [Thresholding(kind, limit=100.0)])
        torch.testing.assert_close(found.x, drawn(sampler, []).x, rtol=1e-11, atol=1e-11)


def test_alone_and_beside_others():
    guidance = [CFG(6.0), Thresholding(quantile=0.6)]
    together = drawn(DPMSolverPP(6), guidance)
    alone = drawn(DPMSolverPP(6), guidance, {"label": torch.tensor([2])}, [2])
    torch.testing.assert_close(alone.x[0], together.x[2], rtol=1e-12, atol=1e-12)


def test_it_measures_saturation():
    x = torch.tensor([[3.0, 4.0]])
    assert Thresholding().measure(Generated(x, x))["saturation"] == pytest.approx(math.sqrt(12.5))


def test_latents_have_no_range():
    class Latents(GaussianMixture):
        def decode(self, x):
            return x.repeat(1, 4)

    with pytest.raises(CompositionError, match="latents") as error:
        Thresholding().prepare(Latents(), DDIM(4))
    assert "(2,)" in error.value.found
    assert "(8,)" in error.value.found
    Thresholding().prepare(MIXTURE, DDIM(4))


@pytest.mark.parametrize("options", [{"kind": "soft"}, {"quantile": 0.0}, {"quantile": 1.1}, {"limit": 0.0}])
def test_options_out_of_range(options):
    with pytest.raises(ConfigurationError):
        Thresholding(**options)
