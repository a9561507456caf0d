# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalSubscript=false
# pyright: reportCallIssue=false, reportIndexIssue=false
"""CFG: one affine combination in any form, the exact guided flow of two Gaussians, intervals, rescaling, saturation."""

from __future__ import annotations

import math

import pytest
import torch

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import (
    Denoiser,
    GaussianMixture,
    Generated,
    KarrasVE,
    LinearFlow,
    LinearVP,
    Moment,
    Noise,
    Prediction,
    sample,
)
from lightrail_generation.guidance.affine import NoiseInterval, affine
from lightrail_generation.guidance.cfg import CFG, rescaled
from lightrail_generation.guidance.saturation import saturation
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.edm import EDMHeun
from lightrail_generation.samplers.flow import FlowHeun
from lightrail_generation.samplers.unipc import UniPC
from lightrail_generation.time_grids.karras import Karras
from lightrail_generation.time_grids.uniform import Uniform

MIXTURE = GaussianMixture()
LABELS = {"label": torch.tensor([0, 1, 2, 1])}


class Pair(Denoiser):
    """N(1.5, 1) under class 0, N(−1, 4) without one."""

    form = "data"
    shape = (1,)
    dtype = torch.float64
    classes = 1

    def __init__(self, path=None):
        self.path = path or KarrasVE()

    def output(self, x, t, condition):
        level = self.path.levels(t, x.ndim)
        is_class = (condition["label"] == 0)[:, None]
        mean, variance = torch.where(is_class, 1.5, -1.0).double(), torch.where(is_class, 1.0, 4.0).double()
        return mean + level.alpha * variance * (x - level.alpha * mean) / (level.alpha**2 * variance + level.sigma**2)

    def unconditional(self, condition):
        return {"label": torch.full_like(condition["label"], 1)}


def drawn(sampler, guidance, model=MIXTURE, times=None, labels=LABELS, indices=range(4), seed=1):
    grid = sampler.grid(model.path, times or Uniform())
    return sample(model, sampler, grid, indices, seed=seed, condition=labels, guidance=guidance)


def guided_pair(w, mean=0.0, variance=400.0, steps=100):
    """Mean and variance that a deterministic run from N(mean, variance) at σ = 20 ends with: its map is affine."""
    model, sampler = Pair(KarrasVE(0.002, 20.0)), EDMHeun(steps)
    grid = sampler.grid(model.path, Karras())
    start = torch.tensor([[-20.0], [20.0]], dtype=torch.float64)
    nobody = {"label": torch.zeros(2, dtype=torch.long)}
    found = sample(model, sampler, grid, range(2), start=start, condition=nobody, guidance=[CFG(w)])
    a, b = found.x[:, 0].tolist()
    slope = (b - a) / 40
    return (a + b) / 2 + slope * mean, slope**2 * variance, found.evaluations


def test_the_guided_flow_of_two_gaussians_is_not_the_tilted_law():
    # It starts from the tilted law at σ = 20, q_u^{-1} q_c^2 with each at its own noise.
    precision = 2 / (1 + 400) - 1 / (4 + 400)
    mean, variance, evaluations = guided_pair(2.0, (2 * 1.5 / 401 + 1 / 404) / precision, 1 / precision)
    assert mean == pytest.approx(2.456, abs=0.01)
    assert variance == pytest.approx(0.249, abs=0.002)
    assert evaluations == 2 * (2 * 100 - 1)
    # q_u^{1 − w} q_c^w is N(1.857, 0.571).
    assert abs(mean - 1.857) > 0.5


