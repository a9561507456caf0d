# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
"""The adapter of diffusers' pipelines: what it reads of a folder, what the network is told, and what it refuses."""

from __future__ import annotations

import importlib
import inspect
import json
import shutil

import pytest
import torch

from lightrail.errors import CheckpointError, CompositionError, ConfigurationError
from lightrail.generation import LinearFlow, Noise, TableVP, sample
from lightrail.testing.denoiser import DenoiserSuite
from lightrail_generation.denoisers.diffusers_pipeline import DiffusersPipeline
from lightrail_generation.denoisers.diffusers_scheduler import SCHEDULERS, noise_path, output_form
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.time_grids.training_steps import TrainingSteps

pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")


def loaded(folder, **options):
    return DiffusersPipeline(path=str(folder), device="cpu", **options)


@pytest.fixture(scope="module")
def ours(pipeline_folders):
    return {name: loaded(folder) for name, folder in pipeline_folders.items()}


@pytest.fixture
def copied(pipeline_folders, tmp_path):
    """A copy of a pipeline's folder, to be spoilt."""

    def copy(name):
        return shutil.copytree(pipeline_folders[name], tmp_path / name)

    return copy


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class TestPlainPixels(DenoiserSuite):
    plugin = DiffusersPipeline

    @pytest.fixture(autouse=True)
    def _folder(self, pipeline_folders):
        self.options = {"path": str(pipeline_folders["ddpm"]), "device": "cpu"}


class TestClassesOfLatents(DenoiserSuite):
    plugin = DiffusersPipeline

    @pytest.fixture(autouse=True)
    def _folder(self, pipeline_folders):
        self.options = {"path": str(pipeline_folders["dit"]), "device": "cpu"}


# --- The noise path and the form of the output --------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if not name.startswith("FlowMatch")])
def test_the_table_is_that_of_the_scheduler(name):
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    scheduler = getattr(diffusers, name)(beta_schedule="scaled_linear")
    assert_same_table(scheduler, name)


def test_the_table_is_exact():
    config = {**diffusers.DDPMScheduler().config, "_class_name": "DDPMScheduler"}
    betas = [1e-4 + i * (0.02 - 1e-4) / 999 for i in range(1000)]
    product = 1.0
    for beta in betas:
        product *= 1 - beta
    assert noise_path(config).level(999.0).alpha ** 2 == pytest.approx(product, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDPMScheduler", {"beta_schedule": "linear"}),
        ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
        ("DDPMScheduler", {"beta_schedule": "sigmoid"}),
        ("HeunDiscreteScheduler", {"beta_schedule": "exp"}),
        ("DDIMScheduler", {"trained_betas": [0.01, 0.02, 0.03], "num_train_timesteps": 3}),
        ("DDIMScheduler", {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}),
    ],
)
def test_other_schedules_are_those_of_the_scheduler(name, options):
    assert_same_table(getattr(diffusers, name)(**options), name)


def assert_same_table(scheduler, name):
    path = noise_path({**scheduler.config, "_class_name": name})
    alphas_cumprod = path.alpha(torch.arange(len(scheduler.alphas_cumprod), dtype=torch.float64)) ** 2
    assert alphas_cumprod.dtype == torch.float64
    torch.testing.assert_close(alphas_cumprod, scheduler.alphas_cumprod.double(), rtol=3e-4, atol=1e-7)


def test_without_terminal_signal_a_little_is_left_for_solvers_to_start_from():
    config = {**diffusers.DDIMScheduler(rescale_betas_zero_snr=True).config, "_class_name": "DDIMScheduler"}
    path = noise_path(config)
    assert path.t_finite == path.t_max == 999.0
    assert path.level(999.0).alpha == pytest.approx(2**-12, rel=1e-8)
    assert path.level(0.0).alpha ** 2 == pytest.approx(1 - 1e-4, rel=1e-12)  # the first entry is kept


