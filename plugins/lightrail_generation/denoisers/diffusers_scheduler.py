"""What the configuration of a diffusers scheduler says of the model: its noise path and what its output is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightrail.errors import CheckpointError
from lightrail.generation import LinearFlow, NoisePath, TableVP

__all__ = ["SCHEDULERS", "betas", "is_flow", "noise_path", "output_form", "with_little_signal"]

SCHEDULERS = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)

FORMS = {"epsilon": "noise", "sample": "data", "v_prediction": "velocity", "flow_prediction": "flow"}

# A schedule without terminal signal has ᾱ = 0 at its last time. α = 2⁻¹² is the least that solvers start from, and a
# hair above it stays so whatever the logarithm rounds.
LEAST_SIGNAL = 2.0**-24 * (1 + 1e-9)


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether the model was trained on straight lines from noise to data."""
    name = config["_class_name"]
    return name.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction"


def output_form(config: Mapping[str, Any]) -> str:
    """What the network's output is.

    Args:
        config: Of the scheduler, with its class under ``_class_name``.

    Raises:
        CheckpointError: Its prediction type is not known.
    """
    wanted = "flow_prediction" if is_flow(config) else config.get("prediction_type", "epsilon")
    if wanted not in FORMS:
        raise _refusal("its prediction type is not known", f"prediction_type={wanted}", ", ".join(FORMS))
    return FORMS[wanted]


def noise_path(config: Mapping[str, Any]) -> NoisePath:
    """The path that the network was trained on, in double precision.

    Args:
        config: Of the scheduler, with its class under ``_class_name`` and its defaults filled in.

    Raises:
        CheckpointError: The scheduler, or how it makes its noise levels, is not known.
    """
    name = config["_class_name"]
    if name not in SCHEDULERS:
        raise _refusal("it has another idea of noise", name, ", ".join(SCHEDULERS))
    if config.get("invert_sigmas") or config.get("timestep_type") == "continuous":
        raise _refusal("its network is told other times", f"{name} with times of its own", "times 0, 1, …, T − 1")
    if is_flow(config):
        shift, least = _shift(config), 1 / int(config["num_train_timesteps"])
        return LinearFlow(t_min=shift * least / (1 + (shift - 1) * least))
    alphas_cumprod = torch.cumprod(1 - betas(config), 0)
    if config.get("rescale_betas_zero_snr"):
        alphas_cumprod = with_little_signal(alphas_cumprod)
    return TableVP(alphas_cumprod)


def _shift(config: Mapping[str, Any]) -> float:
    if config.get("use_dynamic_shifting"):
        return 1.0  # found for each image size when sampling
    return float(config.get("shift") or config.get("flow_shift") or 1.0)


def betas(config: Mapping[str, Any]) -> Tensor:
    """β at each training time, ``[T]`` float64, as ``beta_schedule`` or ``trained_betas`` says."""
    if config.get("trained_betas") is not None:
        return torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    steps, schedule = int(config["num_train_timesteps"]), config["beta_schedule"]
    low, high = float(config.get("beta_start", 0.0)), float(config.get("beta_end", 0.0))
    if schedule == "linear":
        return torch.linspace(low, high, steps, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(low**0.5, high**0.5, steps, dtype=torch.float64) ** 2
    if schedule == "sigmoid":
        return low + (high - low) * torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid()
    if schedule not in REMAINING:
        known = ("linear", "scaled_linear", "sigmoid", *REMAINING)
        raise _refusal("its noise schedule is not known", f"beta_schedule={schedule}", ", ".join(known))
    alpha_bar = REMAINING[schedule](torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


# ᾱ by the share of the way, where the β follow from it.
REMAINING: dict[str, Callable[[Tensor], Tensor]] = {
    "squaredcos_cap_v2": lambda share: ((share + 0.008) / 1.008 * math.pi / 2).cos() ** 2,
    "exp": lambda share: (-12 * share).exp(),
}


def with_little_signal(alphas_cumprod: Tensor) -> Tensor:
    """√ᾱ shifted and scaled so that it keeps its first entry and its last is nothing but a finite rest, 2⁻¹².

    Reference:
        S. Lin, B. Liu, J. Li and X. Yang (2024), Common Diffusion Noise Schedules and Sample Steps Are Flawed, arXiv
        2305.08891, algorithm 1.
    """
    root = alphas_cumprod.sqrt()
    return (((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2).clamp(min=LEAST_SIGNAL)


def _refusal(why: str, found: str, allowed: str) -> CheckpointError:
    return CheckpointError(
        f"the scheduler of this pipeline cannot be read: {why}",
        found=found,
        allowed=allowed,
        remedy="Save the pipeline with the scheduler that its network was trained with, one of the usual ones.",
    )
