"""Denoising diffusion implicit models."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from torch import Tensor

from lightrail.generation import Grid, Level, Predict, Prediction, Sampler, State, weighted_sum
from lightrail.options import between
from lightrail.traits import Traits
from lightrail_generation.samplers.adams import combined, terms_of

__all__ = ["DDIM", "transfer"]


def transfer(prediction: Prediction, there: Level, x: Tensor | None = None) -> Tensor:
    """x_t = α_t D + σ_t ε: where the path leads if the prediction is right.

    Written as (σ_t/σ_s) x − α_t (e^{−h} − 1) D with h = λ_t − λ_s, it is exact at σ_t = 0 and from α_s = 0.

    Args:
        prediction: At the level that the states are at.
        there: Where they go, up or down the path.
        x: The states; those of the prediction by default.
    """
    here = prediction.level
    ratio = there.sigma / here.sigma
    states = prediction.x if x is None else x
    return combined((ratio, states), *terms_of(prediction, "data", there.alpha - ratio * here.alpha))


class DDIM(Sampler):
    """Follows the predicted data and noise to the next level, with as much fresh noise as ``eta`` says.

    x_t = α_t D + √(σ_t² − s²) ε + s z,  s = η σ_t √(1 − e^{−2h}),  h = λ_t − λ_s

    η = 0 is Euler's method on the probability flow in ρ = σ/α, and deterministic; η = 1 is ancestral sampling.

    Args:
        steps: Steps, each one evaluation, at least 1.
        eta: η, the share of fresh noise, in [0, 1].

    Raises:
        ConfigurationError: An option is out of range.

    Deviations:
        s is written for any path; on one with α² + σ² = 1 it is the paper's η (σ_t/σ_s) √(1 − α_s²/α_t²).

    Example:
        >>> DDIM(steps=10).evaluations.__name__
        'evaluations'

    Reference:
        J. Song, C. Meng and S. Ermon (2021), Denoising Diffusion Implicit Models, arXiv 2010.02502, equations 12
        and 16.
    """

    traits: ClassVar[Traits] = Traits(
        rule="x_t = α_t D + √(σ_t² − s²) ε + s z, s = η σ_t √(1 − e^{−2h})",
        paper="J. Song, C. Meng, S. Ermon, 2021, Denoising Diffusion Implicit Models, arXiv 2010.02502",
        order=1,
        is_invertible=True,
        needs_predictions=("data",),
        example={"steps": 10},
    )

    @staticmethod
    def traits_under(options: dict[str, float]) -> Traits:
        """With fresh noise it is stochastic, and has no order and no inverse."""
        if not options.get("eta"):
            return DDIM.traits
        eta = options["eta"]
        return dataclasses.replace(
            DDIM.traits,
            is_stochastic=True,
            order=None,
            is_invertible=False,
            fresh_noise=eta,
            solves_reverse_diffusion=eta == 1,
        )

    def __init__(self, steps: int = 50, eta: float = 0.0) -> None:
        super().__init__(steps)
        between(0, 1, closed="both", eta=eta)
        self.eta = eta

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        here, there = grid[state.index], grid[state.index + 1]
        prediction = predict(state.x, here)
        if not self.eta or there.is_clean:
            return state.next(transfer(prediction, there))
        s = self.eta * there.sigma * math.sqrt(-math.expm1(-2 * (there.lam - here.lam)))
        kept = math.sqrt(max(0.0, there.sigma**2 - s**2))
        ratio = kept / here.sigma
        terms = terms_of(prediction, "data", there.alpha - ratio * here.alpha)
        return state.next(combined((ratio, state.x), *terms, (s, state.normal())))

    def invert(self, state: State, predict: Predict, grid: Grid) -> State:
        """The same rule up the path, with the noise predicted at the cleaner end: right to first order."""
        if self.eta:
            return super().invert(state, predict, grid)
        x = state.x
        for index in reversed(range(grid.steps)):
            here, there = grid[index + 1], grid[index]
            if here.is_clean:
                # At σ = 0 the noise cannot be asked for: the network is asked as if the data lay one level up.
                noise = predict(x, there).noise
                x = weighted_sum((there.alpha / here.alpha, x), (there.sigma, noise))
            else:
                x = transfer(predict(x, here), there)
        return dataclasses.replace(state, x=x, index=0)