def test_a_flow_counts_its_times_in_thousandths(ours):
    denoiser = ours["stable_diffusion_3"]
    assert isinstance(denoiser.path, LinearFlow)
    assert denoiser.form == "flow"
    assert denoiser.path.t_min == pytest.approx(0.003 / 1.002)  # the least time that it was trained at, shifted by 3
    seen = {}
    handle = denoiser.network.time_text_embed.register_forward_pre_hook(lambda _, inputs: seen.update(t=inputs[0]))
    denoiser.predict(torch.zeros(2, *denoiser.shape), denoiser.path.level(0.25))
    handle.remove()
    assert seen["t"].tolist() == [250.0, 250.0]


@pytest.mark.parametrize(
    ("said", "form"),
    [("epsilon", "noise"), ("sample", "data"), ("v_prediction", "velocity"), ("flow_prediction", "flow")],
)
def test_the_output_is_what_the_scheduler_says(said, form):
    assert output_form({"_class_name": "UniPCMultistepScheduler", "prediction_type": said}) == form


@pytest.mark.parametrize("said", ["epsilon", "sample", "v_prediction"])
def test_data_are_those_of_the_scheduler(copied, said):
    folder = copied("ddpm")
    edit(folder / "scheduler/scheduler_config.json", prediction_type=said)
    denoiser, scheduler = loaded(folder), diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(10)
    x = Noise(0, range(2), denoiser.shape).normal(0)
    output = denoiser.network(x, 500).sample
    expected = scheduler.step(output, 500, x).pred_original_sample
    torch.testing.assert_close(denoiser.predict(x, denoiser.path.level(500.0)).data, expected, atol=1e-5, rtol=1e-5)


# --- Conditions ---------------------------------------------------------------------------------------------------


def answer(denoiser, condition, count=2):
    x = Noise(0, range(1), denoiser.shape).normal(0).expand(count, *denoiser.shape)
    return denoiser.predict(x, denoiser.path.level(denoiser.path.t_max / 2), condition).get(denoiser.form)


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3"])
def test_texts_are_gone_through_in_turn(ours, name):
    denoiser = ours[name]
    condition = denoiser.condition({"prompt": ["a cat", "red"]}, [3, 4, 5])
    texts = {text: denoiser.condition({"prompt": text}, [0]) for text in ("red", "a cat")}
    for key, value in condition.items():
        expected = torch.cat([texts[text][key] for text in ("red", "a cat", "red")])
        assert torch.equal(value, expected)
    first, second = answer(denoiser, denoiser.condition({"prompt": ["a cat", "red"]}, [0, 1]))
    assert float((first - second).abs().max()) > 1e-4


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_3"])
def test_no_text_is_the_empty_text(ours, name):
    denoiser = ours[name]
    assert denoiser.condition({"prompt": None}, [0, 1]) is None
    empty = denoiser.condition({"prompt": ""}, [0, 1])
    assert torch.equal(answer(denoiser, None), answer(denoiser, empty))
    said = denoiser.condition({"prompt": "red"}, [0, 1])
    nothing = denoiser.unconditional(said)
    assert all(torch.equal(nothing[key], empty[key]) for key in empty)
    assert nothing.keys() == said.keys()
    assert denoiser.unconditional(None) is None


def test_no_text_is_what_stable_diffusion_xl_takes_for_it(ours):
    # Zeros, not the empty text: force_zeros_for_empty_prompt.
    denoiser = ours["stable_diffusion_xl"]
    nothing = denoiser.unconditional(denoiser.condition({"prompt": "red"}, [0, 1]))
    assert not nothing["prompt"].any()
    assert not nothing["pooled"].any()
    assert denoiser.condition({"prompt": ""}, [0])["prompt"].any()


