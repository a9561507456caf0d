# pyright: reportArgumentType=false
"""The same images as diffusers from the same noise: whole pipelines, then solver by solver on the same times."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from lightrail.generation import Noise, Sampler, TimeGrid, sample
from lightrail_generation.denoisers.diffusers_pipeline import DiffusersPipeline
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.ddpm import DDPM
from lightrail_generation.samplers.deis import DEIS
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.edm import EDMEuler, EDMHeun
from lightrail_generation.samplers.flow import FlowEuler, FlowHeun
from lightrail_generation.samplers.pndm import FPNDM, PLMS
from lightrail_generation.samplers.unipc import UniPC
from lightrail_generation.time_grids.training_steps import TrainingSteps
from lightrail_generation.time_grids.uniform import Uniform

pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

PROMPTS = ["a cat", "red", "a cat"]
STEPS, SEED = 6, 3


@pytest.fixture(scope="module")
def ours(pipeline_folders):
    return {name: DiffusersPipeline(path=str(folder), device="cpu") for name, folder in pipeline_folders.items()}


@pytest.fixture(scope="module")
def theirs(pipeline_folders):
    absent = {"stable_diffusion_3": {"text_encoder_3": None, "tokenizer_3": None}}
    pipelines = {
        name: diffusers.DiffusionPipeline.from_pretrained(folder, **absent.get(name, {}))
        for name, folder in pipeline_folders.items()
    }
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
    return pipelines


def starting_noise(denoiser, count=3):
    return Noise(SEED, range(count), denoiser.shape).normal(-1)


def condition_of(denoiser, count=3):
    request = {"prompt": PROMPTS} if denoiser.text is not None else {"label": None}
    return denoiser.condition(request, range(count))


def drawn(denoiser, sampler, times, start, condition=None):
    grid = sampler.grid(denoiser.path, times)
    found = sample(denoiser, sampler, grid, range(len(start)), seed=SEED, condition=condition, start=start)
    assert found.evaluations == sampler.evaluations(grid)
    return found.x


def assert_images_agree(images, expected):
    inside = ((expected > 0) & (expected < 1)).float().mean()
    assert inside > 0.3, "black and white images cannot tell solvers apart"
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


# --- Whole pipelines ----------------------------------------------------------------------------------------------

CALL = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "pt"}


def flow_times(path, **options):
    """The spacing of ``FlowMatchEulerDiscreteScheduler(shift=3)``, which shifts its last time twice."""
    return Uniform(shift=3.0, stop=3 * path.t_min / (1 + 2 * path.t_min), **options)


@pytest.mark.parametrize(
    ("name", "sampler", "times"),
    [
        ("stable_diffusion", DDIM(STEPS), TrainingSteps("leading", steps_offset=1, end="minimum")),
        ("stable_diffusion_xl", EDMEuler(STEPS), TrainingSteps("leading", steps_offset=1)),
        ("stable_diffusion_3", FlowEuler(STEPS), None),
    ],
)
def test_texts_give_the_images_of_the_pipeline(ours, theirs, name, sampler, times):
    denoiser, x = ours[name], starting_noise(ours[name])
    expected = theirs[name](PROMPTS, latents=x, **CALL).images
    times = times or flow_times(denoiser.path)
    found = denoiser.decode(drawn(denoiser, sampler, times, x, condition_of(denoiser)))
    assert_images_agree(found, expected)
    other = denoiser.condition({"prompt": "another"}, range(3))
    changed = denoiser.decode(drawn(denoiser, sampler, times, x, other))
    assert float((changed - expected).abs().max()) > 1e-3, "the text does not matter"


def test_classes_give_the_images_of_the_pipeline(ours, theirs):
    denoiser = ours["dit"]
    x = torch.randn((2, *denoiser.shape), generator=torch.Generator().manual_seed(5))
    expected = theirs["dit"]([4, 1], generator=torch.Generator().manual_seed(5), **CALL).images
    found = drawn(denoiser, DDIM(STEPS), TrainingSteps("leading"), x, denoiser.condition({"label": [4, 1]}, [0, 1]))
    assert_images_agree(denoiser.decode(found), expected)


def test_pixels_are_those_of_the_pipeline(ours, theirs):
    pipeline = diffusers.DDIMPipeline(theirs["ddpm"].unet, theirs["ddpm"].scheduler)
    pipeline.set_progress_bar_config(disable=True)
    x = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(5))
    settings = {"batch_size": 2, "generator": torch.Generator().manual_seed(5), "num_inference_steps": STEPS}
    expected = torch.from_numpy(pipeline(**settings, output_type="np").images).permute(0, 3, 1, 2)
    found = drawn(ours["ddpm"], DDIM(STEPS), TrainingSteps("leading"), x)
    assert_images_agree(ours["ddpm"].decode(found), expected)


# --- Solver by solver ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    scheduler: str
    options: dict
    sampler: Sampler
    times: TimeGrid = field(default_factory=lambda: TrainingSteps("linspace", drops_last=True))


LEADING, LINSPACE, TRAILING = TrainingSteps("leading"), TrainingSteps("linspace"), TrainingSteps("trailing")
TO_MINIMUM = TrainingSteps("linspace", drops_last=True, end="minimum")


def of_dpm(order, sampler, times=None, **options):
    name, options = "DPMSolverMultistepScheduler", {"solver_order": order, **options}
    return Case(name, options, sampler) if times is None else Case(name, options, sampler, times)


def of_unipc(order, b):
    # Theirs is not finite with bh1 at σ = 0.
    to_zero = b == "bh2"
    options = {"solver_order": order, "solver_type": b, "final_sigmas_type": "zero" if to_zero else "sigma_min"}
    times = TrainingSteps("linspace", drops_last=True, end="zero" if to_zero else "minimum")
    return Case("UniPCMultistepScheduler", options, UniPC(STEPS, order, b=b), times)


def of_deis(order):
    options = {"solver_order": order, "lower_order_final": False}
    return Case("DEISMultistepScheduler", options, DEIS(STEPS, "loglam", order - 1), TO_MINIMUM)


def spaced_by(spacing):
    return {"timestep_spacing": spacing}


PLAIN = {"clip_sample": False}
WHOLE = {"lower_order_final": False}
CASES = {
    "ddim leading": Case("DDIMScheduler", PLAIN, DDIM(STEPS), LEADING),
    "ddim trailing": Case("DDIMScheduler", {**PLAIN, **spaced_by("trailing")}, DDIM(5), TRAILING),
    "ddpm small": Case("DDPMScheduler", PLAIN, DDPM(STEPS), LEADING),
    "ddpm large": Case("DDPMScheduler", {**PLAIN, "variance_type": "fixed_large"}, DDPM(STEPS, "large"), LEADING),
    "dpm++ 1": of_dpm(1, DPMSolverPP(STEPS, 1)),
    "dpm++ 2 midpoint": of_dpm(2, DPMSolverPP(STEPS)),
    "dpm++ 2 whole": of_dpm(2, DPMSolverPP(STEPS, lower_order_final=False), **WHOLE),
    "dpm++ 2 taylor": of_dpm(2, DPMSolverPP(STEPS, solver_type="taylor"), solver_type="heun"),
    "dpm++ 2 sde": of_dpm(2, DPMSolverPP(STEPS, stochastic=True), algorithm_type="sde-dpmsolver++"),
    "dpm++ 2 leading": of_dpm(
        2, DPMSolverPP(STEPS), TrainingSteps("leading", 1, True), **spaced_by("leading"), steps_offset=1
    ),
    "dpm++ 2 karras": of_dpm(2, DPMSolverPP(STEPS), TrainingSteps("karras"), use_karras_sigmas=True),
    "dpm++ 2 lambda": of_dpm(2, DPMSolverPP(STEPS), TrainingSteps("lambda"), use_lu_lambdas=True),
    "dpm++ 3 compat": of_dpm(3, DPMSolverPP(STEPS, 3, third_order="compat")),
    "dpm++ 3 compat whole": of_dpm(3, DPMSolverPP(STEPS, 3, third_order="compat", lower_order_final=False), **WHOLE),
    "unipc 2 bh1": of_unipc(2, "bh1"),
    "unipc 2 bh2": of_unipc(2, "bh2"),
    "unipc 3 bh1": of_unipc(3, "bh1"),
    "unipc 3 bh2": of_unipc(3, "bh2"),
    "deis 1": of_deis(1),
    "deis 2": of_deis(2),
    "deis 3": of_deis(3),
    "plms": Case(
        "PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}, PLMS(STEPS, warmup="heun"), LEADING
    ),
    "pndm": Case("PNDMScheduler", {"set_alpha_to_one": True}, FPNDM(STEPS, whole_times=True), LEADING),
    # In steps of 111, for theirs is not rounded.
    "euler linspace": Case("EulerDiscreteScheduler", {}, EDMEuler(10), LINSPACE),
    "euler trailing": Case("EulerDiscreteScheduler", spaced_by("trailing"), EDMEuler(STEPS), TRAILING),
    "heun linspace": Case("HeunDiscreteScheduler", {}, EDMHeun(10), LINSPACE),
    "heun leading": Case("HeunDiscreteScheduler", spaced_by("leading"), EDMHeun(STEPS), LEADING),
}
# Their states are x/α.
SCALED = ("EulerDiscreteScheduler", "HeunDiscreteScheduler")

PAIRS = [("ddpm", name) for name in CASES]
PAIRS += [("stable_diffusion", name) for name in ("ddim leading", "dpm++ 2 sde", "dpm++ 3 compat", "dpm++ 2 karras")]
PAIRS += [("stable_diffusion", name) for name in ("unipc 3 bh2", "deis 3", "euler trailing", "heun leading")]
PAIRS += [(name, case) for name in ("ddim_of_classes", "dit") for case in ("ddpm small", "dpm++ 2 midpoint")]


def their_scheduler(pipeline, name, options):
    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    known = {key: pipeline.scheduler.config[key] for key in kept}
    return getattr(diffusers, name)(**{**known, **options})


def their_network(name, pipeline, condition):
    """The network as the pipeline itself asks it, with none of our code in between."""
    if name == "ddpm":
        return lambda x, t: pipeline.unet(x, t).sample
    if name == "ddim_of_classes":
        return lambda x, t: pipeline.unet(x, t, class_labels=condition["label"]).sample
    if name == "dit":
        return lambda x, t: pipeline.transformer(x, t.expand(len(x)), condition["label"]).sample[:, :4]
    if name == "stable_diffusion":
        texts = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0]
        return lambda x, t: pipeline.unet(x, t, encoder_hidden_states=texts).sample
    texts, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    return lambda x, t: pipeline.transformer(x, texts, pooled, t.expand(len(x))).sample


@torch.no_grad()
def their_states(scheduler, network, x, steps, scale=1.0):
    scheduler.set_timesteps(steps)
    x = x * scale
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return x


@torch.no_grad()
def their_images(pipeline, x):
    if hasattr(pipeline, "vae"):
        config = pipeline.vae.config
        x = pipeline.vae.decode(x / config.scaling_factor + (config.shift_factor or 0)).sample
    return (x / 2 + 0.5).clamp(0, 1)


def share_noise(monkeypatch, denoiser):
    """Lets diffusers' stochastic solvers draw the numbers that ours draw, step by step."""
    noise = Noise(SEED, range(3), denoiser.shape)
    numbers = (noise.normal(step) for step in range(100))
    for module in ("scheduling_ddpm", "scheduling_dpmsolver_multistep"):
        monkeypatch.setattr(getattr(diffusers.schedulers, module), "randn_tensor", lambda *_, **__: next(numbers))


