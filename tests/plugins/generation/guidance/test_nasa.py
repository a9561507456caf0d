# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""A text to stay away from: what is taken off each cross-attention, of which samples, and for how long."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import GaussianMixture, Guidance, sample
from lightrail_generation.denoisers.diffusers_pipeline import DiffusersPipeline
from lightrail_generation.guidance.nasa import NASA, cross_attentions, steering
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.edm import EDMHeun
from lightrail_generation.time_grids.uniform import Uniform

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


def loaded(folders, name):
    return DiffusersPipeline(str(folders[name]), device="cpu", dtype="float64")


@pytest.fixture(scope="module")
def model(pipeline_folders):
    found = loaded(pipeline_folders, "stable_diffusion")
    # The text hardly matters to random weights.
    with torch.no_grad():
        for module in cross_attentions(found.network):
            module.to_out[0].weight.mul_(30)
    return found


class CFG(Guidance):
    asks = ("uncond",)

    def __init__(self, w):
        self.w = w

    def mix(self, named, moment):
        cond, uncond = named["cond"], named["uncond"]
        return cond.with_data(uncond.data + self.w * (cond.data - uncond.data))


def drawn(model, chain, indices=(0, 1), prompt="a cat", sampler=None):
    sampler = sampler or DDIM(3)
    for each in chain:
        each.prepare(model, sampler)
    condition = model.condition({"prompt": prompt}, indices)
    grid = sampler.grid(model.path, Uniform())
    return sample(model, sampler, grid, indices, seed=2, condition=condition, guidance=chain)


def text(model, prompt):
    return model.condition({"prompt": prompt}, [0])["prompt"]


def attended(module, states, encoded):
    """softmax(Q Kᵀ/√d) V, before the projection that leaves."""
    q, k, v = (
        layer(each).unflatten(-1, (module.heads, -1)).transpose(1, 2)
        for layer, each in ((module.to_q, states), (module.to_k, encoded), (module.to_v, encoded))
    )
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def test_the_unwanted_attention_is_taken_off_before_the_projection(model):
    module = cross_attentions(model.network)[0]
    states = torch.randn(2, 5, module.to_q.in_features).double()
    wanted_text, unwanted, nothing = text(model, "a cat").expand(2, -1, -1), text(model, "a dog"), text(model, "")
    with torch.no_grad():
        positive, negative = attended(module, states, wanted_text), attended(module, states, unwanted.expand(2, -1, -1))
        torch.testing.assert_close(module(states, encoder_hidden_states=wanted_text), module.to_out[0](positive))
        with steering(model.network, unwanted, nothing, 0.4):
            found = module(states, encoder_hidden_states=wanted_text)
        projection = module.to_out[0]
        torch.testing.assert_close(found, F.linear(positive - 0.4 * negative, projection.weight, projection.bias))
    assert negative.abs().max() > 1e-2


def test_it_is_linear_in_alpha_and_nothing_at_zero(model):
    module = cross_attentions(model.network)[-1]
    states = torch.randn(2, 5, module.to_q.in_features).double()
    encoded, unwanted, nothing = text(model, "a cat").expand(2, -1, -1), text(model, "a dog"), text(model, "")

    def at(alpha):
        with torch.no_grad(), steering(model.network, unwanted, nothing, alpha):
            return module(states, encoder_hidden_states=encoded)

    torch.testing.assert_close(at(0.4) - at(0.0), 2 * (at(0.2) - at(0.0)), rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(at(0.0), module(states, encoder_hidden_states=encoded))


def test_alpha_zero_is_the_run_alone_and_no_evaluation_is_added(model):
    plain = drawn(model, [])
    off, on = drawn(model, [NASA("a dog", alpha=0.0)]), drawn(model, [NASA("a dog", alpha=0.3)])
    assert torch.equal(off.x, plain.x)
    assert on.evaluations == plain.evaluations == 3
    assert (on.x - plain.x).abs().max() > 1e-4
    assert (on.x - drawn(model, [NASA("a fish", alpha=0.3)]).x).abs().max() > 1e-6


def test_what_is_told_nothing_is_left_as_it_is(model):
    x, level = torch.randn(2, *model.shape).double(), model.path.level(500.0)
    told, unwanted, nothing = model.condition({"prompt": "a cat"}, [0, 1]), text(model, "a dog"), text(model, "")
    untold = model.unconditional(told)
    with torch.no_grad():
        apart = [model.predict(x, level, each).data for each in (told, untold)]
        with steering(model.network, unwanted, nothing, 0.3):
            together = [each.data for each in model.predict_each(x, level, [told, untold])]
            alone = model.predict(x, level, told).data
    torch.testing.assert_close(together[1], apart[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(together[0], alone, rtol=1e-9, atol=1e-9)
    assert (together[0] - apart[0]).abs().max() > 1e-4


@pytest.mark.parametrize("sampler", [DPMSolverPP(3), EDMHeun(3)], ids=lambda each: type(each).__name__)
def test_it_works_with_other_guidance_and_samplers_and_apart_for_each_sample(model, sampler):
    chain = [NASA("a dog", alpha=0.3), CFG(2.0)]
    together = drawn(model, chain, (0, 1, 2), ["a cat", "a tree"], sampler)
    alone = drawn(model, chain, (1,), ["a cat", "a tree"], sampler)
    torch.testing.assert_close(alone.x[0], together.x[1], rtol=1e-8, atol=1e-8)
    assert together.evaluations == 2 * drawn(model, [], (0,), "a cat", sampler).evaluations


def test_afterwards_the_network_is_what_it_was_whatever_happened(model):
    class Fails(Guidance):
        def after_step(self, state, moment):
            raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        drawn(model, [NASA("a dog"), Fails()])
    for module in cross_attentions(model.network):
        assert not module._forward_pre_hooks
        assert not module.to_out[0]._forward_pre_hooks


def test_it_works_with_the_larger_pipeline(pipeline_folders):
    model = loaded(pipeline_folders, "stable_diffusion_xl")
    found = drawn(model, [NASA("a dog", alpha=0.5)])
    assert found.x.isfinite().all()
    assert (found.x - drawn(model, []).x).abs().max() > 1e-12


# --- What is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddpm", "dit", "stable_diffusion_3"])
def test_pipelines_without_attention_to_a_text_are_refused(pipeline_folders, name):
    with pytest.raises(CompositionError) as caught:
        NASA("a dog").prepare(loaded(pipeline_folders, name), DDIM(3))
    assert "nasa" in caught.value.found


def test_a_model_without_texts_is_refused():
    with pytest.raises(CompositionError, match="reads no text"):
        NASA("a dog").prepare(GaussianMixture(), DDIM(3))


def test_a_run_without_a_text_is_refused(model):
    sampler = DDIM(3)
    with pytest.raises(CompositionError, match="no text to steer towards"):
        sample(model, sampler, sampler.grid(model.path, Uniform()), [0], guidance=[NASA("a dog")])


@pytest.mark.parametrize("options", [{}, {"prompt": 3}, {"prompt": "a dog", "alpha": -0.1}], ids=str)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigurationError):
        NASA(**options)