def test_the_class_that_stands_for_none_is_the_one_beyond_the_last(ours):
    denoiser = ours["dit"]
    assert denoiser.classes == 5
    condition = denoiser.condition({"label": [4, 0]}, [0, 1, 2])
    assert condition["label"].tolist() == [4, 0, 4]
    assert denoiser.unconditional(condition)["label"].tolist() == [5, 5, 5]
    assert torch.equal(answer(denoiser, None), answer(denoiser, {"label": torch.tensor([5, 5])}))


def test_a_network_that_never_saw_no_class_says_so(ours):
    denoiser = ours["ddim_of_classes"]
    condition = denoiser.condition({"label": None}, range(4))
    assert condition["label"].tolist() == [0, 1, 2, 0]
    for ask in (lambda: denoiser.unconditional(condition), lambda: answer(denoiser, None)):
        with pytest.raises(CompositionError, match="no class that stands for none"):
            ask()


def test_without_conditions_there_is_none(ours):
    assert ours["ddpm"].condition({"prompt": None, "label": None}, range(4)) is None
    assert ours["ddpm"].unconditional(None) is None


@pytest.mark.parametrize(
    ("name", "request_", "error", "words"),
    [
        ("ddpm", {"prompt": "a cat"}, CompositionError, "reads no text"),
        ("dit", {"prompt": "a cat"}, CompositionError, "reads no text"),
        ("stable_diffusion", {"label": 1}, CompositionError, "knows no classes"),
        ("dit", {"label": 5}, CompositionError, "no class 5"),
        ("stable_diffusion", {"prompt": 7}, ConfigurationError, "is no text"),
        ("stable_diffusion", {"prompt": []}, ConfigurationError, "is no text"),
        ("stable_diffusion", {"prompt": ["a", 2]}, ConfigurationError, "is no text"),
    ],
)
def test_what_the_pipeline_cannot_be_steered_by_is_refused(ours, name, request_, error, words):
    with pytest.raises(error, match=words):
        ours[name].condition(request_, [0])


def test_conditions_asked_together_are_answered_as_one_by_one(ours):
    denoiser = ours["stable_diffusion_xl"]
    condition = denoiser.condition({"prompt": ["a cat", "red"]}, [0, 1])
    nothing, level = denoiser.unconditional(condition), denoiser.path.level(500.0)
    x = Noise(0, range(2), denoiser.shape).normal(0)
    together = denoiser.predict_each(x, level, [condition, nothing])
    for found, each in zip(together, (condition, nothing), strict=True):
        torch.testing.assert_close(found.noise, denoiser.predict(x, level, each).noise, atol=1e-5, rtol=0)


# --- Images -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_3"])
def test_latents_are_those_of_the_decoder(ours, name):
    denoiser = ours[name]
    config = denoiser.vae.config
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = denoiser.vae.encode(2 * images - 1).latent_dist.mode()
    found = denoiser.encode(images)
    torch.testing.assert_close(found, (expected - (config.shift_factor or 0)) * config.scaling_factor)
    decoded = denoiser.vae.decode(expected).sample / 2 + 0.5
    torch.testing.assert_close(denoiser.decode(found), decoded.clamp(0, 1), atol=1e-5, rtol=0)