@pytest.mark.parametrize(("name", "solver"), PAIRS)
def test_solvers_give_the_images_of_diffusers_own(ours, theirs, monkeypatch, name, solver):
    case, denoiser, pipeline = CASES[solver], ours[name], theirs[name]
    x, condition = starting_noise(denoiser), condition_of(denoiser)
    share_noise(monkeypatch, denoiser)
    scheduler = their_scheduler(pipeline, case.scheduler, case.options)
    first = case.sampler.grid(denoiser.path, case.times)[0]
    scale = 1 / first.alpha if case.scheduler in SCALED else 1.0
    network = their_network(name, pipeline, condition)
    expected = their_states(scheduler, network, x, case.sampler.steps, scale)
    found = drawn(denoiser, case.sampler, case.times, x, condition)
    size = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, atol=1e-5 * size, rtol=0)
    assert_images_agree(denoiser.decode(found), their_images(pipeline, expected))


def test_pseudo_methods_combine_noise_where_diffusers_combines_whatever_the_network_says(ours, theirs):
    denoiser, pipeline = ours["stable_diffusion"], theirs["stable_diffusion"]
    x, condition = starting_noise(denoiser), condition_of(denoiser)
    velocity = their_network("stable_diffusion", pipeline, condition)

    def noise(x, t):
        level = denoiser.path.level(float(t))
        return level.sigma * x + level.alpha * velocity(x, t)

    options = {"skip_prk_steps": True, "set_alpha_to_one": True}
    of_noise = their_scheduler(pipeline, "PNDMScheduler", {**options, "prediction_type": "epsilon"})
    of_velocity = their_scheduler(pipeline, "PNDMScheduler", options)
    found = drawn(denoiser, PLMS(STEPS, warmup="heun"), LEADING, x, condition)
    torch.testing.assert_close(found, their_states(of_noise, noise, x, STEPS), atol=5e-5, rtol=0)
    assert float((found - their_states(of_velocity, velocity, x, STEPS)).abs().max()) > 0.05


