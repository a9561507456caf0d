"""Diffusion posterior sampling: a step down the gradient of the residual, through the network."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from lightrail.errors import CompositionError
from lightrail.generation import Denoiser, Guidance, Moment, Prediction, Sampler, State
from lightrail.options import non_negative
from lightrail.traits import Traits

__all__ = ["DPS", "norms", "refuse_fixed_states", "residual_norms"]


def residual_norms(prediction: Prediction, moment: Moment) -> Tensor:
    """‖y − A D‖ of each sample, ``[B]``, in the units of y; a gradient goes through decoder and network.

    Args:
        prediction: With D, in the states' units.
        moment: With y, A and the decoder.
    """
    assert moment.observed is not None
    return norms(moment.observed.residual(moment.denoiser.decode(prediction.data)))


def norms(residual: Tensor) -> Tensor:
    """‖r‖ of each sample, ``[B]``, with a gradient of 0 where nothing is left.

    Args:
        residual: r, ``[B, …]``.

    Example:
        >>> r = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
        >>> norms(r).sum().backward()
        >>> [[round(value, 6) for value in row] for row in r.grad.tolist()]
        [[0.6, 0.8], [0.0, 0.0]]
    """
    return residual.flatten(1).square().sum(1).clamp(min=torch.finfo(residual.dtype).tiny).sqrt()


def refuse_fixed_states(guidance: Guidance, sampler: Sampler) -> None:
    """Refuses samplers that step from an earlier state of their own, so that moving the newest is of no avail.

    Args:
        guidance: What moves states after a step.
        sampler: With its wrappers.

    Raises:
        CompositionError: It is such a one.
    """
    if not sampler.card.steps_from_newest:
        name = type(sampler.solver).__name__
        raise CompositionError(
            f"{type(guidance).__name__} moves states after a step; {name} goes on from earlier ones",
            found=f"sampler={name}",
            allowed="a sampler that steps from its newest state: ddim, ddpm, dpm_solver_pp, unipc, edm_heun, …",
            remedy="Choose another sampler, such as ddim; of dpm_solver_v3, set sampler.corrector=false.",
        )


class DPS(Guidance):
    """After each step, moves the state down the gradient of how far the predicted data are from what was measured.

    x_t ← x_t − ζ ∇_{x_s} ‖y − A(D(x_s))‖

    A acts on samples in the user's units, so that a gradient goes through the decoder of a latent model, and through
    any guidance that mixed the prediction. The norm is a sample's own.

    Args:
        zeta: ζ, at least 0; 0 is the sampler alone. The gradient is that of a norm, so its length does not depend on
            how far the data are off. The paper takes 0.3 to 1 for images of 256 by 256.

    Raises:
        ConfigurationError: An option is out of range.
        CompositionError: The sampler goes on from earlier states.

    Deviations:
        The paper divides the gradient of ‖·‖² by the norm, which is twice this one's length; ζ is that of the
        published code. There, the norm is taken over the whole batch, so that a sample depends on its neighbours.
        A multistep sampler keeps its earlier predictions.

        It does not sample the posterior. With data from N(0, 1), y = x + 0.5 z = 1 and 200 steps of DDIM in uniform
        times the posterior is N(0.80, 0.20); ζ = 0.02 gives mean 0.82 and variance 0.16, ζ = 0.1 draws all samples to
        y, with mean 1.00 and variance 0.003.

    Example:
        >>> from lightrail.generation import GaussianMixture, Observed, sample
        >>> from lightrail_generation.measurements.inpaint import Inpaint
        >>> from lightrail_generation.samplers.ddim import DDIM
        >>> from lightrail_generation.time_grids.uniform import Uniform
        >>> mixture, sampler, operator = GaussianMixture(), DDIM(steps=20), Inpaint(hidden=[1])
        >>> operator.prepare((2,))
        >>> observed = Observed(operator, torch.ones(4, 1, dtype=torch.float64))
        >>> grid = sampler.grid(mixture.path, Uniform())
        >>> sample(mixture, sampler, grid, range(4), guidance=[DPS(zeta=0.1)], observed=observed).evaluations
        20

    Reference:
        H. Chung, J. Kim, M. T. McCann, M. L. Klasky and J. C. Ye (2023), Diffusion Posterior Sampling for General Noisy
        Inverse Problems, arXiv 2209.14687, algorithm 1.
    """

    traits: ClassVar[Traits] = Traits(
        rule="x_t ← x_t − ζ ∇ ‖y − A(D(x_s))‖",
        paper="H. Chung, J. Kim, M. T. McCann, M. L. Klasky, J. C. Ye, 2023, Diffusion Posterior Sampling for General "
        "Noisy Inverse Problems, arXiv 2209.14687",
        example={"zeta": 0.1},
    )
    needs_measurement = True

    def __init__(self, zeta: float = 1.0) -> None:
        non_negative(zeta=zeta)
        self.zeta = zeta
        self.needs_gradient = zeta > 0

    def prepare(self, denoiser: Denoiser, sampler: Sampler) -> None:
        refuse_fixed_states(self, sampler)

    def is_active(self, moment: Moment) -> bool:
        return self.zeta > 0

    def after_step(self, state: State, moment: Moment) -> State:
        _, gradient = moment.gradient(lambda prediction: residual_norms(prediction, moment))
        x = state.x - self.zeta * gradient
        return dataclasses.replace(state, x=x.to(state.x.dtype))
