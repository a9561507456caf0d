"""The deterministic and the stochastic sampler of Karras and others, first and second order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from lightrail.errors import ConfigurationError
from lightrail.generation import Grid, Level, NoisePath, Predict, Prediction, Sampler, State
from lightrail.options import non_negative
from lightrail.traits import Traits
from lightrail_generation.samplers.adams import along_rho, combined, terms_of

__all__ = ["EDMEuler", "EDMHeun", "churned", "euler", "heun"]

PAPER = (
    "T. Karras, M. Aittala, T. Aila, S. Laine, 2022, Elucidating the Design Space of Diffusion-Based Generative "
    "Models, arXiv 2206.00364"
)


def euler(prediction: Prediction, there: Level) -> Tensor:
    """x_t = α_t (x_s/α_s + (ρ_t − ρ_s) ε)."""
    here = prediction.level
    return along_rho(prediction.x, here, there, (there.rho - here.rho, prediction))


def heun(prediction: Prediction, there: Level, predict: Predict) -> Tensor:
    """x_t = α_t (x_s/α_s + (ρ_t − ρ_s) (ε + ε')/2), ε' predicted where Euler's step leads; Euler's own to σ_t = 0.

    Args:
        prediction: At s.
        there: t.
        predict: Asks the network, once unless σ_t = 0.
    """
    x, here = prediction.x, prediction.level
    guess = euler(prediction, there)
    if there.is_clean:
        return guess
    # Half of Euler's step is (guess − (α_t/α_s) x)/2: the first slope need not be read again.
    half = there.alpha * (there.rho - here.rho) / 2
    return combined((there.alpha / here.alpha / 2, x), (0.5, guess), *terms_of(predict(guess, there), "noise", half))


def churned(
    x: Tensor, here: Level, gamma: float, path: NoisePath, noise: Callable[[], Tensor], s_noise: float = 1.0
) -> tuple[Tensor, Level]:
    """The states with fresh noise, at the level ρ̂ = (1 + γ) ρ: x̂ = (α̂/α) x + α̂ √(ρ̂² − ρ²) S_noise z.

    Args:
        x: The states.
        here: Their level.
        gamma: γ, at least 0; at 0 they stay as they are and nothing is drawn.
        path: The noise path; where it ends before ρ̂, its end is taken.
        noise: Gives z.
        s_noise: S_noise.
    """
    if gamma == 0:
        return x, here
    there = path.level_at_lam(here.lam - math.log1p(gamma))
    spread = math.sqrt(max(0.0, there.rho**2 - here.rho**2))
    if spread == 0:
        return x, here
    return combined((there.alpha / here.alpha, x), (there.alpha * spread * s_noise, noise())), there


class EDMEuler(Sampler):
    """Euler's method in ρ = σ/α, with fresh noise before each step where that is wanted.

    ρ̂ = (1 + γ) ρ,  x̂ = (α̂/α) x + α̂ √(ρ̂² − ρ²) S_noise z,  x' = α' (x̂/α̂ + (ρ' − ρ̂) ε(x̂)),
    γ = min(S_churn/N, √2 − 1) where S_min ≤ ρ ≤ S_max, else 0

    Without churn it is ``ddim``.

    Args:
        steps: N, each one evaluation, at least 1.
        s_churn: S_churn, at least 0: how much noise is renewed in the whole run; 0 for none.
        s_min: S_min, at least 0: the least ρ at which noise is renewed.
        s_max: S_max, at least S_min: the most.
        s_noise: S_noise, at least 0: the scale of the fresh noise; slightly above 1 makes up for what a network takes
            away too much.

    Raises:
        ConfigurationError: An option is out of range.

    Deviations:
        The paper's σ is ρ here, so that it works on any path. Where a path ends before (1 + γ) ρ, noise is added up to
        its end.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail.catalogue import load
        >>> mixture, sampler = GaussianMixture(path="edm"), EDMEuler(steps=18)
        >>> grid = sampler.grid(mixture.path, load("time_grid", sampler.grid_name)())
        >>> sample(mixture, sampler, grid, range(4)).evaluations
        18

    Reference:
        T. Karras, M. Aittala, T. Aila and S. Laine (2022), Elucidating the Design Space of Diffusion-Based Generative
        Models, arXiv 2206.00364, algorithm 2 without its second-order correction.
    """

    traits: ClassVar[Traits] = Traits(
        rule="x' = α' (x/α + (ρ' − ρ) ε), after a rise to (1 + γ) ρ",
        paper=PAPER,
        order=1,
        needs_predictions=("data",),
        example={"steps": 10},
    )
    grid_name = "karras"

    @staticmethod
    def traits_under(options: Mapping[str, Any]) -> Traits:
        """With churn it is stochastic and has no order."""
        return _churning(EDMEuler.traits, options)

    def __init__(
        self,
        steps: int = 18,
        s_churn: float = 0.0,
        s_min: float = 0.0,
        s_max: float = math.inf,
        s_noise: float = 1.0,
    ) -> None:
        super().__init__(steps)
        non_negative(s_churn=s_churn, s_min=s_min, s_noise=s_noise)
        if not s_max >= s_min:
            raise ConfigurationError(
                "s_max is below s_min",
                found=f"s_max={s_max}, s_min={s_min}",
                allowed="s_max at least s_min; inf for no bound",
                remedy="Raise s_max, or lower s_min.",
            )
        self.s_churn = s_churn
        self.s_min = s_min
        self.s_max = s_max
        self.s_noise = s_noise

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        here, there = grid[state.index], grid[state.index + 1]
        is_churned = self.s_churn > 0 and self.s_min <= here.rho <= self.s_max
        gamma = min(self.s_churn / grid.steps, math.sqrt(2) - 1) if is_churned else 0.0
        x, here = churned(state.x, here, gamma, grid.path, state.normal, self.s_noise)
        return state.next(self._moved(predict(x, here), there, predict))

    def _moved(self, prediction: Prediction, there: Level, predict: Predict) -> Tensor:
        return euler(prediction, there)


class EDMHeun(EDMEuler):
    """Heun's method in ρ = σ/α, with fresh noise before each step where that is wanted.

    ρ̂ = (1 + γ) ρ,  x̂ = (α̂/α) x + α̂ √(ρ̂² − ρ²) S_noise z,  x' = α' (x̂/α̂ + (ρ' − ρ̂) (ε(x̂) + ε(x'₁))/2),
    γ = min(S_churn/N, √2 − 1) where S_min ≤ ρ ≤ S_max, else 0; x'₁ is where Euler's step leads

    The step to σ = 0 is Euler's.

    Args:
        steps: N, two evaluations each, one for the step to σ = 0; at least 1.
        s_churn: S_churn, at least 0: how much noise is renewed in the whole run; 0 for none.
        s_min: S_min, at least 0: the least ρ at which noise is renewed.
        s_max: S_max, at least S_min: the most.
        s_noise: S_noise, at least 0: the scale of the fresh noise; slightly above 1 makes up for what a network takes
            away too much.

    Raises:
        ConfigurationError: An option is out of range.

    Deviations:
        The paper's σ is ρ here, so that it works on any path. Where a path ends before (1 + γ) ρ, noise is added up to
        its end.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail.catalogue import load
        >>> mixture, sampler = GaussianMixture(path="edm"), EDMHeun(steps=18)
        >>> grid = sampler.grid(mixture.path, load("time_grid", sampler.grid_name)())
        >>> sample(mixture, sampler, grid, range(4)).evaluations
        35

    Reference:
        T. Karras, M. Aittala, T. Aila and S. Laine (2022), Elucidating the Design Space of Diffusion-Based Generative
        Models, arXiv 2206.00364, algorithms 1 and 2.
    """

    traits: ClassVar[Traits] = Traits(
        rule="x' = α' (x/α + (ρ' − ρ) (ε + ε')/2), after a rise to (1 + γ) ρ",
        paper=PAPER,
        order=2,
        needs_predictions=("data",),
        example={"steps": 10},
    )

    @staticmethod
    def traits_under(options: Mapping[str, Any]) -> Traits:
        """With churn it is stochastic and has no order."""
        return _churning(EDMHeun.traits, options)

    def _moved(self, prediction: Prediction, there: Level, predict: Predict) -> Tensor:
        return heun(prediction, there, predict)

    def evaluations(self, grid: Grid) -> int:
        return 2 * grid.steps - grid[-1].is_clean + grid.denoises_last


def _churning(traits: Traits, options: Mapping[str, Any]) -> Traits:
    return dataclasses.replace(traits, is_stochastic=True, order=None) if options.get("s_churn") else traits