def test_unipc_reaches_the_data_with_bh1_where_diffusers_is_not_finite(ours, theirs):
    denoiser, pipeline = ours["ddpm"], theirs["ddpm"]
    x, times = starting_noise(denoiser), TrainingSteps("linspace", drops_last=True)
    options = {"solver_type": "bh1", "final_sigmas_type": "zero"}
    scheduler = their_scheduler(pipeline, "UniPCMultistepScheduler", options)
    assert their_states(scheduler, their_network("ddpm", pipeline, None), x, STEPS).isnan().all()
    assert drawn(denoiser, UniPC(STEPS, b="bh1"), times, x).isfinite().all()


def test_flow_euler_gives_the_images_of_diffusers_own(ours, theirs):
    denoiser, pipeline = ours["stable_diffusion_3"], theirs["stable_diffusion_3"]
    x, condition = starting_noise(denoiser), condition_of(denoiser)
    network = their_network("stable_diffusion_3", pipeline, condition)
    expected = flow_states(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), network, x)
    found = drawn(denoiser, FlowEuler(STEPS), flow_times(denoiser.path), x, condition)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert_images_agree(denoiser.decode(found), their_images(pipeline, expected))


def test_flow_heun_gives_the_states_of_diffusers_own_up_to_the_last_step(ours, theirs):
    denoiser, pipeline = ours["stable_diffusion_3"], theirs["stable_diffusion_3"]
    x, condition = starting_noise(denoiser), condition_of(denoiser)
    network = their_network("stable_diffusion_3", pipeline, condition)
    # Their last step, to σ = 0, is Euler's; ours is Ralston's, which asks once more.
    expected = flow_states(diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0), network, x, leaves_out=1)
    times = flow_times(denoiser.path, end="minimum")
    torch.testing.assert_close(drawn(denoiser, FlowHeun(STEPS - 1), times, x, condition), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def flow_states(scheduler, network, x, leaves_out=0):
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps[: len(scheduler.timesteps) - leaves_out]:
        x = scheduler.step(network(x, t), t, x).prev_sample
    return x


def test_without_terminal_signal_it_is_as_in_diffusers_euler(ours, theirs, monkeypatch):
    from lightrail_generation.denoisers.diffusers_scheduler import noise_path

    denoiser, pipeline = ours["stable_diffusion"], theirs["stable_diffusion"]
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = their_scheduler(pipeline, "EulerDiscreteScheduler", options)
    monkeypatch.setattr(denoiser, "path", noise_path({**scheduler.config, "_class_name": "EulerDiscreteScheduler"}))
    x, condition = starting_noise(denoiser), condition_of(denoiser)
    first = denoiser.path.level(999.0)
    assert first.alpha == pytest.approx(2**-12, rel=1e-8)
    expected = their_states(scheduler, their_network("stable_diffusion", pipeline, condition), x, 5, 1 / first.alpha)
    found = drawn(denoiser, EDMEuler(5), TRAILING, x, condition)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert_images_agree(denoiser.decode(found), their_images(pipeline, expected))
