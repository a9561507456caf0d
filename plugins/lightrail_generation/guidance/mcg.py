"""Manifold constrained gradients: a step as in DPS, then a projection on what was measured."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from lightrail.errors import CompositionError
from lightrail.generation import Denoiser, Level, Moment, Sampler, State, StateMeasurement
from lightrail.traits import Traits
from lightrail_generation.guidance.dps import DPS

__all__ = ["MCG", "projected"]

# How exactly A A⁺ A must be A.
PROJECTION_TOLERANCE = 1e-3


def projected(x: Tensor, measured: StateMeasurement, level: Level, z: Tensor) -> Tensor:
    """x + A⁺ (y_t − A x) with y_t = α y + σ A z: the nearest state whose measurement is what y would be at this level.

    Args:
        x: States ``[B, …]`` at the level.
        measured: A and y, of states.
        level: Of noise.
        z: Standard normal, ``[B, …]``.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    target = level.alpha * measured.value.to(wide.dtype) + level.sigma * measured.apply(z.to(wide.dtype))
    return (wide + measured.pseudo_inverse(target - measured.apply(wide))).to(x.dtype)


class MCG(DPS):
    """After each step, moves the state as DPS does, then makes what A sees of it what y would be at that level.

    x_t ← x_t − ζ ∇_{x_s} ‖y − A(D(x_s))‖,  x_t ← x_t + A⁺ (α_t y + σ_t A z − A x_t)

    The gradient keeps the projection on the manifold of the data. What was measured, noise and all, is in the samples
    at the end: it is for measurements without noise. In inpainting it replaces the known pixels.

    Args:
        zeta: ζ, at least 0; 0 is the projection alone.

    Raises:
        ConfigurationError: An option is out of range.
        CompositionError: The operator's pseudo-inverse is not exact, a latent model, whose states have no linear
            measurement, or a sampler that goes on from earlier states or has levels of its own.

    Deviations:
        The published code writes Aᵀ for A⁺, which is the same where A has orthonormal rows. As the projection brings
        new noise, a multistep sampler starts its history anew at every step, and then is of order 1; f_pndm asks as
        often as for its first step.

    Example:
        >>> from lightrail.generation import GaussianMixture, Observed, sample
        >>> from lightrail_generation.measurements.inpaint import Inpaint
        >>> from lightrail_generation.samplers.ddim import DDIM
        >>> from lightrail_generation.time_grids.uniform import Uniform
        >>> mixture, sampler, operator = GaussianMixture(), DDIM(steps=20), Inpaint(hidden=[1])
        >>> operator.prepare((2,))
        >>> observed = Observed(operator, torch.ones(4, 1, dtype=torch.float64))
        >>> drawn = sample(mixture, sampler, sampler.grid(mixture.path, Uniform()), range(4),
        ...                guidance=[MCG(zeta=0.1)], observed=observed)
        >>> drawn.x[:, 0].tolist()
        [1.0, 1.0, 1.0, 1.0]

    Reference:
        H. Chung, B. Sim, D. Ryu and J. C. Ye (2022), Improving Diffusion Models for Inverse Problems using Manifold
        Constraints, arXiv 2206.00941, algorithm 1.
    """

    traits: ClassVar[Traits] = Traits(
        rule="x_t ← x_t − ζ ∇ ‖y − A(D(x_s))‖, then x_t ← x_t + A⁺ (α_t y + σ_t A z − A x_t)",
        paper="H. Chung, B. Sim, D. Ryu, J. C. Ye, 2022, Improving Diffusion Models for Inverse Problems using "
        "Manifold Constraints, arXiv 2206.00941",
        is_stochastic=True,
        example={"zeta": 0.1},
    )

    def prepare(self, denoiser: Denoiser, sampler: Sampler) -> None:
        super().prepare(denoiser, sampler)
        if not sampler.card.descends:
            name = type(sampler.solver).__name__
            raise CompositionError(
                f"{type(self).__name__} projects states at the levels of the grid, and {name} has levels of its own",
                found=f"sampler={name}",
                allowed="a sampler whose states are at the levels of the grid",
                remedy="Choose another sampler, such as ddim.",
            )

    def is_active(self, moment: Moment) -> bool:
        return True

    def after_step(self, state: State, moment: Moment) -> State:
        state = super().after_step(state, moment) if self.zeta > 0 else state
        assert moment.observed is not None
        measured = moment.observed.on_states(moment.denoiser)
        z = moment.normal()
        if "is_checked" not in moment.memory:
            _check_projection(measured, z)
            moment.memory["is_checked"] = True
        x = projected(state.x, measured, moment.grid[state.index], z)
        return dataclasses.replace(state, x=x, history=())


def _check_projection(measured: StateMeasurement, z: Tensor) -> None:
    seen = measured.apply(z.to(torch.promote_types(z.dtype, torch.float32)))
    again = measured.apply(measured.pseudo_inverse(seen))
    error, size = float((again - seen).norm()), float(seen.norm())
    if error > PROJECTION_TOLERANCE * size:
        raise CompositionError(
            f"MCG needs an exact pseudo-inverse, and that of {type(measured.operator).__name__} is not",
            found=f"A A⁺ A x differs from A x by {error / size:.2g} of its length",
            allowed=f"a difference of at most {PROJECTION_TOLERANCE:g}, as of inpaint, downsample and mask_fourier",
            remedy="Choose another measurement, or guidance that needs no pseudo-inverse: dps, dds or mpgd.",
        )
