"""Second-order Tweedie sampling from a surrogate loss: DPS with the trace of the Hessian, several steps a level."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from lightrail.generation import Moment, Prediction, State
from lightrail.options import at_least, non_negative, positive
from lightrail.traits import Traits
from lightrail_generation.guidance.dps import DPS, residual_norms

__all__ = ["STSL", "trace_estimate"]


def trace_estimate(score: Tensor, shifted: Tensor, z: Tensor, reach: float) -> Tensor:
    """z · (s(x + δ z) − s(x))/δ, ``[B]``: Hutchinson's estimate of Tr ∇² log p(x) by one difference of scores.

    Args:
        score: s(x), ``[B, …]``.
        shifted: s(x + δ z).
        z: Standard normal.
        reach: δ. The bias is of order δ², and 0 for a Gaussian.
    """
    return (z * (shifted - score)).flatten(1).sum(1) / reach


class STSL(DPS):
    """Moves states several times a level, as DPS does, and towards where the posterior of the data is narrow.

    x ← x − ∇ (ζ ‖y − A(D(x))‖ + (η/n) z · (s(x + δ z) − s(x))/δ),  n the size of a state

    The second term estimates the trace of the Hessian of log p, in which Tweedie's covariance of the data is affine.
    The first of the steps is DPS's, with the gradient at the start of the sampler's step; the others are at the state
    where that led. More of them allow fewer levels. A state that is free of noise is moved once.

    Args:
        zeta: ζ, at least 0: see ``dps``.
        eta: η, at least 0, the weight of the trace; above 0 each step asks the network twice.
        inner: Steps a level, at least 1; 1 with ``eta=0`` is DPS.
        reach: δ, above 0, how far the difference of scores reaches, in the units of the states; 1 in the paper.

    Raises:
        ConfigurationError: An option is out of range.
        CompositionError: The sampler goes on from earlier states.

    Deviations:
        The paper's steps are all taken before the step down; here the first is taken after it, as in DPS. The network
        is asked under the samples' own condition: other guidance in the chain acts on the first step alone. Steps of
        the paper for latents alone, such as the gluing of what is known, are left out.

    Example:
        >>> from lightrail.generation import GaussianMixture, Observed, sample
        >>> from lightrail_generation.measurements.inpaint import Inpaint
        >>> from lightrail_generation.samplers.ddim import DDIM
        >>> from lightrail_generation.time_grids.uniform import Uniform
        >>> mixture, sampler, operator = GaussianMixture(), DDIM(steps=10), Inpaint(hidden=[1])
        >>> operator.prepare((2,))
        >>> observed = Observed(operator, torch.ones(4, 1, dtype=torch.float64))
        >>> grid = sampler.grid(mixture.path, Uniform())
        >>> sample(mixture, sampler, grid, range(4), guidance=[STSL(zeta=0.1, inner=3)], observed=observed).evaluations
        56

    Reference:
        L. Rout, Y. Chen, A. Kumar, C. Caramanis, S. Shakkottai and W.-S. Chu (2024), Beyond First-Order Tweedie:
        Solving Inverse Problems using Latent Diffusion, arXiv 2312.00852.
    """

    traits: ClassVar[Traits] = Traits(
        rule="x ← x − ∇ (ζ ‖y − A(D(x))‖ + (η/n) z · (s(x + δ z) − s(x))/δ), several times a level",
        paper="L. Rout, Y. Chen, A. Kumar, C. Caramanis, S. Shakkottai, W.-S. Chu, 2024, Beyond First-Order Tweedie: "
        "Solving Inverse Problems using Latent Diffusion, arXiv 2312.00852",
        is_stochastic=True,
        example={"zeta": 0.1, "inner": 2},
    )

    def __init__(self, zeta: float = 1.0, eta: float = 0.002, inner: int = 5, reach: float = 1.0) -> None:
        super().__init__(zeta)
        non_negative(eta=eta)
        at_least(1, inner=inner)
        positive(reach=reach)
        self.eta = eta
        self.inner = inner
        self.reach = reach
        self.needs_gradient = zeta > 0 or eta > 0

    def is_active(self, moment: Moment) -> bool:
        return self.needs_gradient

    def after_step(self, state: State, moment: Moment) -> State:
        _, gradient = moment.gradient(lambda prediction: self._losses(prediction, moment, 0))
        x, there = state.x - gradient.to(state.x.dtype), moment.grid[state.index]
        for number in range(1, 1 if there.is_clean else self.inner):
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                losses = self._losses(moment.predict(leaf, there, moment.condition), moment, number)
                (gradient,) = torch.autograd.grad(losses.sum(), leaf)
            x = x - gradient
        return dataclasses.replace(state, x=x)

    def _losses(self, prediction: Prediction, moment: Moment, number: int) -> Tensor:
        losses = self.zeta * residual_norms(prediction, moment)
        if self.eta == 0:
            return losses
        x, z = prediction.x, moment.normal(number)
        shifted = moment.predict(x + self.reach * z, prediction.level, moment.condition)
        trace = trace_estimate(prediction.score, shifted.score, z, self.reach)
        return losses + self.eta / x[0].numel() * trace
