"""Which samplers draw fresh noise as they go, and how much."""

from __future__ import annotations

import inspect

from lightrail.generation import Sampler
from lightrail.traits import traits_of
from lightrail_generation.guidance.dps import solver_of
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.ddpm import DDPM
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.si_sde import SISDE

__all__ = ["draws_noise", "solves_reverse_diffusion"]


def draws_noise(sampler: Sampler) -> bool:
    """Whether runs from one state part, under the options that the sampler was built with.

    Args:
        sampler: With its wrappers.
    """
    solver = solver_of(sampler)
    names = inspect.signature(type(solver)).parameters
    options = {name: getattr(solver, name) for name in names if hasattr(solver, name)}
    return traits_of(type(solver), options).is_stochastic


def solves_reverse_diffusion(sampler: Sampler) -> bool:
    """Whether each step follows the score of what it is told, with noise that keeps the distribution of that score.

    Args:
        sampler: With its wrappers.
    """
    solver = solver_of(sampler)
    return (
        isinstance(solver, DDPM)
        or (isinstance(solver, DDIM) and solver.eta == 1)
        or (isinstance(solver, DPMSolverPP) and solver.stochastic)
        or (isinstance(solver, SISDE) and solver.epsilon > 0)
    )
