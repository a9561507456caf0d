"""The diffusion exponential integrator sampler: multistep and Runge-Kutta in ρ = σ/α."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from lightrail.generation import Grid, Level, NoisePath, Predict, Prediction, Sampler, State
from lightrail.options import at_least, between, one_of
from lightrail.traits import Traits
from lightrail_generation.samplers.adams import along_rho
from lightrail_generation.samplers.edm import euler, heun
from lightrail_generation.samplers.exponential import lagrange_weights
from lightrail_generation.samplers.pndm import EQUAL_STEPS, adams

__all__ = ["DEIS", "TABLEAUS", "multistep_weights", "runge_kutta"]

# Which variable the polynomial through the last predictions is in.
VARIABLES = {"tab": "t", "rhoab": "rho", "loglam": "lam"}

# Of each stage beyond the first: where it lies, and the weights of the stages before; last, the weights of the step.
TABLEAUS = {
    "rho_midpoint": (((1 / 2, (1 / 2,)),), (0.0, 1.0)),
    "rho_kutta3": (((1 / 2, (1 / 2,)), (1.0, (-1.0, 2.0))), (1 / 6, 2 / 3, 1 / 6)),
    "rho_rk4": (
        ((1 / 2, (1 / 2,)), (1 / 2, (0.0, 1 / 2)), (1.0, (0.0, 0.0, 1.0))),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6),
    ),
}
STAGES = {"rho_heun": 2, "rho_midpoint": 2, "rho_kutta3": 3, "rho_rk4": 4}
METHODS = ("tab", "rhoab", "rho_heun", "rho_midpoint", "rho_kutta3", "rho_rk4", "ipndm", "loglam")


@functools.lru_cache(maxsize=4096)
def multistep_weights(path: NoisePath, there: Level, knots: tuple[Level, ...], variable: str) -> tuple[float, ...]:
    """The w_j with which x_t = α_t (x_s/α_s + Σ w_j ε_j): w_j = ∫ L_j dρ from ρ_s to ρ_t.

    L_j is the polynomial in ``variable`` that is 1 at knot j and 0 at the others; kept, for the batches that follow.

    Args:
        path: The noise path.
        there: t.
        knots: Where the predictions are, the newest first, at s.
        variable: t, rho or lam, λ = −log ρ.
    """
    if there.is_clean and variable == "lam":
        # λ is infinite there, and a polynomial in it says nothing.
        return (-knots[0].rho, *(0.0 for _ in knots[1:]))
    weights = lagrange_weights(path, knots[0], there, knots, variable, "noise")
    return tuple(weight / there.alpha for weight in weights)


def runge_kutta(prediction: Prediction, there: Level, predict: Predict, path: NoisePath, method: str) -> Tensor:
    """A step of d(x/α)/dρ = ε by a classical rule of Runge and Kutta.

    Args:
        prediction: The first stage, at s.
        there: t; σ_t > 0 where the rule has a stage there.
        predict: Asks the network, at each further stage.
        path: The noise path, for the levels between.
        method: A key of ``TABLEAUS``.
    """
    x, here = prediction.x, prediction.level
    span = there.rho - here.rho
    rows, weights = TABLEAUS[method]
    stages = [prediction]
    for place, row in rows:
        level = there if place == 1 else path.level_at_lam(-math.log(here.rho + place * span))
        guess = along_rho(x, here, level, *((span * a, e) for a, e in zip(row, stages, strict=True) if a))
        stages.append(predict(guess, level))
    return along_rho(x, here, there, *((span * b, e) for b, e in zip(weights, stages, strict=True) if b))


class DEIS(Sampler):
    """Solves the linear part of the probability flow exactly and extrapolates the noise by a polynomial.

    x_t = (α_t/α_s) x_s + α_t Σ_j ε_{−j} ∫ L_j dρ from ρ_s to ρ_t,  ρ = σ/α

    - ``tab``, ``rhoab``, ``loglam``: L_j is the Lagrange polynomial in t, in ρ or in λ = −log ρ through the last
      ``order`` + 1 predictions; of that order, on any grid.
    - ``rho_heun``, ``rho_midpoint``, ``rho_kutta3``, ``rho_rk4``: Runge and Kutta on d(x/α)/dρ = ε, of order 2, 2, 3
      and 4, with as many evaluations a step.
    - ``ipndm``: ``rhoab`` with the weights of equal steps in ρ, whatever the grid; order 2 at most on
      smooth others.

    Args:
        steps: Steps, one evaluation each but for Runge and Kutta; at least 1.
        method: One of the above.
        order: Predictions that are looked back at, 0 to 3; 0 is DDIM. Runge and Kutta do not look back.

    Raises:
        ConfigurationError: An option is out of range.

    Deviations:
        The integrals are worked out by Gauss and Legendre in double precision; the published code sums 10,000 terms, to
        about four digits. The first steps have a shorter history. A step to σ = 0 is DDIM's for ``loglam``, and for
        rules of Runge and Kutta with a stage there. ``loglam`` is what diffusers' ``DEISMultistepScheduler`` does, with
        ``solver_order`` = order + 1.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail.catalogue import load
        >>> mixture, sampler = GaussianMixture(), DEIS(steps=10)
        >>> grid = sampler.grid(mixture.path, load("time_grid", sampler.grid_name)())
        >>> sample(mixture, sampler, grid, range(4)).evaluations
        10

    Reference:
        Q. Zhang and Y. Chen (2022), Fast Sampling of Diffusion Models with Exponential Integrator, arXiv 2204.13902,
        sections 3 and 4.
    """

    traits: ClassVar[Traits] = Traits(
        rule="x_t = α_t (x_s/α_s + Σ ε_j ∫ L_j dρ)",
        paper=(
            "Q. Zhang, Y. Chen, 2022, Fast Sampling of Diffusion Models with Exponential Integrator, arXiv 2204.13902"
        ),
        order=4,
        needs_predictions=("noise",),
        example={"steps": 10},
    )
    grid_name = "quadratic"

    @staticmethod
    def traits_under(options: Mapping[str, Any]) -> Traits:
        """The order is the method's."""
        method, looks_back = options.get("method", "tab"), options.get("order", 3)
        order = {"rho_heun": 2, "rho_midpoint": 2, "rho_kutta3": 3, "rho_rk4": 4, "ipndm": min(2, looks_back + 1)}
        exceptions = EQUAL_STEPS if method == "ipndm" and looks_back else {}
        return dataclasses.replace(DEIS.traits, order=order.get(method, looks_back + 1), exceptions=exceptions)

    def __init__(self, steps: int = 10, method: str = "tab", order: int = 3) -> None:
        super().__init__(steps)
        one_of(METHODS, method=method)
        at_least(0, order=order)
        between(0, 3, closed="both", order=order)
        self.method = method
        self.order = order

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        here, there = grid[state.index], grid[state.index + 1]
        prediction = predict(state.x, here)
        if self.method in STAGES:
            return state.next(self._in_stages(prediction, there, predict, grid.path))
        older = state.history[: self.order]
        noises = [each.noise for each in older]
        if self.method == "ipndm":
            x = adams(state.x, here, there, prediction, *noises)
        else:
            knots = (here, *(each.level for each in older))
            first, *others = multistep_weights(grid.path, there, knots, VARIABLES[self.method])
            x = along_rho(state.x, here, there, (first, prediction), *zip(others, noises, strict=True))
        return state.next(x, history=(prediction, *older)[: self.order])

    def _in_stages(self, prediction: Prediction, there: Level, predict: Predict, path: NoisePath) -> Tensor:
        if self.method == "rho_heun":
            return heun(prediction, there, predict)
        if there.is_clean and self.method != "rho_midpoint":
            return euler(prediction, there)
        return runge_kutta(prediction, there, predict, path, self.method)

    def evaluations(self, grid: Grid) -> int:
        stages = STAGES.get(self.method, 1)
        left_out = stages - 1 if grid[-1].is_clean and self.method != "rho_midpoint" else 0
        return stages * grid.steps - left_out + grid.denoises_last
