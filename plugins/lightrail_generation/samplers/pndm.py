"""Pseudo numerical methods: linear multistep and Runge-Kutta with the transfer of DDIM."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from lightrail.errors import ConfigurationError
from lightrail.generation import Grid, Level, NoisePath, Predict, Prediction, Sampler, State
from lightrail.options import at_least, between, one_of
from lightrail.traits import Traits
from lightrail_generation.samplers.adams import adams_bashforth, along_rho
from lightrail_generation.samplers.edm import heun

__all__ = ["EQUAL_STEPS", "FPNDM", "PLMS", "SPNDM", "adams", "pseudo_runge_kutta"]

PAPER = (
    "L. Liu, Y. Ren, Z. Lin, Z. Zhao, 2022, Pseudo Numerical Methods for Diffusion Models on Manifolds, "
    "arXiv 2202.09778"
)
WARMUPS = ("adams", "heun")
EQUAL_STEPS = {"has_its_order_on_uneven_grids": "the weights are those of equal steps: over random ones it has order 1"}


def adams(x: Tensor, here: Level, there: Level, *slopes: Prediction | Tensor) -> Tensor:
    """x_t = α_t (x_s/α_s + (ρ_t − ρ_s) Σ b_j ε_j), with the weights of Adams and Bashforth for equal steps.

    Args:
        x: The states at ``here``.
        here: s.
        there: t.
        slopes: ε at s and at the levels before, newest first, 1 to 5 of them.
    """
    span = there.rho - here.rho
    weights = adams_bashforth(len(slopes))
    return along_rho(x, here, there, *((span * b, e) for b, e in zip(weights, slopes, strict=True)))


def pseudo_runge_kutta(prediction: Prediction, middle: Level, there: Level, predict: Predict) -> Tensor:
    """The classical fourth-order rule with DDIM's transfer in place of each Euler step; three more evaluations.

    x_t = T(x, (ε₁ + 2 ε₂ + 2 ε₃ + ε₄)/6),  T(x, ε) = α_t (x/α_s + (ρ_t − ρ_s) ε)

    Args:
        prediction: ε₁, at s.
        middle: Where ε₂ and ε₃ are predicted, at the middle of time.
        there: t, where ε₄ is; σ_t > 0.
        predict: Asks the network.
    """
    x, here = prediction.x, prediction.level
    half, span = middle.rho - here.rho, there.rho - here.rho
    second = predict(along_rho(x, here, middle, (half, prediction)), middle)
    third = predict(along_rho(x, here, middle, (half, second)), middle)
    fourth = predict(along_rho(x, here, there, (span, third)), there)
    weights = ((span / 6, prediction), (span / 3, second), (span / 3, third), (span / 6, fourth))
    return along_rho(x, here, there, *weights)


class PLMS(Sampler):
    """Pseudo linear multistep: DDIM's step with an extrapolation of the last predictions.

    x_t = α_t (x_s/α_s + (ρ_t − ρ_s) ε̄),  ε̄ = (55 ε_0 − 59 ε_{−1} + 37 ε_{−2} − 9 ε_{−3})/24

    The first steps have a shorter history and use the rules of lower order.

    Args:
        steps: Steps, each one evaluation, at least 1.
        order: How many predictions are combined, 1 to 5; 1 is DDIM.
        warmup: ``adams`` begins with a step of DDIM; ``heun`` takes its first step by Heun's rule, for one evaluation
            more.

    Raises:
        ConfigurationError: An option is out of range.

    Deviations:
        The weights are those of equal steps in ρ, as in the published code; where neighbouring steps differ little, as
        on the default grid, the order is 2 at most, and 1 over steps of any length. ``deis`` has weights for the grid
        at hand. With warmup=heun it is what diffusers' ``PNDMScheduler`` does under skip_prk_steps.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail.catalogue import load
        >>> mixture, sampler = GaussianMixture(), PLMS(steps=20)
        >>> grid = sampler.grid(mixture.path, load("time_grid", sampler.grid_name)())
        >>> sample(mixture, sampler, grid, range(4)).evaluations
        20

    Reference:
        L. Liu, Y. Ren, Z. Lin and Z. Zhao (2022), Pseudo Numerical Methods for Diffusion Models on Manifolds, arXiv
        2202.09778, section 3 and equation 9.
    """

    traits: ClassVar[Traits] = Traits(
        rule="x_t = α_t (x_s/α_s + (ρ_t − ρ_s) Σ b_j ε_j)",
        paper=PAPER,
        order=2,
        needs_predictions=("noise",),
        example={"steps": 10},
        exceptions=EQUAL_STEPS,
    )
    grid_name = "uniform"

    @staticmethod
    def traits_under(options: Mapping[str, Any]) -> Traits:
        """Of one prediction it is DDIM."""
        return PLMS.traits if options.get("order", 4) > 1 else dataclasses.replace(PLMS.traits, order=1, exceptions={})

    def __init__(self, steps: int = 50, order: int = 4, warmup: str = "adams") -> None:
        super().__init__(steps)
        at_least(1, order=order)
        between(1, 5, closed="both", order=order)
        one_of(WARMUPS, warmup=warmup)
        self.order = order
        self.warmup = warmup

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        here, there = grid[state.index], grid[state.index + 1]
        prediction = predict(state.x, here)
        older = state.history[: self.order - 1]
        history = (prediction, *older)[: max(1, self.order - 1)]
        if self.warmup == "heun" and not state.history:
            return state.next(heun(prediction, there, predict), history=history)
        x = adams(state.x, here, there, prediction, *(each.noise for each in older))
        return state.next(x, history=history)

    def evaluations(self, grid: Grid) -> int:
        return grid.steps + (self.warmup == "heun" and not grid[1].is_clean) + grid.denoises_last


class SPNDM(PLMS):
    """The second-order pseudo numerical method: a step by Heun's rule, then two predictions at a time.

    x_t = α_t (x_s/α_s + (ρ_t − ρ_s) (3 ε_0 − ε_{−1})/2)

    Args:
        steps: Steps, each one evaluation, and one more for the first; at least 1.

    Deviations:
        As for ``plms``: the weights are those of equal steps in ρ. It keeps order 2 where
        neighbouring steps differ little.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail.catalogue import load
        >>> mixture, sampler = GaussianMixture(), SPNDM(steps=20)
        >>> grid = sampler.grid(mixture.path, load("time_grid", sampler.grid_name)())
        >>> sample(mixture, sampler, grid, range(4)).evaluations
        21

    Reference:
        L. Liu, Y. Ren, Z. Lin and Z. Zhao (2022), Pseudo Numerical Methods for Diffusion Models on Manifolds, arXiv
        2202.09778, section 3 and appendix (S-PNDM).
    """

    traits: ClassVar[Traits] = dataclasses.replace(
        PLMS.traits, rule="x_t = α_t (x_s/α_s + (ρ_t − ρ_s) (3 ε_0 − ε_{−1})/2)"
    )

    @staticmethod
    def traits_under(options: Mapping[str, Any]) -> Traits:
        """As declared."""
        return SPNDM.traits

    def __init__(self, steps: int = 50) -> None:
        super().__init__(steps, order=2, warmup="heun")


class FPNDM(Sampler):
    """The fourth-order pseudo numerical method: three steps of Runge and Kutta, then four predictions at a time.

    x_t = α_t (x_s/α_s + (ρ_t − ρ_s) ε̄),  ε̄ = (55 ε_0 − 59 ε_{−1} + 37 ε_{−2} − 9 ε_{−3})/24, in the first three steps
    ε̄ = (ε₁ + 2 ε₂ + 2 ε₃ + ε₄)/6 with ε₂ and ε₃ predicted at the time (s + t)/2

    Args:
        steps: Steps, each one evaluation, and three more for each of the first three; at least 1.
        whole_times: Whether (s + t)/2 is rounded down to a whole time, for a network that knows no other.

    Raises:
        ConfigurationError: When a step has no whole time within it.

    Deviations:
        The weights are those of equal steps in ρ; on smooth other grids the order is 2, as in the published code, which
        rounds (s + t)/2 down always. A step of Runge and Kutta that would end at σ = 0, where no network is asked,
        uses the multistep rule of the history there is.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail.catalogue import load
        >>> mixture, sampler = GaussianMixture(), FPNDM(steps=20)
        >>> grid = sampler.grid(mixture.path, load("time_grid", sampler.grid_name)())
        >>> sample(mixture, sampler, grid, range(4)).evaluations
        29

    Reference:
        L. Liu, Y. Ren, Z. Lin and Z. Zhao (2022), Pseudo Numerical Methods for Diffusion Models on Manifolds, arXiv
        2202.09778, section 3 (F-PNDM).
    """

    traits: ClassVar[Traits] = dataclasses.replace(
        PLMS.traits, rule="x_t = α_t (x_s/α_s + (ρ_t − ρ_s) (55 ε_0 − 59 ε_{−1} + 37 ε_{−2} − 9 ε_{−3})/24)"
    )
    grid_name = "uniform"

    def __init__(self, steps: int = 50, whole_times: bool = False) -> None:
        super().__init__(steps)
        self.whole_times = whole_times

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        here, there = grid[state.index], grid[state.index + 1]
        prediction = predict(state.x, here)
        older = state.history[:3]
        if len(older) < 3 and not there.is_clean:
            x = pseudo_runge_kutta(prediction, self._middle(grid.path, here, there), there, predict)
        else:
            x = adams(state.x, here, there, prediction, *(each.noise for each in older))
        return state.next(x, history=(prediction, *older)[:3])

    def _middle(self, path: NoisePath, here: Level, there: Level) -> Level:
        middle = (here.t + there.t) / 2
        if not self.whole_times:
            return path.level(middle)
        whole = math.floor(middle + 1e-6)  # grids round: 398.9999999999999 is meant as 399
        if whole < there.t - 1e-6:
            raise ConfigurationError(
                "a step holds no whole time",
                found=f"sampler.whole_times=true, a step from t={here.t:.6g} to t={there.t:.6g}",
                allowed="a path whose times are counted in training steps",
                remedy="Set sampler.whole_times=false.",
            )
        return path.level(float(whole))

    def evaluations(self, grid: Grid) -> int:
        longer = sum(not level.is_clean for level in grid.levels[1:4])
        return grid.steps + 3 * longer + grid.denoises_last
