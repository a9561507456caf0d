"""A folder that diffusers' ``save_pretrained`` wrote: which parts it must hold, and loading them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightrail.errors import CheckpointError, ConfigurationError, closest

__all__ = ["PIPELINES", "load_part", "load_parts", "read_index"]

_CLIP = {"text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer"}
_TWO_CLIPS = {
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "tokenizer_2": "CLIPTokenizer",
}

# The parts that a pipeline cannot do without, the network first.
PIPELINES: dict[str, dict[str, str]] = {
    "DDIMPipeline": {"unet": "UNet2DModel"},
    "DDPMPipeline": {"unet": "UNet2DModel"},
    "DiTPipeline": {"transformer": "DiTTransformer2DModel", "vae": "AutoencoderKL"},
    "StableDiffusionPipeline": {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", **_CLIP},
    "StableDiffusionXLPipeline": {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", **_TWO_CLIPS},
    "StableDiffusion3Pipeline": {"transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL", **_TWO_CLIPS},
}

# Used where they are there; what else a folder holds (a safety checker, …) is left alone.
_OPTIONAL = ("text_encoder_3", "tokenizer_3")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")


def read_index(folder: Path) -> dict[str, Any]:
    """What ``model_index.json`` says.

    Args:
        folder: As ``save_pretrained`` wrote it.

    Raises:
        ConfigurationError: It holds no pipeline.
        CheckpointError: The pipeline is one that is not known, or a part is missing or another than it needs.
    """
    place = folder / "model_index.json"
    if not place.is_file():
        found = f"{folder} has no model_index.json" if folder.is_dir() else f"{folder} is no folder"
        raise ConfigurationError(
            "denoiser.path names no diffusers pipeline",
            found=found,
            allowed="a folder that pipeline.save_pretrained(FOLDER) wrote",
            remedy="Save the pipeline there, or give the folder of one that is on this machine; nothing is downloaded.",
        )
    try:
        index = json.loads(place.read_text(encoding="utf-8"))
        name = index["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            "model_index.json cannot be read",
            found=f"{place}: {error}",
            allowed="JSON with _class_name and the parts of a pipeline",
            remedy="Save the pipeline once more.",
        ) from error
    _check_parts(folder, name, index)
    return index


def _check_parts(folder: Path, name: object, index: Mapping[str, Any]) -> None:
    if not isinstance(name, str) or name not in PIPELINES:
        raise CheckpointError(
            f"this kind of pipeline cannot be sampled from: {name}",
            found=f"{name} in {folder}",
            allowed=", ".join(PIPELINES),
            remedy=f"{closest(str(name), PIPELINES)}Give a pipeline of one of these kinds.",
        )
    network = next(iter(PIPELINES[name]))
    for part, class_name in {**PIPELINES[name], "scheduler": ""}.items():
        _, held = index.get(part) or (None, None)
        if held is None or not (folder / part).is_dir():
            raise CheckpointError(
                f"the pipeline has no {part}",
                found=f"no folder {folder / part}" if held else f"model_index.json names no {part}",
                allowed=f"{name} with {', '.join(PIPELINES[name])} and scheduler",
                remedy=f"Save the whole pipeline once more, or copy its {part} folder there.",
            )
        if part in (network, "vae") and held != class_name:
            raise CheckpointError(
                f"the pipeline's {part} is one that cannot be asked",
                found=f"{part}: {held}",
                allowed=f"{part}: {class_name}",
                remedy=f"Give a {name} whose {part} is a {class_name}.",
            )


def load_parts(folder: Path, index: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The network, decoder and text parts of a pipeline, ready to be asked.

    Args:
        folder: Of the pipeline.
        index: What :func:`read_index` said.
        dtype: Of the weights.
        device: Where they go.

    Raises:
        CheckpointError: A part cannot be read.
    """
    wanted = [*PIPELINES[index["_class_name"]], *_OPTIONAL]
    held = [part for part in wanted if (index.get(part) or (None, None))[1] is not None]
    parts = {part: load_part(folder, part, index[part], dtype) for part in held}
    if dtype is torch.float16 and "vae" in parts and parts["vae"].config.get("force_upcast"):
        # The decoders of large models overflow in half precision, and their configuration says so.
        parts["vae"] = load_part(folder, "vae", index["vae"], torch.float32)
    for model in parts.values():
        if isinstance(model, torch.nn.Module):
            model.to(device).eval().requires_grad_(False)
    return parts


def load_part(folder: Path, part: str, of_class: tuple[str, str], dtype: torch.dtype | None = None) -> Any:
    """One part, from the files that are there.

    Args:
        folder: Of the pipeline.
        part: Its name, and that of its folder.
        of_class: The library and the class, as ``model_index.json`` has them.
        dtype: Of its weights, where it has some.

    Raises:
        CheckpointError: It is of a library or a class that is not installed, or it cannot be read.
    """
    library, name = of_class
    loader: Any = _loader(library, name)
    if loader is None:
        raise CheckpointError(
            f"the pipeline's {part} is of a kind that is not installed",
            found=f"{part}: {name} of {library}",
            allowed="classes of the installed diffusers and transformers",
            remedy="Install the versions of diffusers and transformers that the pipeline was saved with, or newer.",
        )
    try:
        found = _read(loader, folder / part, {_precision_option(library): dtype} if dtype is not None else {})
    except Exception as error:
        raise CheckpointError(
            f"the pipeline's {part} cannot be loaded",
            found=f"{folder / part}: {str(error).strip().splitlines()[0] if str(error).strip() else repr(error)}",
            allowed=f"the files of a {name}, as save_pretrained writes them",
            remedy=f"Save the pipeline once more, or copy the whole {part} folder there.",
        ) from error
    return found


def _read(loader: Any, place: Path, precision: Mapping[str, Any]) -> Any:
    """What both libraries would fill with random numbers or an empty vocabulary, and a warning, is an error."""
    if place.name.startswith("tokenizer") and not any((place / name).is_file() for name in _VOCABULARIES):
        raise FileNotFoundError(f"no {', '.join(_VOCABULARIES)}")
    if torch.nn.Module not in loader.__mro__:
        return loader.from_pretrained(str(place), local_files_only=True)
    # Read in that precision rather than cast to it: some models keep a few weights in float32.
    model, report = loader.from_pretrained(str(place), local_files_only=True, output_loading_info=True, **precision)
    if precision and not getattr(model, "_keep_in_fp32_modules", None):
        # Without accelerate, what a constructor computes stays in single precision.
        model.to(dtype=next(iter(precision.values())))
    missing = sorted(report["missing_keys"])
    if missing:
        raise KeyError(f"{len(missing)} weights are missing, {missing[0]} the first")
    return model


def _loader(library: str, name: str) -> Any:
    # Only these two are asked: a folder must not be able to name code of its own.
    if library == "diffusers":
        import diffusers as found
    elif library == "transformers":
        import transformers as found
    else:
        return None
    loader = getattr(found, name, None)
    return loader if isinstance(loader, type) else None


def _precision_option(library: str) -> str:
    if library == "diffusers":
        return "torch_dtype"
    import transformers

    major, minor = (int(number) for number in transformers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"
