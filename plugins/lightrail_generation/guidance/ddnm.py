"""Denoising diffusion null-space models: what was measured replaces what was predicted of it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightrail.generation import Level, Moment, StateMeasurement
from lightrail.traits import Traits
from lightrail_generation.guidance.dds import KeepsNoise

__all__ = ["DDNM", "null_space_data", "share_of_measured"]


def null_space_data(data: Tensor, measured: StateMeasurement, share: Any = 1.0) -> Tensor:
    """D + λ A⁺ (y − A D).

    Args:
        data: D, ``[B, …]``.
        measured: A and y, of states.
        share: λ.
    """
    wide = data.to(torch.promote_types(data.dtype, torch.float32))
    residual = measured.value.to(wide.dtype) - measured.apply(wide)
    return (wide + share * measured.pseudo_inverse(residual)).to(data.dtype)


def share_of_measured(here: Level, there: Level | None, noise: float) -> Any:
    """λ = min(1, ρ_t / (s √(1 − e^{−2h}))), with which an ancestral step holds no more noise than it should.

    Args:
        here: s, where the network is asked.
        there: t, where the step leads; ``None`` for the data.
        noise: s, of what was measured, in the units of the states.
    """
    if noise == 0:
        return 1.0
    rho = 0.0 if there is None else there.rho
    fresh = torch.as_tensor(1 - (rho / here.rho) ** 2, dtype=torch.float64).clamp(min=1e-12).sqrt()
    return (torch.as_tensor(rho, dtype=torch.float64) / (noise * fresh)).clamp(max=1.0)


class DDNM(KeepsNoise):
    """Replaces the part of the predicted data that was measured; what A does not see stays the network's.

    D' = D + λ A⁺ (y − A D),  λ = min(1, ρ_t / (s √(1 − e^{−2h})))

    λ is 1 where y has no noise; then A D' = y at every step. With noise s, no more of it is taken in than the state
    at the next level has anyway, and none at the last step.

    Args:
        keep_noise: Whether the predicted noise stays what the network said, as in the published code, or follows D',
            as in the paper.

    Raises:
        CompositionError: A latent model, whose states have no linear measurement.

    Deviations:
        With noise the paper makes the fresh noise of its step smaller by what y brings; here that is the sampler's
        own. s is taken over to the states as if A had orthonormal rows.

    Example:
        >>> from lightrail.generation import GaussianMixture, Observed, sample
        >>> from lightrail_generation.measurements.inpaint import Inpaint
        >>> from lightrail_generation.samplers.ddpm import DDPM
        >>> from lightrail_generation.time_grids.uniform import Uniform
        >>> mixture, sampler, operator = GaussianMixture(), DDPM(steps=20), Inpaint(hidden=[1])
        >>> operator.prepare((2,))
        >>> observed = Observed(operator, torch.ones(4, 1, dtype=torch.float64))
        >>> drawn = sample(mixture, sampler, sampler.grid(mixture.path, Uniform()), range(4), guidance=[DDNM()],
        ...                observed=observed)
        >>> [round(value, 6) for value in drawn.x[:, 0].tolist()]
        [1.0, 1.0, 1.0, 1.0]

    Reference:
        Y. Wang, J. Yu and J. Zhang (2023), Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model,
        arXiv 2212.00490, algorithm 1 and section 3.3.
    """

    traits: ClassVar[Traits] = Traits(
        rule="D' = D + A⁺ (y − A D)",
        paper="Y. Wang, J. Yu, J. Zhang, 2023, Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model, "
        "arXiv 2212.00490",
    )
    needs_measurement = True

    def __init__(self, keep_noise: bool = False) -> None:
        super().__init__(keep_noise)

    def corrected(self, data: Tensor, moment: Moment) -> Tensor:
        assert moment.observed is not None
        measured = moment.observed.on_states(moment.denoiser)
        noise = moment.observed.operator.noise / float(measured.scale.abs().mean())
        there = moment.grid[moment.index + 1] if moment.index < moment.grid.steps else None
        return null_space_data(data, measured, share_of_measured(moment.level, there, noise))