def test_the_guided_flow_of_two_gaussians_by_quadrature():
    # dx/dσ = σ Σ_k c_k (x − m_k)/(v_k + σ²) is linear: its slope integrates to Π (v_k + σ²)^{c_k/2}.
    w, top = 2.0, 20.0
    pairs = ((w, 1.5, 1.0), (1 - w, -1.0, 4.0))

    def factor(sigma):
        return math.prod((v + sigma**2) ** (c / 2) for c, _, v in pairs)

    sigmas = torch.linspace(0, top, 200_001, dtype=torch.float64)
    drift = sum(-c * m * sigmas / (v + sigmas**2) for c, m, v in pairs)
    product = torch.ones_like(sigmas)
    for c, _, v in pairs:
        product = product * (v + sigmas**2) ** (c / 2)
    mean = factor(0.0) * float(torch.trapezoid(-drift / product, sigmas))
    variance = (top * factor(0.0) / factor(top)) ** 2
    found = guided_pair(w)
    assert found[0] == pytest.approx(mean, abs=2e-3)
    assert found[1] == pytest.approx(variance, abs=2e-3)


@pytest.mark.parametrize("form", ["data", "noise", "velocity", "flow", "score"])
def test_the_combination_is_the_same_in_every_form(form):
    level, generator = LinearVP().level(0.4), torch.Generator().manual_seed(0)
    x, c, u = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    cond, uncond = Prediction(x, level, "data", c), Prediction(x, level, "data", u)
    in_form = [Prediction(x, level, form, each.get(form)) for each in (uncond, cond)]
    guided = affine(*in_form, 7.5)
    assert guided.form == form
    torch.testing.assert_close(guided.data, u + 7.5 * (c - u), rtol=1e-11, atol=1e-11)
    one_each = affine(*in_form, torch.full((4, 1), 7.5, dtype=torch.float64))
    torch.testing.assert_close(one_each.data, guided.data, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sampler", [DDIM(6), DPMSolverPP(6), UniPC(6), EDMHeun(6), DDIM(6, eta=1.0)])
def test_scale_one_is_unguided_and_asks_nothing_more(sampler):
    plain, guided = drawn(sampler, []), drawn(sampler, [CFG(1.0)])
    torch.testing.assert_close(guided.x, plain.x, rtol=1e-12, atol=1e-12)
    assert guided.evaluations == plain.evaluations


def test_scale_zero_forgets_the_condition():
    torch.testing.assert_close(drawn(DDIM(6), [CFG(0.0)]).x, drawn(DDIM(6), [], labels=None).x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampler", [DDIM(6), DPMSolverPP(6), UniPC(6), EDMHeun(6)])
def test_two_evaluations_for_each(sampler):
    plain, guided = drawn(sampler, []), drawn(sampler, [CFG(2.0)])
    assert guided.evaluations == 2 * plain.evaluations
    assert not torch.allclose(guided.x, plain.x)


def test_a_flow_model_is_guided_from_pure_noise():
    mixture = GaussianMixture(path="flow", form="flow")
    found = drawn(FlowHeun(8), [CFG(2.0)], mixture)
    assert bool(found.x.isfinite().all())
    velocities = GaussianMixture(path="flow", form="data")
    torch.testing.assert_close(
        drawn(DDIM(8), [CFG(2.0)], mixture).x, drawn(DDIM(8), [CFG(2.0)], velocities).x, rtol=1e-9, atol=1e-9
    )


def test_alone_and_beside_others():
    together = drawn(DPMSolverPP(6), [CFG(3.0, rescale=0.7)])
    alone = drawn(DPMSolverPP(6), [CFG(3.0, rescale=0.7)], labels={"label": torch.tensor([2])}, indices=[2])
    torch.testing.assert_close(alone.x[0], together.x[2], rtol=1e-12, atol=1e-12)


def test_outside_its_interval_it_asks_nothing():
    sampler = DDIM(8)
    grid = sampler.grid(MIXTURE.path, Uniform())
    inside = [0.3 < level.rho <= 2.0 for level in grid.levels[:-1]]
    assert 0 < sum(inside) < 8
    found = drawn(sampler, [CFG(3.0, rho_low=0.3, rho_high=2.0)])
    assert found.evaluations == 8 + sum(inside)
    nowhere = drawn(sampler, [CFG(3.0, rho_low=1e6)])
    torch.testing.assert_close(nowhere.x, drawn(sampler, []).x, rtol=1e-12, atol=1e-12)
    assert nowhere.evaluations == 8


def test_the_interval_is_of_sigma_over_alpha_open_below_and_closed_above():
    interval = NoiseInterval(0.5, 2.0)
    at = {sigma: KarrasVE().level(sigma) for sigma in (0.5, 0.6, 2.0, 2.1)}
    assert [interval.meets(level) for level in at.values()] == [False, True, True, False]
    assert NoiseInterval().meets(LinearFlow().level(1.0))
    several = KarrasVE().levels(torch.tensor([0.5, 0.6, 2.0, 2.1]), 2)
    assert interval.meets(several)
    assert interval.scale(3.0, several)[:, 0].tolist() == [1.0, 3.0, 3.0, 1.0]


def test_samples_at_levels_of_their_own_are_guided_inside_only():
    path, x = MIXTURE.path, torch.ones(2, 2, dtype=torch.float64)
    levels = path.levels(torch.tensor([0.2, 0.9]), 2)
    condition = {"label": torch.tensor([0, 0])}
    cond, uncond = MIXTURE.predict(x, levels, condition), MIXTURE.predict(x, levels, None)
    grid = DDIM(4).grid(path, Uniform())
    moment = Moment(MIXTURE, condition, grid, 0, Noise(0, range(2), (2,), torch.float64), x, levels)
    guidance = CFG(3.0, rho_high=1.0)
    assert guidance.is_active(moment)
    found = guidance.mix({"cond": cond, "uncond": uncond}, moment).data
    torch.testing.assert_close(found[0], 3 * cond.data[0] - 2 * uncond.data[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[1], cond.data[1], rtol=1e-10, atol=1e-10)


def test_rescaling_gives_each_sample_the_deviation_of_the_conditional_prediction():
    generator = torch.Generator().manual_seed(0)
    cond, guided = torch.randn(2, 3, 1, 6, 6, generator=generator, dtype=torch.float64)
    guided = 4 * guided + 1
    whole = rescaled(guided, cond, 1.0)
    torch.testing.assert_close(whole.flatten(1).std(1), cond.flatten(1).std(1))
    torch.testing.assert_close(rescaled(guided, cond, 0.7), 0.7 * whole + 0.3 * guided)
    assert torch.equal(rescaled(guided, cond, 0.0), guided)
    one_number = torch.ones(3, 1)
    assert torch.equal(rescaled(one_number, one_number, 0.7), one_number)


def test_rescaling_acts_on_the_form_that_is_named():
    noisy = GaussianMixture(form="noise")
    own, named = (drawn(DDIM(6), [CFG(4.0, rescale=0.7, rescale_form=form)], noisy).x for form in (None, "noise"))
    torch.testing.assert_close(own, named, rtol=1e-12, atol=1e-12)
    other = drawn(DDIM(6), [CFG(4.0, rescale=0.7, rescale_form="data")], noisy).x
    assert float((own - other).abs().max()) > 1e-3


def test_saturation_rises_with_the_scale():
    images = torch.tensor([0.0, 1.0]).repeat(8).view(1, 1, 4, 4)
    assert saturation(images) == pytest.approx(1.0)
    assert saturation(0.5 + 0.0 * images) == 0.0
    assert saturation(0.5 + 1.4 * (images - 0.5)) == pytest.approx(1.4)
    assert saturation(torch.tensor([[3.0, 4.0]])) == pytest.approx(math.sqrt(12.5))
    found = []
    for w in (1.0, 3.0, 8.0):
        x = drawn(DDIM(20), [CFG(w)]).x
        found.append(CFG().measure(Generated(x, x))["saturation"])
    assert found[0] < found[1] < found[2]


def test_without_a_condition_there_is_nothing_to_compare():
    with pytest.raises(CompositionError, match="condition") as error:
        drawn(DDIM(4), [CFG(2.0)], labels=None)
    assert "generate.label" in error.value.remedy


@pytest.mark.parametrize(
    "options",
    [
        {"scale": -1.0},
        {"scale": math.nan},
        {"scale": math.inf},
        {"rescale": 1.1},
        {"rescale_form": "pixels"},
        {"rho_low": -1.0},
        {"rho_low": 2.0, "rho_high": 2.0},
        {"rho_high": math.nan},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(ConfigurationError):
        CFG(**options)