def test_latents_with_a_mean_of_their_own(copied):
    folder = copied("stable_diffusion_xl")
    edit(folder / "vae/config.json", latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[2.0] * 4, scaling_factor=0.5)
    denoiser = loaded(folder)
    x = Noise(0, range(2), denoiser.shape).normal(0)
    latents = x * 2.0 / 0.5 + torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
    expected = (denoiser.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(denoiser.decode(x), expected)


def test_a_decoder_that_overflows_in_half_precision_stays_in_single(pipeline_folders, copied):
    assert loaded(pipeline_folders["stable_diffusion"], dtype="float16").vae.dtype == torch.float32
    folder = copied("stable_diffusion")
    edit(folder / "vae/config.json", force_upcast=False)
    assert loaded(folder, dtype="float16").vae.dtype == torch.float16


@pytest.mark.parametrize("name", ["ddpm", "stable_diffusion", "dit", "stable_diffusion_3"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_precisions(pipeline_folders, ours, name, dtype):
    denoiser, single = loaded(pipeline_folders[name], dtype=dtype), ours[name]
    request = {"prompt": "red"} if denoiser.text is not None else {"label": None}
    times = [denoiser.path.t_max * share for share in (0.9, 0.6, 0.2)]
    x = Noise(0, range(2), denoiser.shape, denoiser.dtype).normal(0)
    for level in (denoiser.path.level(t) for t in times):
        found = denoiser.predict(x, level, denoiser.condition(request, [0, 1])).data
        assert found.dtype == getattr(torch, dtype)
        near = single.predict(x.float(), level, single.condition(request, [0, 1])).data
        size = float(near.abs().max())
        close = 0.1 if dtype == "bfloat16" else 1e-5
        torch.testing.assert_close(found.float(), near, atol=close * size, rtol=0)
    images = denoiser.decode(x)
    assert images.dtype == torch.promote_types(denoiser.dtype, torch.float32)
    assert images.isfinite().all()
    assert denoiser.encode(images).dtype == denoiser.dtype


def test_another_size(pipeline_folders, ours):
    denoiser = loaded(pipeline_folders["stable_diffusion_xl"], size=16)
    assert denoiser.shape == (4, 16, 16)
    assert denoiser.decode(torch.zeros(1, 4, 16, 16)).shape == (1, 3, 32, 32)
    seen = {}
    network = denoiser.network
    handle = network.register_forward_pre_hook(lambda *inputs: seen.update(inputs[2]), with_kwargs=True)
    answer(denoiser, None)
    handle.remove()
    assert seen["added_cond_kwargs"]["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 2


def test_evaluations_are_counted_and_samples_do_not_depend_on_their_batch(ours):
    denoiser, sampler = ours["ddpm"], DPMSolverPP(5)
    grid = sampler.grid(denoiser.path, TrainingSteps())
    calls = []
    handle = denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    together = sample(denoiser, sampler, grid, range(3), seed=2)
    handle.remove()
    assert len(calls) == together.evaluations == 5
    alone = sample(denoiser, sampler, grid, [2], seed=2)
    torch.testing.assert_close(alone.x, together.x[2:], atol=1e-5, rtol=0)


def test_a_flow_is_sampled_by_solvers_in_lambda(ours):
    denoiser, sampler = ours["stable_diffusion_3"], DPMSolverPP(40)
    from lightrail_generation.samplers.flow import FlowHeun
    from lightrail_generation.time_grids.uniform_lambda import UniformLambda

    times = UniformLambda(start=0.99, end="minimum")
    x = Noise(0, range(2), denoiser.shape).normal(0)
    heun = FlowHeun(40)
    first, second = (sample(denoiser, s, s.grid(denoiser.path, times), [0, 1], start=x).x for s in (sampler, heun))
    torch.testing.assert_close(first, second, atol=5e-3, rtol=0)
    assert denoiser.sampler_name == "flow_euler"


def test_moved_it_reads_texts_anew(pipeline_folders):
    denoiser = loaded(pipeline_folders["stable_diffusion"])
    denoiser.condition({"prompt": "red"}, [0])
    assert denoiser.encoded
    assert denoiser.to(torch.device("meta")) is denoiser
    assert not denoiser.encoded
    parts = (denoiser.network, denoiser.vae, denoiser.text.text_encoder)
    assert all(parameter.is_meta for part in parts for parameter in part.parameters())
    assert denoiser.device == torch.device("meta")


def test_the_fingerprint_is_that_of_the_weights(pipeline_folders, copied, ours):
    assert loaded(pipeline_folders["ddpm"]).fingerprint() == ours["ddpm"].fingerprint()
    changed = loaded(pipeline_folders["ddpm"])
    next(changed.network.parameters()).view(-1)[0] += 1e-3
    assert changed.fingerprint() != ours["ddpm"].fingerprint()
    assert loaded(pipeline_folders["ddpm"], dtype="bfloat16").fingerprint() != ours["ddpm"].fingerprint()


def test_the_weights_are_not_trained(ours):
    for denoiser in ours.values():
        for part in denoiser.parts.values():
            if isinstance(part, torch.nn.Module):
                assert not part.training
                assert not any(parameter.requires_grad for parameter in part.parameters())


# --- What is refused ----------------------------------------------------------------------------------------------


def test_a_folder_without_a_pipeline_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="names no diffusers pipeline") as error:
        loaded(tmp_path / "absent")
    assert "is no folder" in error.value.found
    with pytest.raises(ConfigurationError, match="names no diffusers pipeline") as error:
        loaded(tmp_path)
    assert "model_index.json" in error.value.found
    assert "save_pretrained" in error.value.allowed


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_an_unreadable_index_is_refused(tmp_path, content):
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model_index\.json cannot be read"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("ddpm", "unet"),
        ("ddpm", "scheduler"),
        ("dit", "transformer"),
        ("dit", "vae"),
        ("stable_diffusion", "text_encoder"),
        ("stable_diffusion", "tokenizer"),
        ("stable_diffusion_3", "text_encoder_2"),
    ],
)
@pytest.mark.parametrize("how", ["removed", "unnamed"])
def test_a_missing_part_is_named(copied, name, part, how):
    folder = copied(name)
    if how == "removed":
        shutil.rmtree(folder / part)
    else:
        edit(folder / "model_index.json", **{part: [None, None]})
    with pytest.raises(CheckpointError, match=f"the pipeline has no {part}\n") as error:
        loaded(folder)
    assert part in error.value.found
    assert part in error.value.remedy


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("ddpm", "unet/diffusion_pytorch_model.safetensors"),
        ("ddpm", "unet/config.json"),
        ("ddpm", "scheduler/scheduler_config.json"),
        ("stable_diffusion", "vae/diffusion_pytorch_model.safetensors"),
        ("stable_diffusion", "text_encoder/model.safetensors"),
        ("stable_diffusion", "tokenizer/tokenizer.json"),
    ],
)
@pytest.mark.parametrize("how", ["removed", "cut short"])
def test_a_part_that_cannot_be_read_is_named(copied, name, file, how):
    folder = copied(name)
    (folder / file).unlink() if how == "removed" else (folder / file).write_bytes(b"{")
    with pytest.raises(CheckpointError, match=f"the pipeline's {file.split('/')[0]} cannot be loaded") as error:
        loaded(folder)
    assert str(folder / file.split("/")[0]) in error.value.found


