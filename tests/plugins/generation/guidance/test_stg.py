# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""Skip guidance: what is skipped, when, and what is made of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import Denoiser, GaussianMixture, Guidance, LinearVP, sample
from lightrail_generation.guidance.stg import STG, middle_block, skipping
from lightrail_generation.models.dit import DiT
from lightrail_generation.models.point_mlp import PointMLP
from lightrail_generation.models.unet import UNet
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.edm import EDMHeun
from lightrail_generation.samplers.unipc import UniPC
from lightrail_generation.time_grids.uniform import Uniform


def moved(model):
    """Off its initialisation, where a network of diffusion is 0."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.double().eval().requires_grad_(False)


class OfNetwork(Denoiser):
    """A network of images with three classes and none, that counts how often it is called."""

    path = LinearVP()
    classes = 3

    def __init__(self, network, form="velocity", shape=(1, 8, 8)):
        self.network, self.form, self.shape, self.dtype = network, form, shape, torch.float64
        self.calls = []

    def output(self, x, t, condition):
        self.calls.append(len(x))
        label = torch.full((len(x),), 3) if condition is None else condition["label"]
        return self.network(x, t, label)

    def unconditional(self, condition):
        return None if condition is None else {"label": torch.full_like(condition["label"], 3)}


class CFG(Guidance):
    asks = ("uncond",)

    def __init__(self, w):
        self.w = w

    def mix(self, named, moment):
        cond, uncond = named["cond"], named["uncond"]
        return cond.with_data(uncond.data + self.w * (cond.data - uncond.data))


@pytest.fixture(scope="module")
def dit():
    torch.manual_seed(0)
    return OfNetwork(moved(DiT(1, 8, 3, width=16, depth=3, heads=2)))


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return OfNetwork(moved(UNet(1, 8, 3, width=8)))


LABELS = {"label": torch.tensor([0, 1, 2])}


def drawn(model, chain, sampler=None, indices=(0, 1, 2), condition=LABELS, steps=4):
    sampler = sampler or DDIM(steps)
    for each in chain:
        each.prepare(model, sampler)
    grid = sampler.grid(model.path, Uniform())
    return sample(model, sampler, grid, indices, seed=1, condition=condition, guidance=chain)


def parts(model, layers, mode="residual", t=0.4):
    """x, c, c without the layers, u, as data."""
    x, level = torch.randn(3, *model.shape, dtype=torch.float64), model.path.level(t)
    cond, uncond = model.predict(x, level, LABELS), model.predict(x, level, model.unconditional(LABELS))
    with skipping({name: model.network.get_submodule(name) for name in layers}, mode):
        skip = model.predict(x, level, LABELS)
    return x, level, cond, skip, uncond


def one_evaluation(model, chain, x, level, first=None):
    """What the chain makes of one evaluation."""
    from lightrail.generation import Evaluator, Grid, Noise

    grid = Grid(model.path, (first or level, model.path.level(0.0)))
    noise = Noise(0, range(len(x)), model.shape, torch.float64)
    return Evaluator(model, LABELS, chain, grid, noise)(x, level)


# --- What is skipped ----------------------------------------------------------------------------------------------


def test_a_block_that_is_skipped_is_the_identity_and_the_rest_of_the_network_runs(dit):
    network = dit.network
    x, t, label = torch.randn(2, 1, 8, 8).double(), torch.tensor([0.2, 0.9]).double(), torch.tensor([0, 2])
    with skipping({"blocks.1": network.blocks[1]}, "residual"):
        found = network(x, t, label)
    kept = nn.ModuleList([network.blocks[0], network.blocks[2]])
    whole, network.blocks = network.blocks, kept
    try:
        wanted = network(x, t, label)
    finally:
        network.blocks = whole
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert (found - network(x, t, label)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_attention_that_is_skipped_gives_its_values(name, request, monkeypatch):
    model = request.getfixturevalue(name)
    x, t, label = torch.randn(2, 1, 8, 8).double(), torch.tensor([0.2, 0.9]).double(), torch.tensor([0, 2])
    layer = middle_block(model.network)
    with skipping({layer: model.network.get_submodule(layer)}, "attention"):
        found = model.network(x, t, label)
    block, original, seen = model.network.get_submodule(layer), torch.nn.functional.scaled_dot_product_attention, []
    block.register_forward_pre_hook(lambda *_: seen.append(1))
    block.register_forward_hook(lambda *_: seen.clear())
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v: v if seen else original(q, k, v)
    )
    torch.testing.assert_close(found, model.network(x, t, label), rtol=1e-12, atol=1e-12)
    block._forward_pre_hooks.clear()
    block._forward_hooks.clear()
    assert (found - model.network(x, t, label)).abs().max() > 1e-4


def test_of_few_tokens_attention_to_themselves_is_no_change_where_there_is_one_token():
    model = OfNetwork(moved(DiT(1, 8, 3, patch=8, width=16, depth=2, heads=2)))
    _, _, cond, skip, _ = parts(model, ["blocks.1"], "attention")
    torch.testing.assert_close(cond.data, skip.data, rtol=1e-13, atol=1e-13)


def test_the_middle_block_is_taken_as_the_network_names_it(unet, dit):
    assert unet.network.blocks == ("down.0.blocks.0", "down.1.blocks.0", "middle", "up.0.blocks.0", "up.1.blocks.0")
    names = {name for name, _ in unet.network.named_modules()}
    assert set(unet.network.blocks) <= names
    assert middle_block(unet.network) == "middle"
    assert middle_block(dit.network) == "blocks.1"
    assert middle_block(PointMLP(2, 3, depth=4)) == "blocks.2"
    with pytest.raises(CompositionError) as caught:
        middle_block(nn.Sequential(nn.Linear(2, 2)))
    assert "layers" in caught.value.remedy


def test_a_pattern_stands_for_parts_of_names(dit):
    stg = STG(layers="blocks.*")
    assert list(stg._chosen(dit)) == ["blocks.0", "blocks.1", "blocks.2"]
    assert list(STG(layers=["blocks.0", "blocks.[12]"])._chosen(dit)) == ["blocks.0", "blocks.1", "blocks.2"]


def test_afterwards_the_network_is_what_it_was_whatever_happened(dit):
    block = dit.network.blocks[1]
    for mode in ("residual", "attention"):
        with pytest.raises(RuntimeError, match="out of"), skipping({"blocks.1": block}, mode):
            raise RuntimeError("out of memory")
        assert not block._forward_hooks
        assert not block._forward_pre_hooks
        handle = block.mlp.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("within")))
        with pytest.raises(RuntimeError, match="within"):
            drawn(dit, [STG(mode=mode)])
        handle.remove()
        assert not block._forward_hooks
        x = torch.randn(1, 1, 8, 8).double()
        plain = dit.network(x, torch.tensor([0.5]).double())
        assert (plain - dit.network(x, torch.tensor([0.5]).double())).abs().max() == 0


def test_only_the_third_call_skips(dit):
    seen = []
    handle = dit.network.blocks[1].register_forward_hook(lambda module, *_: seen.append(len(module._forward_hooks)))
    dit.calls.clear()
    drawn(dit, [STG(scale=1.0), CFG(2.0)], DDIM(2))
    handle.remove()
    assert dit.calls == [6, 3, 6, 3]  # with and without label in one call, then without the layer
    assert seen == [1, 2, 1, 2]


# --- What is made of it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["residual", "attention"])
def test_alone_it_is_c_plus_k_times_the_difference(dit, mode):
    x, level, cond, skip, _ = parts(dit, ["blocks.1"], mode)
    found = one_evaluation(dit, [STG(scale=1.7, mode=mode)], x, level)
    torch.testing.assert_close(found.data, cond.data + 1.7 * (cond.data - skip.data), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found.noise, cond.noise + 1.7 * (cond.noise - skip.noise), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("chain", [[STG(scale=0.8), CFG(3.0)], [CFG(3.0), STG(scale=0.8)]], ids=["before", "behind"])
def test_beside_cfg_both_differences_are_added_in_either_order(dit, chain):
    x, level, cond, skip, uncond = parts(dit, ["blocks.1"])
    found = one_evaluation(dit, chain, x, level)
    wanted = uncond.data + 3.0 * (cond.data - uncond.data) + 0.8 * (cond.data - skip.data)
    torch.testing.assert_close(found.data, wanted, rtol=1e-11, atol=1e-11)


def test_rescaling_brings_the_deviation_of_each_sample_back(dit):
    x, level, c, _, _ = parts(dit, ["blocks.1"])
    found = one_evaluation(dit, [STG(scale=2.0, rescale=1.0)], x, level)
    assert dit.form == "velocity"
    deviation = c.velocity.flatten(1).std(1)
    torch.testing.assert_close(found.velocity.flatten(1).std(1), deviation)
    whole = one_evaluation(dit, [STG(scale=2.0)], x, level).velocity
    found = one_evaluation(dit, [STG(scale=2.0, rescale=0.7)], x, level).velocity
    factor = 0.7 * deviation / whole.flatten(1).std(1) + 0.3
    torch.testing.assert_close(found, whole * factor[:, None, None, None])


def test_without_a_scale_or_a_change_it_is_the_run_alone(dit):
    plain = drawn(dit, [])
    off = drawn(dit, [STG(scale=0.0)])
    assert torch.equal(off.x, plain.x)
    assert off.evaluations == plain.evaluations
    # One token attends to itself already.
    single = OfNetwork(moved(DiT(1, 8, 3, patch=8, width=16, depth=2, heads=2)))
    found = drawn(single, [STG(scale=2.0, mode="attention")])
    torch.testing.assert_close(found.x, drawn(single, []).x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "sampler", [DDIM(4), DPMSolverPP(4), UniPC(4), EDMHeun(4)], ids=lambda each: type(each).__name__
)
def test_one_evaluation_is_added_with_any_sampler(dit, sampler):
    plain, found = drawn(dit, [], sampler), drawn(dit, [STG(scale=0.5)], sampler)
    assert found.evaluations == 2 * plain.evaluations
    assert drawn(dit, [STG(scale=0.5), CFG(1.5)], sampler).evaluations == 3 * plain.evaluations
    assert found.x.isfinite().all()
    assert (found.x - plain.x).abs().max() > 1e-4


def test_it_acts_within_its_levels_only(dit):
    sampler = DDIM(8)
    grid = sampler.grid(dit.path, Uniform())
    found = drawn(dit, [STG(rho_low=grid[5].rho, rho_high=grid[2].rho)], sampler)
    assert found.evaluations == 8 + 3  # at the levels 2, 3 and 4
    grid = sampler.grid(dit.path, Uniform(end="denoise"))
    found = sample(dit, sampler, grid, range(3), seed=1, condition=LABELS, guidance=[STG()])
    assert found.evaluations == 18  # the last evaluation too


def test_levels_of_each_sample_are_their_own(dit):
    times = torch.tensor([0.9, 0.4, 0.1])
    level = dit.path.levels(times, 4)
    x = torch.randn(3, 1, 8, 8).double()
    options = {"scale": 2.0, "rescale": 0.5, "rho_high": dit.path.level(0.5).rho}
    found = one_evaluation(dit, [STG(**options)], x, level, dit.path.level(0.9))
    plain = dit.predict(x, level, LABELS)
    assert torch.equal(found.data[0], plain.data[0])
    for row in (1, 2):
        alone = one_evaluation(dit, [STG(**options)], x, dit.path.level(float(times[row])))
        torch.testing.assert_close(found.data[row], alone.data[row], rtol=1e-6, atol=1e-6)


def test_a_sample_does_not_depend_on_its_batch(unet):
    chain = [STG(scale=1.0, rescale=0.7), CFG(2.0)]
    together = drawn(unet, chain)
    alone = drawn(unet, chain, indices=[1], condition={"label": torch.tensor([1])})
    torch.testing.assert_close(alone.x[0], together.x[1], rtol=1e-10, atol=1e-10)


def test_a_gradient_goes_through_both_predictions(dit):
    class Probe(Guidance):
        needs_gradient = True

        def after_step(self, state, moment):
            _, found = moment.gradient(lambda prediction: prediction.data.square().flatten(1).sum(1))
            gradients.append((moment.x, moment.level, found))
            return state

    gradients = []
    drawn(dit, [STG(scale=1.5), Probe()], DDIM(2))
    x, level, found = gradients[-1]
    leaf = x.clone().requires_grad_()
    cond = dit.predict(leaf, level, LABELS).data
    with skipping({"blocks.1": dit.network.blocks[1]}, "residual"):
        skip = dit.predict(leaf, level, LABELS).data
    (wanted,) = torch.autograd.grad((cond + 1.5 * (cond - skip)).square().sum(), leaf)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


# --- What is refused ----------------------------------------------------------------------------------------------


def test_a_model_without_a_network_is_refused():
    with pytest.raises(CompositionError, match="no layers"):
        STG().prepare(GaussianMixture(), DDIM(4))


def test_a_name_that_no_module_has_is_refused(dit):
    with pytest.raises(ConfigurationError) as caught:
        STG(layers="block.1").prepare(dit, DDIM(4))
    assert "blocks.1" in str(caught.value)


def test_a_layer_that_gives_another_shape_is_refused(unet):
    with pytest.raises(CompositionError) as caught:
        drawn(unet, [STG(layers="up.0.blocks.0")])
    assert "up.0.blocks.0" in caught.value.found
    assert not unet.network.get_submodule("up.0.blocks.0")._forward_hooks


def test_layers_without_attention_are_refused(dit):
    with pytest.raises(CompositionError, match="no self-attention"):
        drawn(dit, [STG(layers="blocks.1.mlp", mode="attention")])


@pytest.mark.parametrize(
    "options", [{"scale": -1}, {"mode": "skip"}, {"rescale": 1.5}, {"rho_low": -0.1}, {"rho_high": 0.0}], ids=str
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigurationError) as caught:
        STG(**options)
    assert next(iter(options)) in caught.value.found


# --- Pipelines of diffusers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddpm", "stable_diffusion", "stable_diffusion_xl", "dit", "stable_diffusion_3"])
@pytest.mark.parametrize("mode", ["residual", "attention"])
def test_networks_of_diffusers_name_their_blocks(pipeline_folders, name, mode):
    from lightrail_generation.denoisers.diffusers_pipeline import DiffusersPipeline

    model = DiffusersPipeline(str(pipeline_folders[name]), device="cpu", dtype="float64")
    request = {"label": 0} if model.classes else {"prompt": "a cat"} if model.text is not None else {}
    condition = model.condition(request, [0, 1])
    layer = middle_block(model.network)
    assert layer == ("transformer_blocks.0" if name in ("dit", "stable_diffusion_3") else "mid_block")
    x, level = torch.randn(2, *model.shape).double(), model.path.level(model.path.t_max / 2)
    with torch.no_grad():
        plain = model.predict(x, level, condition).data
        with skipping({layer: model.network.get_submodule(layer)}, mode):
            skip = model.predict(x, level, condition).data
        assert torch.equal(model.predict(x, level, condition).data, plain)
    assert skip.isfinite().all()
    assert (skip - plain).abs().max() > 1e-9


def test_attention_to_a_text_stays(pipeline_folders):
    from lightrail_generation.denoisers.diffusers_pipeline import DiffusersPipeline

    # As many pixels as the text has tokens: the shapes do not tell the two attentions apart.
    model = DiffusersPipeline(str(pipeline_folders["stable_diffusion"]), device="cpu", dtype="float64")
    block = model.network.mid_block.attentions[0].transformer_blocks[0]
    states, text = torch.randn(1, 8, block.norm1.normalized_shape[0]).double(), torch.randn(1, 8, 16).double()
    values = {}
    handles = [
        block.attn1.to_out[0].register_forward_pre_hook(lambda _, args: values.update(own=args[0])),
        block.attn1.to_v.register_forward_hook(lambda _, args, output: values.update(v=output)),
        block.attn2.to_out[0].register_forward_pre_hook(lambda _, args: values.update(text=args[0])),
        block.attn2.to_v.register_forward_hook(lambda _, args, output: values.update(text_v=output)),
    ]
    with torch.no_grad(), skipping({"block": block}, "attention"):
        block(states, encoder_hidden_states=text)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(values["own"], values["v"])
    assert (values["text"] - values["text_v"]).abs().max() > 1e-3
