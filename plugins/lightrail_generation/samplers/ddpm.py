"""Ancestral sampling."""

from __future__ import annotations

import math
from typing import ClassVar

from lightrail.generation import Grid, Level, Predict, Sampler, State
from lightrail.options import one_of
from lightrail.traits import Traits
from lightrail_generation.samplers.adams import combined, terms_of

__all__ = ["DDPM", "posterior"]

VARIANCES = ("small", "large")


def posterior(here: Level, there: Level, variance: str = "small") -> tuple[float, float, float]:
    """The (c₀, c_t, s) of x_t = c₀ D + c_t x_s + s z, the step back from s to t if D is the data.

    With r = (σ_t α_s)/(α_t σ_s): c₀ = α_t (1 − r²), c_t = r σ_t/σ_s, and s² = σ_t² (1 − r²), the variance of q(x_t |
    x_s, x0), or σ_s² (1 − r²), that of q(x_s | x_t).

    Args:
        here: s; α_s = 0 is allowed.
        there: t; σ_t = 0 is allowed, and then no noise is added.
        variance: ``small`` or ``large``, s² as above.
    """
    if there.is_clean:
        return there.alpha, 0.0, 0.0
    ratio = there.sigma * here.alpha / (there.alpha * here.sigma)
    gone = -math.expm1(-2 * (there.lam - here.lam))  # 1 − r²
    spread = there.sigma if variance == "small" else here.sigma
    return there.alpha * gone, ratio * there.sigma / here.sigma, spread * math.sqrt(gone)


class DDPM(Sampler):
    """Draws each level from the posterior of the level before, given the predicted data.

    x_{t−1} = √ᾱ_{t−1} β/(1 − ᾱ_t) D + √(1 − β) (1 − ᾱ_{t−1})/(1 − ᾱ_t) x_t + √V z,  β = 1 − ᾱ_t/ᾱ_{t−1},
    V = β (1 − ᾱ_{t−1})/(1 − ᾱ_t), or β

    β is worked out anew between the levels that are visited, so any number of steps will do.

    Args:
        steps: Steps, each one evaluation, at least 1.
        variance: ``small`` for the posterior's own variance, right for data that are one point; ``large`` for β, right
            for data that are white noise.

    Raises:
        ConfigurationError: An option is out of range.

    Deviations:
        Written for any path, α² + σ² = 1 or not: ``small`` is then exact for data that are one point, and on every path
        the same as ``ddim`` with eta=1. The variance that some networks learn is not read. Where the last level keeps
        some noise, the last step draws too.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail.catalogue import load
        >>> mixture, sampler = GaussianMixture(), DDPM(steps=20)
        >>> grid = sampler.grid(mixture.path, load("time_grid", sampler.grid_name)())
        >>> sample(mixture, sampler, grid, range(4)).evaluations
        20

    Reference:
        J. Ho, A. Jain and P. Abbeel (2020), Denoising Diffusion Probabilistic Models, arXiv 2006.11239, equations 6
        and 7, algorithm 2. Respacing: A. Nichol and P. Dhariwal (2021), Improved Denoising Diffusion Probabilistic
        Models, arXiv 2102.09672, section 4.
    """

    traits: ClassVar[Traits] = Traits(
        rule="x_t = α_t (1 − e^{−2h}) D + (σ_t/σ_s) e^{−h} x_s + σ_t √(1 − e^{−2h}) z",
        paper="J. Ho, A. Jain, P. Abbeel, 2020, Denoising Diffusion Probabilistic Models, arXiv 2006.11239",
        is_stochastic=True,
        fresh_noise=1.0,
        solves_reverse_diffusion=True,
        needs_predictions=("data",),
        example={"steps": 20},
    )
    grid_name = "uniform"

    def __init__(self, steps: int = 1000, variance: str = "small") -> None:
        super().__init__(steps)
        one_of(VARIANCES, variance=variance)
        self.variance = variance

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        here, there = grid[state.index], grid[state.index + 1]
        of_data, of_x, spread = posterior(here, there, self.variance)
        terms = [*terms_of(predict(state.x, here), "data", of_data), (of_x, state.x)]
        if spread:
            terms.append((spread, state.normal()))
        return state.next(combined(*terms))
