"""Pipelines of the diffusers library."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightrail.errors import CheckpointError, CompositionError, ConfigurationError
from lightrail.generation import Condition, Denoiser
from lightrail.options import at_least, one_of
from lightrail.traits import Traits
from lightrail_generation.denoisers.diffusers_folder import PIPELINES, load_part, load_parts, read_index
from lightrail_generation.denoisers.diffusers_scheduler import is_flow, noise_path, output_form

__all__ = ["DiffusersPipeline"]

DTYPES = ("float32", "float16", "bfloat16", "float64")


class DiffusersPipeline(Denoiser):
    """The network of a diffusers pipeline on the noise path that it was trained on, with its texts and its decoder.

    Of the scheduler only the configuration is read: the noise levels and what the network's output is. The spacing of
    times is the time grid's (``training_steps`` has diffusers' spacings; for a flow ``uniform``, with its ``shift``),
    and the solver is the sampler's. ``generate.prompt`` is a text or a list of them gone through in turn,
    ``generate.label`` a class.

    Supported are ``DDPMPipeline`` and ``DDIMPipeline`` (``UNet2DModel``, with classes or without),
    ``StableDiffusionPipeline`` and ``StableDiffusionXLPipeline`` (``UNet2DConditionModel``), ``DiTPipeline`` and
    ``StableDiffusion3Pipeline``; others are refused by name.

    Args:
        path: The folder that ``pipeline.save_pretrained`` wrote; nothing is downloaded.
        dtype: Of the weights and states: ``float32``, ``float16``, ``bfloat16`` or ``float64``.
        device: ``auto`` for a GPU where there is one, or ``cpu``, ``cuda``, ``cuda:1``, ….
        size: Height and width of a state (of the latents, where there is a decoder); ``None`` for the network's own.

    Raises:
        ConfigurationError: There is no pipeline, an option is out of range, or the size is not known.
        CheckpointError: A part is missing, cannot be read or is not supported.

    Deviations:
        No ``clip_sample`` or ``thresholding`` of the scheduler's configuration: both change the prediction, as guidance
        does, and are no part of the network. The table of noise levels is in double precision, and where
        ``rescale_betas_zero_snr`` is set its last α is 2⁻¹² in place of 0, as in diffusers' own Euler and DPM solvers.
        The variance that a network has learned is not used.

    Example:
        >>> try:
        ...     DiffusersPipeline(path="nowhere")
        ... except ConfigurationError as error:
        ...     print(error.found)
        nowhere is no folder
    """

    traits: ClassVar[Traits] = Traits(rule="y = network(x, t, condition)")

    def __init__(self, path: str, dtype: str = "float32", device: str = "auto", size: int | None = None) -> None:
        one_of(DTYPES, dtype=dtype)
        if size is not None:
            at_least(1, size=size)
        self.folder = Path(path)
        index = read_index(self.folder)
        self.kind: str = index["_class_name"]
        self.dtype = getattr(torch, dtype)
        self.device = _device(device)
        scheduler = load_part(self.folder, "scheduler", index["scheduler"]).config
        self.scheduler: dict[str, Any] = {**scheduler, "_class_name": index["scheduler"][1]}
        self.path = noise_path(self.scheduler)
        self.form = output_form(self.scheduler)
        self.times_per_unit = float(self.scheduler["num_train_timesteps"]) if is_flow(self.scheduler) else 1.0
        if is_flow(self.scheduler):
            self.sampler_name = "flow_euler"
        self.parts = load_parts(self.folder, index, self.dtype, self.device)
        self.network = self.parts[next(iter(PIPELINES[self.kind]))]
        self.vae = self.parts.get("vae")
        self.text = _text_encoder(self.kind, self.parts) if "text_encoder" in self.parts else None
        self.encoded: dict[str, dict[str, Tensor]] = {}
        self.classes, self.null_label = _classes(self.kind, self.network.config)
        self.shape = _shape(self.network.config, size)

    def output(self, x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        times = (t * self.times_per_unit).float()
        inputs = self._inputs(condition, len(x))
        answer = self.network(x.to(self.dtype), timestep=times, return_dict=False, **inputs)[0]
        return answer[:, : self.shape[0]]  # beyond it a network may tell the variance that it learned

    def _inputs(self, condition: Condition | None, count: int) -> dict[str, Any]:
        """What the network is told beside state and time."""
        if self.text is not None:
            said = self._null_text(count) if condition is None else condition
            if self.kind == "StableDiffusionXLPipeline":
                sizes = {"text_embeds": said["pooled"], "time_ids": self._image_sizes(count)}
                return {"encoder_hidden_states": said["prompt"], "added_cond_kwargs": sizes}
            if "pooled" in said:
                return {"encoder_hidden_states": said["prompt"], "pooled_projections": said["pooled"]}
            return {"encoder_hidden_states": said["prompt"]}
        if not self.classes:
            return {}
        if condition is None:
            condition = {"label": torch.full((count,), self._null_label(), device=self.device)}
        return {"class_labels": condition["label"]}

    def _image_sizes(self, count: int) -> Tensor:
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)  # type: ignore[union-attr]
        height, width = (side * factor for side in self.shape[1:])
        return torch.tensor([[height, width, 0, 0, height, width]], dtype=self.dtype, device=self.device).expand(
            count, -1
        )

    def condition(self, request: Mapping[str, Any], indices: Sequence[int]) -> Condition | None:
        """The texts (``prompt``) or classes (``label``) asked for; without a text, what the network takes for none."""
        wanted = request.get("prompt")
        if self.text is None and wanted is not None:
            raise CompositionError(
                "this pipeline reads no text",
                found=f"generate.prompt={wanted!r}",
                allowed="generate.prompt=null",
                remedy="Leave generate.prompt out, or give a pipeline with a text encoder.",
            )
        chosen = super().condition(request, indices)
        if self.text is None or wanted is None:
            return chosen
        prompts = [wanted] if isinstance(wanted, str) else wanted
        is_list = isinstance(prompts, Sequence) and len(prompts) > 0
        if not is_list or not all(isinstance(prompt, str) for prompt in prompts):
            raise ConfigurationError(
                "generate.prompt is no text",
                found=f"generate.prompt={wanted!r}",
                allowed="a text, or a list of texts",
                remedy='Write generate.prompt="a text", or a list of such.',
            )
        said = [self._said(prompts[i % len(prompts)]) for i in indices]
        return {name: torch.stack([each[name] for each in said]) for name in said[0]}

    def unconditional(self, condition: Condition | None) -> Condition | None:
        """The empty text, or the class that was dropped in training.

        Raises:
            CompositionError: The network was never trained without its class.
        """
        if condition is None or (self.text is None and not self.classes):
            return None
        if self.text is not None:
            return {**condition, **self._null_text(len(condition["prompt"]))}
        return {**condition, "label": torch.full_like(condition["label"], self._null_label())}

    def _null_label(self) -> int:
        if self.null_label is None:
            raise CompositionError(
                "this network has no class that stands for none",
                found=f"{type(self.network).__name__} with {self.classes} classes",
                allowed="a class for every sample",
                remedy="Set generate.label, and leave guidance out that compares with no class.",
            )
        return self.null_label

    @torch.no_grad()
    def _said(self, prompt: str | None) -> dict[str, Tensor]:
        """A text as the network reads it, ``prompt`` ``[L, D]`` and perhaps ``pooled`` ``[P]``; none for ``None``."""
        key = "" if prompt is None else f"text {prompt}"
        if key not in self.encoded:
            pair = self.text.encode_prompt(  # type: ignore[union-attr]
                prompt=prompt or "",
                device=self.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
                **({"prompt_2": None, "prompt_3": None} if self.kind == "StableDiffusion3Pipeline" else {}),
            )
            # (text, none) or (text, none, pooled text, pooled none)
            said = pair[prompt is None :: 2]
            names = ("prompt", "pooled")
            self.encoded[key] = {name: each[0].to(self.dtype) for name, each in zip(names, said, strict=False)}
        return self.encoded[key]

    def _null_text(self, count: int) -> dict[str, Tensor]:
        return {name: each.expand(count, *each.shape) for name, each in self._said(None).items()}

    def decode(self, x: Tensor) -> Tensor:
        """Images in [0, 1], ``[B, channels, height, width]``, in float32 at least."""
        if self.vae is not None:
            mean, scale = self._latent_frame(x)
            x = self.vae.decode((x * scale + mean).to(self.vae.dtype), return_dict=False)[0]
        return (x.to(torch.promote_types(x.dtype, torch.float32)) / 2 + 0.5).clamp(0, 1)

    def encode(self, samples: Tensor) -> Tensor:
        """The states of images in [0, 1]; of a distribution of latents, its mode."""
        images = samples.to(self.device) * 2 - 1
        if self.vae is None:
            return images.to(self.dtype)
        latents = self.vae.encode(images.to(self.vae.dtype)).latent_dist.mode()
        mean, scale = self._latent_frame(latents)
        return ((latents - mean) / scale).to(self.dtype)

    def _latent_frame(self, like: Tensor) -> tuple[Any, Any]:
        """(m, s) with latents of the decoder = s × state + m."""
        config = self.vae.config  # type: ignore[union-attr]
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            mean, deviation = (
                torch.tensor(config[name]).view(1, -1, 1, 1).to(like) for name in ("latents_mean", "latents_std")
            )
            return mean, deviation / config["scaling_factor"]
        return config.get("shift_factor") or 0.0, 1 / config["scaling_factor"]

    def to(self, device: torch.device) -> DiffusersPipeline:
        for part in self.parts.values():
            if isinstance(part, torch.nn.Module):
                part.to(device)
        self.device = device
        self.encoded.clear()
        return self

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(
            f"there is no device '{name}'",
            found=f"device={name} ({str(error).splitlines()[0]})",
            allowed="auto, cpu, cuda, cuda:0, …, as this machine has them",
            remedy="Set device=auto.",
        ) from error
    return device


def _text_encoder(kind: str, parts: Mapping[str, Any]) -> Any:
    """The pipeline itself, which knows best how its texts are put together; only its encode_prompt is used."""
    import diffusers

    absent = {"StableDiffusionPipeline": ("safety_checker", "feature_extractor")}.get(kind, ())
    if kind == "StableDiffusion3Pipeline":
        absent = tuple(part for part in ("text_encoder_3", "tokenizer_3") if part not in parts)
    options = {"requires_safety_checker": False} if kind == "StableDiffusionPipeline" else {}
    return getattr(diffusers, kind)(**parts, **dict.fromkeys(absent), scheduler=None, **options)


def _classes(kind: str, config: Mapping[str, Any]) -> tuple[int, int | None]:
    """How many classes the network knows, and the label that stands for none."""
    expected = {"addition_embed_type": "text_time"} if kind == "StableDiffusionXLPipeline" else {}
    options = ["class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim", "addition_embed_type"]
    options += ["num_class_embeds"] if config.get("cross_attention_dim") else []
    wants = [f"{name}={config[name]}" for name in options if config.get(name) not in (None, expected.get(name))]
    if config.get("time_embedding_type") == "fourier":
        wants.append("time_embedding_type=fourier")
    if config["out_channels"] not in (None, config["in_channels"], 2 * config["in_channels"]):
        wants.append(f"in_channels={config['in_channels']}, out_channels={config['out_channels']}")
    if wants:
        raise CheckpointError(
            "this network is told more than a state, a time and a text or class",
            found=", ".join(wants),
            allowed="a network without such inputs",
            remedy="Give another pipeline; distilled, inpainting and image-conditioned networks are not supported.",
        )
    if "num_embeds_ada_norm" in config:
        return config["num_embeds_ada_norm"], config["num_embeds_ada_norm"]
    return config.get("num_class_embeds") or 0, None


def _shape(config: Mapping[str, Any], size: int | None) -> tuple[int, int, int]:
    side = config["sample_size"] if size is None else size
    if side is None:
        raise ConfigurationError(
            "the size of the images is not known",
            found="sample_size=null in the network's configuration",
            allowed="a whole number of at least 1",
            remedy="Set denoiser.size to the height and width of a state.",
        )
    height, width = (side, side) if isinstance(side, int) else side
    return config["in_channels"], height, width
