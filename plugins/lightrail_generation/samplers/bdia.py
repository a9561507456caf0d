"""Bi-directional integration approximation."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from lightrail.errors import CompositionError
from lightrail.generation import Grid, Level, Predict, Prediction, Sampler, State, weighted_sum
from lightrail.options import between
from lightrail.traits import Traits
from lightrail_generation.samplers.ddim import DDIM, transfer

__all__ = ["BDIA", "leap", "leap_back"]


def _weights(here: Level, before: Level, there: Level, gamma: float) -> tuple[float, float]:
    """Those of x_s and of D in T(x_s; s→t) − γ T(x_s; s→before)."""
    forward, backward = there.sigma / here.sigma, before.sigma / here.sigma
    of_x = forward - gamma * backward
    return of_x, there.alpha - gamma * before.alpha - of_x * here.alpha


def leap(prediction: Prediction, previous: Tensor, before: Level, there: Level, gamma: float) -> Tensor:
    """x_t = T(x_s; s→t) + γ (x_before − T(x_s; s→before)): a step on, and one back to mend the last."""
    of_x, of_data = _weights(prediction.level, before, there, gamma)
    return weighted_sum((of_x, prediction.x), (of_data, prediction.data), (gamma, previous))


def leap_back(prediction: Prediction, following: Tensor, before: Level, there: Level, gamma: float) -> Tensor:
    """x_before from x_s and x_t: the same equation the other way."""
    of_x, of_data = _weights(prediction.level, before, there, gamma)
    return weighted_sum((1 / gamma, following), (-of_x / gamma, prediction.x), (-of_data / gamma, prediction.data))


class BDIA(Sampler):
    """Steps with DDIM from the state before the last, mended by a DDIM step backwards: exactly invertible.

    x_t = T(x_s; s→t) + γ (x_before − T(x_s; s→before)),  T one step of DDIM; the first step is T alone

    It is linear in (x_before, x_s, D), so the equation can be solved for x_before: given the last two states, a run
    goes back to its noise with no error but rounding, which grows like γ^−steps. With γ = 1 it is the leapfrog rule,
    of order 2 where neighbouring steps are nearly of a length; below, of order 1; with 0 it is DDIM, and has no exact
    inverse.

    A run leaves the state before its last in the memory (``previous``). :meth:`invert` starts from it; where only the
    last state is known, as for an image of the user's, γ must be 1, and the last step is undone the way DDIM does, to
    first order; with a smaller γ that error would grow as rounding does. What
    comes out is then the start of another run, whose second state is left in the memory (``following``): solving on
    from that state leads back to the image exactly. A time grid that ends with ``denoise`` loses the last state.

    Args:
        steps: Steps, each one evaluation, at least 1.
        gamma: γ, in [0, 1]. For inversion take 1: rounding alone spoils 20 steps in single precision with 0.5.

    Raises:
        ConfigurationError: An option is out of range.
        CompositionError: γ = 0 is to be inverted, or γ < 1 without the state before the last.

    Deviations:
        The paper also applies the idea to second-order rules (EDM's, DPM-Solver++ 2M), whose last slope needs the state
        that is sought, so that they lose the inverse; they are not here. Over the first-order rules of both it is
        this method.

    Example:
        >>> from lightrail.generation import GaussianMixture, invert, sample
        >>> from lightrail_generation.time_grids.uniform_lambda import UniformLambda
        >>> mixture, sampler = GaussianMixture(), BDIA(steps=10)
        >>> grid = sampler.grid(mixture.path, UniformLambda())
        >>> drawn = sample(mixture, sampler, grid, range(4))
        >>> invert(mixture, sampler, grid, drawn.x, range(4)).evaluations
        10

    Reference:
        G. Zhang, J. P. Lewis and W. B. Kleijn (2024), Exact Diffusion Inversion via Bi-directional Integration
        Approximation, arXiv 2307.10829.
    """

    traits: ClassVar[Traits] = Traits(
        rule="x_t = T(x_s; s→t) + γ (x_before − T(x_s; s→before))",
        paper="G. Zhang, J. P. Lewis, W. B. Kleijn, 2024, Exact Diffusion Inversion via Bi-directional Integration "
        "Approximation, arXiv 2307.10829",
        order=2,
        is_invertible=True,
        steps_from_newest=False,
        needs_predictions=("data",),
        example={"steps": 10},
        exceptions={
            "has_its_order_on_uneven_grids": "the leapfrog rule is of order 2 where neighbouring steps are nearly of a "
            "length, as in time grids given by a formula, and of order 1 where they are not"
        },
    )

    @staticmethod
    def traits_under(options: dict[str, float]) -> Traits:
        """Of order 2, and invertible from the last state alone, with γ = 1 only."""
        if options.get("gamma", 1.0) == 1:
            return BDIA.traits
        return dataclasses.replace(BDIA.traits, order=1, is_invertible=False, exceptions={})

    def __init__(self, steps: int = 40, gamma: float = 1.0) -> None:
        super().__init__(steps)
        between(0, 1, closed="both", gamma=gamma)
        self.gamma = gamma

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        index, following = state.index, state.memory.get("following")
        if index == 0 and following is not None:
            return state.next(following, previous=state.x, following=None)
        prediction = predict(state.x, grid[index])
        if index == 0:
            return state.next(transfer(prediction, grid[1]), previous=state.x)
        before, there = grid[index - 1], grid[index + 1]
        return state.next(leap(prediction, state.memory["previous"], before, there, self.gamma), previous=state.x)

    def invert(self, state: State, predict: Predict, grid: Grid) -> State:
        """Exact from the last two states; the last step is undone to first order where only one is known."""
        following, x = state.x, state.memory.get("previous")
        if self.gamma == 0 or (x is None and self.gamma < 1):
            raise CompositionError(
                "bdia with gamma below 1 cannot be inverted from the last state alone",
                found=f"sampler.gamma={self.gamma:g} with generate.invert",
                allowed="gamma=1, for which what is not known of the state before the last does not grow",
                remedy="Set sampler.gamma=1.",
            )
        if x is None:
            tail = Grid(grid.path, grid.levels[-2:])
            x = DDIM(steps=1).invert(State(following, state.noise, index=1), predict, tail).x
        for index in reversed(range(1, grid.steps)):
            prediction = predict(x, grid[index])
            x, following = leap_back(prediction, following, grid[index - 1], grid[index + 1], self.gamma), x
        memory = {**state.memory, "previous": None, "following": following}
        return dataclasses.replace(state, x=x, index=0, memory=memory)
