# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""Autoguidance: no-ops, by hand, a weaker model on another path or from a run, and what does not fit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import GaussianMixture, Generated, KarrasVE, LinearFlow, LinearVP, sample
from lightrail_generation.guidance.autoguidance import Autoguidance, on_path
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.edm import EDMHeun
from lightrail_generation.samplers.flow import FlowHeun
from lightrail_generation.samplers.unipc import UniPC
from lightrail_generation.time_grids.uniform import Uniform

WIDER = [0.5, 0.4, 0.7]
LABELS = {"label": torch.tensor([0, 1, 2, 1])}


class Counted(GaussianMixture):
    rows = 0

    def output(self, x, t, condition):
        self.rows += len(x)
        return super().output(x, t, condition)


MIXTURE = GaussianMixture()


def drawn(sampler, guidance, model=MIXTURE, labels=LABELS, indices=range(4)):
    for each in guidance:
        each.prepare(model, sampler)
    grid = sampler.grid(model.path, Uniform())
    return sample(model, sampler, grid, indices, seed=1, condition=labels, guidance=guidance)


def test_by_hand():
    weak, sampler, w = GaussianMixture(variances=WIDER), DDIM(4), 2.5
    grid = sampler.grid(MIXTURE.path, Uniform())
    found = drawn(sampler, [Autoguidance(weak=weak, scale=w)])
    x = found.start
    for here, there in zip(grid.levels, grid.levels[1:], strict=False):
        good, bad = (each.predict(x, here, LABELS).data for each in (MIXTURE, weak))
        data = bad + w * (good - bad)
        x = there.alpha * data + there.sigma * (x - here.alpha * data) / here.sigma
    torch.testing.assert_close(found.x, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sampler", [DDIM(6), DPMSolverPP(6), UniPC(6), EDMHeun(6)])
def test_the_model_itself_as_the_weaker_one_changes_nothing(sampler):
    plain, guided = drawn(sampler, []), drawn(sampler, [Autoguidance(weak=GaussianMixture(), scale=3.0)])
    torch.testing.assert_close(guided.x, plain.x, rtol=1e-10, atol=1e-10)
    assert guided.evaluations == 2 * plain.evaluations


@pytest.mark.parametrize("sampler", [DDIM(6), DPMSolverPP(6)])
def test_scale_one_is_unguided_and_asks_nothing_more(sampler):
    weak = Counted(variances=WIDER)
    plain, guided = drawn(sampler, []), drawn(sampler, [Autoguidance(weak=weak, scale=1.0)])
    torch.testing.assert_close(guided.x, plain.x, rtol=1e-12, atol=1e-12)
    assert (guided.evaluations, weak.rows) == (plain.evaluations, 0)


def test_scale_zero_is_the_weaker_model():
    weak = GaussianMixture(variances=WIDER)
    guided = drawn(DDIM(6), [Autoguidance(weak=weak, scale=0.0)])
    torch.testing.assert_close(guided.x, drawn(DDIM(6), [], weak).x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sampler", [DDIM(6), EDMHeun(6)])
def test_each_evaluation_asks_the_weaker_model_once(sampler):
    weak, model = Counted(variances=WIDER), Counted()
    found = drawn(sampler, [Autoguidance(weak=weak)], model)
    assert weak.rows == model.rows == 4 * found.evaluations // 2


def test_samples_are_sharper_than_the_model():
    # Against one that blurs the components, guidance gathers samples at the means.
    labels = {"label": torch.zeros(64, dtype=torch.long)}
    spread = {}
    for w in (1.0, 2.0):
        guidance = Autoguidance(weak=GaussianMixture(variances=WIDER), scale=w)
        spread[w] = float(drawn(DDIM(20), [guidance], labels=labels, indices=range(64)).x.std(0).mean())
    assert spread[2.0] < 0.8 * spread[1.0]


@pytest.mark.parametrize("path", [KarrasVE(0.002, 200.0), "flow", "cosine"])
def test_a_weaker_model_of_another_path_is_asked_at_the_same_noise(path):
    same = Autoguidance(weak=GaussianMixture(variances=WIDER))
    other = Autoguidance(weak=GaussianMixture(variances=WIDER, path=path))
    sampler = DDIM(6)
    torch.testing.assert_close(drawn(sampler, [other]).x, drawn(sampler, [same]).x, rtol=1e-6, atol=1e-6)


def test_states_on_another_path():
    level, x = LinearVP().level(0.5), torch.ones(2, 2, dtype=torch.float64)
    moved, there = on_path(KarrasVE(), x, level)
    assert there.rho == pytest.approx(level.rho)
    torch.testing.assert_close(moved, x / level.alpha)
    several = LinearVP().levels(torch.tensor([0.5, 0.7]), 2)
    moved, there = on_path(KarrasVE(), x, several)
    torch.testing.assert_close(there.sigma, several.rho)
    torch.testing.assert_close(moved, x / several.alpha)
    assert on_path(LinearVP(), x, level)[0] is x


def test_beyond_the_ends_of_another_path_its_ends_are_asked():
    path, x = KarrasVE(0.1, 10.0), torch.ones(1, 2, dtype=torch.float64)
    noise, data = (on_path(path, x, LinearFlow().level(t)) for t in (1.0, 0.001))
    assert (noise[1].sigma, data[1].sigma) == (pytest.approx(10.0), pytest.approx(0.1))
    # All noise, of norm 1, comes to noise of norm 10; data stay data.
    torch.testing.assert_close(noise[0], x * 10, rtol=0.01, atol=0)
    torch.testing.assert_close(data[0], x, rtol=0.01, atol=0)
    each = on_path(path, x.repeat(2, 1), LinearFlow().levels(torch.tensor([1.0, 0.001]), 2))
    torch.testing.assert_close(each[0], torch.cat([noise[0], data[0]]))


def test_a_flow_from_pure_noise():
    model, weak = GaussianMixture(path="flow", form="flow"), GaussianMixture(variances=WIDER)
    found = drawn(FlowHeun(6), [Autoguidance(weak=weak)], model).x
    same = drawn(FlowHeun(6), [Autoguidance(weak=GaussianMixture(variances=WIDER, path="flow"))], model).x
    assert bool(found.isfinite().all())
    # At t = 1 a flow holds no data at all, and the path of the other model still some.
    torch.testing.assert_close(found, same, rtol=0, atol=0.02)


def test_the_weaker_model_may_be_of_another_precision():
    model, weak = GaussianMixture(dtype="float32"), GaussianMixture(variances=WIDER, dtype="bfloat16")
    found = drawn(DDIM(6), [Autoguidance(weak=weak)], model).x
    assert found.dtype == torch.float32
    assert bool(found.isfinite().all())


def test_alone_and_beside_others():
    guidance = Autoguidance(weak=GaussianMixture(variances=WIDER))
    together = drawn(DPMSolverPP(6), [guidance])
    alone = drawn(DPMSolverPP(6), [guidance], labels={"label": torch.tensor([2])}, indices=[2])
    torch.testing.assert_close(alone.x[0], together.x[2], rtol=1e-12, atol=1e-12)


def test_outside_its_interval_it_asks_nothing():
    sampler = DDIM(8)
    weak = Counted(variances=WIDER)
    found = drawn(sampler, [Autoguidance(weak=weak, rho_high=1.0)])
    inside = sum(level.rho <= 1.0 for level in sampler.grid(MIXTURE.path, Uniform()).levels[:-1])
    assert 0 < inside < 8
    assert found.evaluations == 8 + inside
    assert weak.rows == 4 * inside


def test_the_weaker_model_by_name_or_factory():
    for weak in ("lightrail.generation.GaussianMixture", GaussianMixture, GaussianMixture()):
        assert isinstance(Autoguidance(weak=weak).weak, GaussianMixture)


def test_the_weaker_model_of_a_run():
    weak, seen = GaussianMixture(variances=WIDER), []
    weak.attach = lambda data, folder: seen.append((data, folder))
    run = SimpleNamespace(task=SimpleNamespace(denoiser=lambda: weak), data="data", folder="folder", checkpoint="c")
    names = []

    def load_run(name):
        names.append(name)
        return run

    assert Autoguidance(run="runs/early", load_run=load_run).weak is weak
    assert (names, seen) == (["runs/early"], [("data", "folder")])


def test_it_measures_saturation():
    x = torch.tensor([[3.0, 4.0]])
    assert Autoguidance(weak=GaussianMixture).measure(Generated(x, x))["saturation"] == pytest.approx(12.5**0.5)


class OtherUnits(GaussianMixture):
    def decode(self, x):
        return 2 * x


@pytest.mark.parametrize(
    "weak",
    [
        GaussianMixture(means=[[0.0]], weights=[1.0], variances=[1.0]),
        GaussianMixture(means=[[0.0, 0.0]], weights=[1.0], variances=[1.0]),
        OtherUnits(),
    ],
)
def test_models_that_do_not_fit(weak):
    with pytest.raises(CompositionError, match="not like those of the model") as error:
        Autoguidance(weak=weak).prepare(MIXTURE, DDIM(4))
    assert error.value.found
    assert error.value.remedy


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "no weaker model"),
        ({"run": "latest", "weak": GaussianMixture()}, "not clear"),
        ({"weak": 3}, "not one that can be asked"),
        ({"weak": dict}, "not one that can be asked"),
        ({"weak": GaussianMixture(), "scale": -1.0}, "scale"),
        ({"weak": GaussianMixture(), "rho_low": 2.0, "rho_high": 1.0}, "no level"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ConfigurationError, match=words):
        Autoguidance(**options)