@pytest.mark.parametrize(("name", "part"), [("ddpm", "unet"), ("stable_diffusion", "text_encoder")])
def test_weights_that_are_left_out_are_not_made_up(copied, name, part):
    from safetensors.torch import load_file, save_file

    folder = copied(name)
    (file,) = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    weights.pop(sorted(weights)[3])
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"the pipeline's {part} cannot be loaded") as error:
        loaded(folder)
    assert "missing" in error.value.found or "meta" in error.value.found


@pytest.mark.parametrize("class_name", ["FluxPipeline", "StableDiffusionInpaintPipeline", ["mine", "Mine"]])
def test_other_pipelines_are_refused_by_name(copied, class_name):
    folder = copied("stable_diffusion")
    edit(folder / "model_index.json", _class_name=class_name)
    with pytest.raises(CheckpointError, match="cannot be sampled from") as error:
        loaded(folder)
    assert "StableDiffusion3Pipeline" in error.value.allowed


def test_code_that_a_folder_brings_along_is_not_run(copied):
    folder = copied("stable_diffusion")
    (folder / "mine.py").write_text("raise SystemExit('run')")
    edit(folder / "model_index.json", text_encoder=["mine", "Mine"])
    with pytest.raises(CheckpointError, match="text_encoder is of a kind that is not installed"):
        loaded(folder)


