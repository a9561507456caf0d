"""The starting noise as something to be chosen: how far it may go, and which samplers it decides."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightrail.errors import CompositionError
from lightrail.generation import Denoiser, Guidance, Sampler

__all__ = ["near_shell", "refuse_other_noise", "refuse_stochastic"]


def near_shell(z: Tensor, start: Tensor, width: float) -> Tensor:
    """z, shortened or stretched so that |z| is within √n ± width, or between there and |start| where that is outside.

    The norm of n standard normal numbers is about √n, with a standard deviation below 0.71 whatever n is.

    Args:
        z: ``[B, …]``.
        start: Where it came from.
        width: At least 0.

    Example:
        >>> near_shell(torch.full((1, 4), 3.0), torch.ones(1, 4), 0.5).tolist()
        [[1.25, 1.25, 1.25, 1.25]]
    """
    radius = torch.full((len(z),), math.sqrt(z[0].numel()), dtype=z.dtype, device=z.device)
    begin, norm = start.flatten(1).norm(dim=1), z.flatten(1).norm(dim=1)
    wanted = norm.clamp(torch.minimum(radius - width, begin), torch.maximum(radius + width, begin))
    factor = torch.where(norm > 0, wanted / norm.clamp(min=torch.finfo(z.dtype).tiny), 1.0)
    return z * factor.view(-1, *[1] * (z.ndim - 1))


def refuse_stochastic(guidance: Guidance, sampler: Sampler) -> None:
    """Raises:
    CompositionError: The sampler draws noise of its own, so that the starting noise does not tell the sample.
    """
    if sampler.card.is_stochastic:
        name = type(sampler.solver).__name__
        raise CompositionError(
            f"{type(guidance).__name__} chooses the starting noise, and {name} adds other noise",
            found=f"a stochastic sampler: {name}",
            allowed="a deterministic sampler: unipc, dpm_solver_pp, ddim with eta=0, edm_heun, flow_heun",
            remedy="Choose one of those.",
        )


def refuse_other_noise(guidance: Guidance, denoiser: Denoiser) -> None:
    """Raises:
    CompositionError: The model does not start from Gaussian noise.
    """
    if "noise" not in denoiser.gives:
        raise CompositionError(
            f"{type(guidance).__name__} works on Gaussian starting noise, which this model does not start from",
            found=f"a model that gives {', '.join(denoiser.gives)}",
            allowed="a model that gives noise",
            remedy="Leave that guidance out.",
        )
