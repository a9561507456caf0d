"""Manifold preserving guided diffusion: a gradient of the residual at the predicted data, not through the network."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightrail.generation import Moment
from lightrail.options import non_negative
from lightrail.traits import Traits
from lightrail_generation.guidance.dds import KeepsNoise
from lightrail_generation.guidance.dps import norms

__all__ = ["MPGD", "stepped_data"]


def stepped_data(data: Tensor, gradient: Tensor, scale: float, alpha: Any) -> Tensor:
    """D − (c/α) ∇‖y − A(D)‖.

    Args:
        data: D, ``[B, …]``.
        gradient: Of the norm.
        scale: c.
        alpha: α of the state, a number or one a sample.
    """
    return (data - scale / alpha * gradient).to(data.dtype)


class MPGD(KeepsNoise):
    """Moves the predicted data down the gradient of how far they are from what was measured, and keeps the noise.

    D' = D − (c/α_s) ∇_D ‖y − A(D)‖,  x_t = α_t D' + σ_t ε

    The gradient is at the data themselves, through the decoder of a latent model and not through the network: a step
    costs one evaluation and hardly more. It is that of a norm, so that its length does not depend on how far the data
    are off; c is a distance in the units of the states.

    Args:
        scale: c, at least 0; 0 is the sampler alone. The paper takes 5 to 20 for images of 256 by 256.
        keep_noise: Whether ε stays the network's, as in the paper, or follows D'.

    Raises:
        ConfigurationError: An option is out of range.
        CompositionError: A sampler whose step carries something else along than the state (``bdia``, ``dmcmc``,
            ``si_sde``, …).

    Deviations:
        The projections on the manifold of the data by an autoencoder are left out. Where nothing of the data is left,
        α = 0, it does nothing.

    Example:
        >>> from lightrail.generation import GaussianMixture, Observed, sample
        >>> from lightrail_generation.measurements.inpaint import Inpaint
        >>> from lightrail_generation.samplers.ddim import DDIM
        >>> from lightrail_generation.time_grids.uniform import Uniform
        >>> mixture, sampler, operator = GaussianMixture(), DDIM(steps=20), Inpaint(hidden=[1])
        >>> operator.prepare((2,))
        >>> observed = Observed(operator, torch.ones(4, 1, dtype=torch.float64))
        >>> grid = sampler.grid(mixture.path, Uniform())
        >>> sample(mixture, sampler, grid, range(4), guidance=[MPGD(scale=0.1)], observed=observed).evaluations
        20

    Reference:
        Y. He, N. Murata, C.-H. Lai, Y. Takida, T. Uesaka, D. Kim, W.-H. Liao, Y. Mitsufuji, J. Z. Kolter,
        R. Salakhutdinov and S. Ermon (2024), Manifold Preserving Guided Diffusion, arXiv 2311.16424.
    """

    traits: ClassVar[Traits] = Traits(
        rule="D' = D − (c/α) ∇_D ‖y − A(D)‖",
        paper="Y. He, N. Murata, C.-H. Lai, Y. Takida, T. Uesaka, D. Kim, W.-H. Liao, Y. Mitsufuji, J. Z. Kolter, "
        "R. Salakhutdinov, S. Ermon, 2024, Manifold Preserving Guided Diffusion, arXiv 2311.16424",
        example={"scale": 0.1},
    )
    needs_measurement = True

    def __init__(self, scale: float = 1.0, keep_noise: bool = True) -> None:
        super().__init__(keep_noise)
        non_negative(scale=scale)
        self.scale = scale

    def is_active(self, moment: Moment) -> bool:
        return self.scale > 0 and not (isinstance(moment.level.alpha, float) and moment.level.alpha == 0)

    def corrected(self, data: Tensor, moment: Moment) -> Tensor:
        assert moment.observed is not None
        with torch.enable_grad():
            leaf = data.detach().requires_grad_()
            residual = moment.observed.residual(moment.denoiser.decode(leaf))
            (gradient,) = torch.autograd.grad(norms(residual).sum(), leaf)
        return stepped_data(data, gradient, self.scale, moment.level.alpha)