@pytest.mark.parametrize(
    ("part", "held"), [("unet", ["diffusers", "UNet1DModel"]), ("vae", ["diffusers", "AutoencoderTiny"])]
)
def test_other_networks_are_refused_by_name(copied, part, held):
    folder = copied("stable_diffusion")
    edit(folder / "model_index.json", **{part: held})
    with pytest.raises(CheckpointError, match=f"{part} is one that cannot be asked") as error:
        loaded(folder)
    assert held[1] in error.value.found


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("stable_diffusion", {"in_channels": 9}),
        ("stable_diffusion", {"time_cond_proj_dim": 8}),
        ("stable_diffusion", {"class_embed_type": "timestep"}),
        ("stable_diffusion", {"num_class_embeds": 4}),
        ("ddim_of_classes", {"class_embed_type": "timestep"}),
        ("ddpm", {"time_embedding_type": "fourier"}),
    ],
)
def test_networks_that_are_told_more_are_refused(pipeline_folders, monkeypatch, name, changes):
    from lightrail_generation.denoisers import diffusers_pipeline

    load = diffusers_pipeline.load_parts

    def changed(*arguments):
        parts = load(*arguments)
        next(iter(parts.values())).register_to_config(**changes)
        return parts

    monkeypatch.setattr(diffusers_pipeline, "load_parts", changed)
    with pytest.raises(CheckpointError, match="told more than a state") as error:
        loaded(pipeline_folders[name])
    assert next(iter(changes)) in error.value.found


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EDMEulerScheduler", {}),
        ("LCMScheduler", {}),
        ("ScoreSdeVeScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
        ("DDPMScheduler", {"beta_schedule": "laplace"}),
        ("DDPMScheduler", {"prediction_type": "flux"}),
    ],
)
def test_other_schedulers_are_refused(copied, name, options):
    folder = copied("ddpm")
    shutil.rmtree(folder / "scheduler")
    getattr(diffusers, name)(**options).save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", name])
    with pytest.raises(CheckpointError, match="scheduler of this pipeline cannot be read"):
        loaded(folder)


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"size": 0}, {"device": "nothing"}, {"device": "cuda:77"}])
def test_bad_options_are_refused(pipeline_folders, options):
    with pytest.raises(ConfigurationError):
        DiffusersPipeline(path=str(pipeline_folders["ddpm"]), **options)


def test_a_network_of_no_size_needs_one(copied):
    folder = copied("ddpm")
    edit(folder / "unet/config.json", sample_size=None)
    with pytest.raises(ConfigurationError, match="size of the images") as error:
        loaded(folder)
    assert "denoiser.size" in error.value.remedy
    assert loaded(folder, size=8).shape == (3, 8, 8)


def test_sizes_may_differ(copied):
    folder = copied("ddpm")
    edit(folder / "unet/config.json", sample_size=[8, 16])
    denoiser = loaded(folder)
    grid = DDIM(2).grid(denoiser.path, TrainingSteps())
    assert denoiser.decode(sample(denoiser, DDIM(2), grid, range(2)).x).shape == (2, 3, 8, 16)


@pytest.mark.parametrize("name", ["pipeline", "folder", "scheduler"])
def test_diffusers_is_imported_only_when_a_pipeline_is_read(name):
    module = importlib.import_module(f"lightrail_generation.denoisers.diffusers_{name}")
    outside = [line for line in inspect.getsource(module).splitlines() if line.startswith(("import ", "from "))]
    assert not any(word in line.split()[1] for line in outside for word in ("diffusers.", "transformers"))
    assert "import diffusers" not in outside


def test_paths_are_tables(ours):
    assert all(isinstance(each.path, TableVP) for name, each in ours.items() if name != "stable_diffusion_3")
