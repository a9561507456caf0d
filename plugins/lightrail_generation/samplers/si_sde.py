"""The stochastic differential equation of a stochastic interpolant."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from torch import Tensor

from lightrail.generation import Grid, Level, Predict, Sampler, State, weighted_sum
from lightrail.options import non_negative, one_of
from lightrail.traits import Traits

__all__ = ["SHAPES", "SISDE", "diffusion"]

SHAPES = ("constant", "noise", "bridge")


def diffusion(epsilon: float, shape: str, here: Level, there: Level) -> float:
    """ε of one step: as much as is asked for, but its noise, 2 ε h, has at most half of the variance reached.

    Args:
        epsilon: Its size.
        shape: ``constant``, ``noise`` (times σ) or ``bridge`` (times α σ).
        here: Where the step begins.
        there: Where it ends.
    """
    factors = {"constant": 1.0, "noise": here.sigma, "bridge": here.alpha * here.sigma}
    return min(epsilon * factors[shape], there.sigma**2 / (4 * abs(there.t - here.t)))


class SISDE(Sampler):
    """Follows the flow and lets the score pull back what fresh noise pushes out.

    dX = (b + ε s) dr + √(2ε) dW,  b = −u = −dx/dt, s = ∇ log p, along r = −t

    The marginals are the path's own whatever ε ≥ 0 is; 0 is the flow itself. Noise corrects errors made earlier.

    Args:
        steps: Steps, at least 1.
        epsilon: ε, at least 0, in squared units of the state per unit of time.
        shape: How ε changes along the path: ``constant``; ``noise``, ε σ, which vanishes at the data; ``bridge``,
            ε α σ, which vanishes at both ends.
        method: ``euler`` (Euler–Maruyama, one evaluation a step) or ``heun`` (two, of weak order 2).

    Raises:
        ConfigurationError: An option is out of range.

    Deviations:
        The score grows without bound toward the data, and a step with 2 ε h > σ² would add more noise than is to be
        left. ε is lowered there to σ_t²/(4h), which is 0 for the step to the data; as any ε leaves the marginals as
        they are, this costs nothing as steps get finer. Published code of a Heun step takes both slopes at the end of
        the step, which is of order 1; here they are taken at its two ends.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail_generation.time_grids.uniform import Uniform
        >>> mixture, sampler = GaussianMixture(path="flow"), SISDE(steps=10, method="heun")
        >>> sample(mixture, sampler, sampler.grid(mixture.path, Uniform()), range(4)).evaluations
        19

    Reference:
        M. S. Albergo, N. M. Boffi and E. Vanden-Eijnden (2023), Stochastic Interpolants: A Unifying Framework for Flows
        and Diffusions, arXiv 2303.08797, section 2.3.
    """

    traits: ClassVar[Traits] = Traits(
        rule="dX = (b + ε s) dr + √(2ε) dW",
        paper="M. S. Albergo, N. M. Boffi, E. Vanden-Eijnden, 2023, Stochastic Interpolants: A Unifying Framework for "
        "Flows and Diffusions, arXiv 2303.08797",
        is_stochastic=True,
        solves_reverse_diffusion=True,
        needs_predictions=("flow", "score"),
        example={"steps": 10},
    )
    grid_name = "uniform"
    needs_finite_start = False

    @staticmethod
    def traits_under(options: dict[str, object]) -> Traits:
        """Without noise it is the flow, solved by Euler's or Heun's method."""
        if options.get("epsilon") != 0:
            return SISDE.traits
        order = 2 if options.get("method") == "heun" else 1
        return dataclasses.replace(SISDE.traits, is_stochastic=False, order=order, solves_reverse_diffusion=False)

    def __init__(self, steps: int = 50, epsilon: float = 1.0, shape: str = "constant", method: str = "euler") -> None:
        super().__init__(steps)
        non_negative(epsilon=epsilon)
        one_of(SHAPES, shape=shape)
        one_of(("euler", "heun"), method=method)
        self.epsilon = epsilon
        self.shape = shape
        self.method = method

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        here, there = grid[state.index], grid[state.index + 1]
        h = there.t - here.t
        epsilon = diffusion(self.epsilon, self.shape, here, there)
        drift = self._drift(state.x, here, predict, epsilon)
        kicks = [(math.sqrt(2 * epsilon * abs(h)), state.normal())] if epsilon else []
        end = weighted_sum((1.0, state.x), (h, drift), *kicks)
        if self.method == "heun" and not there.is_clean:
            again = self._drift(end, there, predict, epsilon)
            end = weighted_sum((1.0, end), (h / 2, again), (-h / 2, drift))
        return state.next(end)

    @staticmethod
    def _drift(x: Tensor, level: Level, predict: Predict, epsilon: float) -> Tensor:
        """Against t, so that h < 0 takes it toward the data: u − ε s."""
        prediction = predict(x, level)
        return weighted_sum((1.0, prediction.flow), (-epsilon, prediction.score)) if epsilon else prediction.flow

    def evaluations(self, grid: Grid) -> int:
        stages = 2 if self.method == "heun" else 1
        return grid.steps * stages - (stages == 2 and grid[-1].is_clean) + grid.denoises_last
