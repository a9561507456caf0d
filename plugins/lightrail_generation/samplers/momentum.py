"""Multistep samplers with momentum, which stay stable at fewer steps."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from lightrail.generation import Grid, Level, Predict, Prediction, Sampler, State, weighted_sum
from lightrail.options import between
from lightrail.traits import Traits
from lightrail_generation.samplers.adams import ADAMS, adams_bashforth, along_rho, combined, of_differences, terms_of
from lightrail_generation.samplers.pndm import EQUAL_STEPS, adams

__all__ = ["GHVB", "HeavyBall", "Nesterov", "damping", "generalized_weights"]

PAPER = (
    "S. Wizadwongsa, W. Chinchuthakun, P. Khungurn, A. Raj, S. Suwajanakorn, 2024, Diffusion Sampling with Momentum "
    "for Mitigating Divergence Artifacts, arXiv 2307.11118"
)


def damping(order: float) -> tuple[int, float]:
    """The number of predictions n and the damping β behind an order n − 1 + β, with 0 < β ≤ 1.

    Example:
        >>> damping(2.5), damping(3.0)
        ((3, 0.5), (3, 1.0))
    """
    n = math.ceil(order)
    return n, order - (n - 1)


@functools.cache
def generalized_weights(n: int, beta: float) -> tuple[float, ...]:
    """The weights of v_0, v_{−1}, … in the generalized heavy-ball method, newest first; they sum to 1.

    v = (1 − β) v_{−1} + β ε is ε = (1 + (1 − β)/β ∇) v, put into Adams and Bashforth's Σ γ_i ∇^i ε and cut off
    after ∇^{n−1}.

    Args:
        n: 1 to 5.
        beta: β, in (0, 1].

    Example:
        >>> [round(w, 6) for w in generalized_weights(2, 0.5)]
        [2.5, -1.5]
    """
    lag = (1 - beta) / beta
    return of_differences([ADAMS[i] + (lag * ADAMS[i - 1] if i else 0) for i in range(n)])


class _Momentum(Sampler):
    grid_name = "uniform"

    def __init__(self, steps: int, order: float) -> None:
        super().__init__(steps)
        between(0, 5, closed="right", order=order)
        self.order = order
        self.n, self.beta = damping(order)


class HeavyBall(_Momentum):
    """Polyak's heavy ball over a pseudo linear multistep method: moves along a running mean of its slopes.

    p = Σ b_j ε_{−j},  v = (1 − β) v + β p,  x_t = α_t (x_s/α_s + (ρ_t − ρ_s) v)

    b are the weights of Adams and Bashforth for n = ⌈order⌉ predictions, β = order − n + 1. The region of stability is
    (2 − β)/β times as long as that of ``plms``; the price is an order of 1 unless β = 1.

    Args:
        steps: Steps, each one evaluation, at least 1.
        order: A number in (0, 5]; a whole one is ``plms`` of that order, and the lower its fraction, the stronger the
            momentum.

    Raises:
        ConfigurationError: An option is out of range.

    Deviations:
        v starts as the first slope, and the first steps have a shorter history, as in the published code.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail.catalogue import load
        >>> mixture, sampler = GaussianMixture(), HeavyBall(steps=20)
        >>> grid = sampler.grid(mixture.path, load("time_grid", sampler.grid_name)())
        >>> sample(mixture, sampler, grid, range(4)).evaluations
        20

    Reference:
        S. Wizadwongsa, W. Chinchuthakun, P. Khungurn, A. Raj and S. Suwajanakorn (2024), Diffusion Sampling with
        Momentum for Mitigating Divergence Artifacts, arXiv 2307.11118, section 4.1.
    """

    traits: ClassVar[Traits] = Traits(
        rule="v = (1 − β) v + β Σ b_j ε_j, x_t = α_t (x_s/α_s + (ρ_t − ρ_s) v)",
        paper=PAPER,
        order=1,
        needs_predictions=("noise",),
        example={"steps": 10},
    )

    @staticmethod
    def traits_under(options: Mapping[str, Any]) -> Traits:
        """A whole order is that of ``plms``."""
        return _at_whole_orders(HeavyBall.traits, options)

    def __init__(self, steps: int = 20, order: float = 3.8) -> None:
        super().__init__(steps, order)

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        here, there = grid[state.index], grid[state.index + 1]
        prediction = predict(state.x, here)
        if self.beta < 1:
            return self._moved(state, prediction, there)
        older = state.history[: self.n - 1]
        x = adams(state.x, here, there, prediction, *(each.noise for each in older))
        return state.next(x, history=(prediction, *older)[: self.n - 1])

    def _slope(self, prediction: Prediction, older: tuple[Prediction, ...]) -> list[tuple[float, Tensor]]:
        first, *others = adams_bashforth(len(older) + 1)
        return [
            *terms_of(prediction, "noise", first),
            *((b, each.noise) for b, each in zip(others, older, strict=True)),
        ]

    def _moved(self, state: State, prediction: Prediction, there: Level) -> State:
        here, older = prediction.level, state.history[: self.n - 1]
        before = state.memory.get("momentum")
        slope = self._slope(prediction, older)
        v = combined((1 - self.beta, prediction.noise if before is None else before), *_times(self.beta, slope))
        x = along_rho(state.x, here, there, (there.rho - here.rho, v))
        return state.next(x, history=(prediction, *older)[: self.n - 1], momentum=v)


class Nesterov(HeavyBall):
    """Nesterov's momentum over a pseudo linear multistep method: the running mean, mixed once more with the new slope.

    p = Σ b_j ε_{−j},  v = (1 − β) v + β p,  x_t = α_t (x_s/α_s + (ρ_t − ρ_s) ((1 − β) v + β p))

    b are the weights of Adams and Bashforth for n = ⌈order⌉ predictions, β = order − n + 1. It has order 1
    unless β = 1, with a smaller error than ``heavy_ball``.

    Args:
        steps: Steps, each one evaluation, at least 1.
        order: A number in (0, 5]; a whole one is ``plms`` of that order, and the lower its fraction, the stronger the
            momentum.

    Raises:
        ConfigurationError: An option is out of range.

    Deviations:
        v starts as the first slope, and the first steps have a shorter history, as in the published code.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail.catalogue import load
        >>> mixture, sampler = GaussianMixture(), Nesterov(steps=20)
        >>> grid = sampler.grid(mixture.path, load("time_grid", sampler.grid_name)())
        >>> sample(mixture, sampler, grid, range(4)).evaluations
        20

    Reference:
        S. Wizadwongsa, W. Chinchuthakun, P. Khungurn, A. Raj and S. Suwajanakorn (2024), Diffusion Sampling with
        Momentum for Mitigating Divergence Artifacts, arXiv 2307.11118, appendix.
    """

    traits: ClassVar[Traits] = dataclasses.replace(
        HeavyBall.traits, rule="v = (1 − β) v + β p, x_t = α_t (x_s/α_s + (ρ_t − ρ_s) ((1 − β) v + β p)), p = Σ b_j ε_j"
    )

    @staticmethod
    def traits_under(options: Mapping[str, Any]) -> Traits:
        """A whole order is that of ``plms``."""
        return _at_whole_orders(Nesterov.traits, options)

    def _moved(self, state: State, prediction: Prediction, there: Level) -> State:
        here, older = prediction.level, state.history[: self.n - 1]
        p = combined(*self._slope(prediction, older))
        v = weighted_sum((1 - self.beta, state.memory.get("momentum", p)), (self.beta, p))
        span = there.rho - here.rho
        x = along_rho(state.x, here, there, (span * (1 - self.beta), v), (span * self.beta, p))
        return state.next(x, history=(prediction, *older)[: self.n - 1], momentum=v)


class GHVB(_Momentum):
    """The generalized heavy ball: a running mean of the predictions, extrapolated so that the order is kept.

    v = (1 − β) v + β ε,  x_t = α_t (x_s/α_s + (ρ_t − ρ_s) Σ w_j v_{−j})

    n = ⌈order⌉ means are combined and β = order − n + 1; w are such that the method has order n at equal steps in ρ. A
    lower β widens the region of stability.

    Args:
        steps: Steps, each one evaluation, at least 1.
        order: A number in (0, 5]; a whole one is ``plms`` of that order.

    Raises:
        ConfigurationError: An option is out of range.

    Deviations:
        v starts as the first prediction, and the first steps have a shorter history, as in the published code. On
        smooth grids that are not uniform in ρ the order is 2 at most.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail.catalogue import load
        >>> mixture, sampler = GaussianMixture(), GHVB(steps=20)
        >>> grid = sampler.grid(mixture.path, load("time_grid", sampler.grid_name)())
        >>> sample(mixture, sampler, grid, range(4)).evaluations
        20

    Reference:
        S. Wizadwongsa, W. Chinchuthakun, P. Khungurn, A. Raj and S. Suwajanakorn (2024), Diffusion Sampling with
        Momentum for Mitigating Divergence Artifacts, arXiv 2307.11118, section 4.2.
    """

    traits: ClassVar[Traits] = dataclasses.replace(
        HeavyBall.traits,
        rule="v = (1 − β) v + β ε, x_t = α_t (x_s/α_s + (ρ_t − ρ_s) Σ w_j v_j)",
        order=2,
        exceptions=EQUAL_STEPS,
    )

    @staticmethod
    def traits_under(options: Mapping[str, Any]) -> Traits:
        """Of one prediction it has order 1."""
        if options.get("order", 2.5) > 1:
            return GHVB.traits
        return dataclasses.replace(GHVB.traits, order=1, exceptions={})

    def __init__(self, steps: int = 20, order: float = 2.5) -> None:
        super().__init__(steps, order)

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        here, there = grid[state.index], grid[state.index + 1]
        prediction = predict(state.x, here)
        older = state.memory.get("momentum", ())
        v = self._mean(prediction, older)
        means = (v, *older)[: self.n]
        span = there.rho - here.rho
        weights = generalized_weights(len(means), self.beta)
        x = along_rho(state.x, here, there, *((span * w, mean) for w, mean in zip(weights, means, strict=True)))
        return state.next(x, momentum=means[: max(1, self.n - 1)])

    def _mean(self, prediction: Prediction, older: tuple[Tensor, ...]) -> Tensor:
        if not older or self.beta == 1:
            return prediction.noise
        return combined((1 - self.beta, older[0]), *terms_of(prediction, "noise", self.beta))


def _times(factor: float, terms: Iterable[tuple[float, Tensor]]) -> list[tuple[float, Tensor]]:
    return [(factor * weight, tensor) for weight, tensor in terms]


def _at_whole_orders(traits: Traits, options: Mapping[str, Any]) -> Traits:
    n, beta = damping(options.get("order", 3.8))
    return dataclasses.replace(traits, order=2, exceptions=EQUAL_STEPS) if beta == 1 and n > 1 else traits
