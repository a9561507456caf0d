"""The ratios of DC-Solver, fitted step by step to fine solutions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from lightrail.errors import CompositionError
from lightrail.generation import Level, Predict, Prediction, State
from lightrail.generation.search import Artefact, Report, Search, SearchProblem, silent
from lightrail.options import at_least, between
from lightrail.traits import Traits
from lightrail_generation.samplers.dc_solver import DEGREE, DCSolver
from lightrail_generation.samplers.unipc import UniPC

__all__ = ["DCRatios", "smallest"]

GOLDEN = (math.sqrt(5) - 1) / 2


def smallest(loss: Callable[[float], float], low: float, high: float, trials: int) -> tuple[float, float]:
    """A minimum of a function near 1: the best of a row of places, then golden sections around it.

    Args:
        loss: Of a number.
        low: Below 1.
        high: Above 1.
        trials: How often the loss is asked, at least 8.

    Returns:
        The place and the loss there, which is at most that at 1.

    Example:
        >>> place, _ = smallest(lambda r: (r - 1.3) ** 2, 0.5, 2.0, 40)
        >>> round(place, 3)
        1.3
    """
    row = trials // 4
    places = [1.0, *(low + (high - low) * i / row for i in range(row + 1))]
    losses = {place: loss(place) for place in places}
    best = min(losses, key=losses.__getitem__)
    width = (high - low) / row
    a, b = max(low, best - width), min(high, best + width)
    c, d = b - GOLDEN * (b - a), a + GOLDEN * (b - a)
    for _ in range(trials - row - 2):
        for place in (c, d):
            if place not in losses:
                losses[place] = loss(place)
        if losses[c] < losses[d]:
            b, d, c = d, c, d - GOLDEN * (d - a)
        else:
            a, c, d = c, d, c + GOLDEN * (b - c)
    best = min(losses, key=losses.__getitem__)
    return best, losses[best]


class DCRatios(Search):
    """Fits the ratios of DC-Solver, each with those before it fixed.

    r_i = argmin E |x_{i+1}(r) − x*(t_{i+1})|², with x_{i+1} as the corrector leaves it and x* the fine solution of the
    same start.

    Args:
        samples: On which they are fitted, at least 1.
        trials: Losses for each ratio, at least 8.
        lowest: The smallest ratio, in (0, 1).
        highest: The largest, above 1.
        held_out: Other samples, for the scores in the table, at least 2.

    Raises:
        ConfigurationError: An option is out of range.
        CompositionError: The sampler is neither ``dc_solver`` nor ``unipc``.

    Deviations:
        The published code descends by AdamW through the network, 40 steps from 1, towards the nearest earlier step of
        a 200-step DDIM run. Here a ratio is one number in a range, found by golden sections without gradients, towards
        a second-order solution at the very time. A regression over steps and guidance scales is not made: each setting
        is searched by itself, in seconds.

    Example:
        >>> DCRatios().samples
        10

    Reference:
        W. Zhao, H. Wang, J. Zhou and J. Lu (2024), DC-Solver: Improving Predictor-Corrector Diffusion Sampler via
        Dynamic Compensation, arXiv 2409.03755, section 3.
    """

    traits: ClassVar[Traits] = Traits(
        rule="r_i = argmin E |x_{i+1}(r) − x*(t_{i+1})|²",
        paper="W. Zhao, H. Wang, J. Zhou, J. Lu, 2024, DC-Solver: Improving Predictor-Corrector Diffusion Sampler via "
        "Dynamic Compensation, arXiv 2409.03755",
        example={"samples": 4, "trials": 12, "held_out": 8},
    )

    replaces: ClassVar[tuple[str, ...]] = ("sampler",)

    def __init__(
        self, samples: int = 10, trials: int = 40, lowest: float = 0.25, highest: float = 2.5, held_out: int = 256
    ) -> None:
        at_least(1, samples=samples)
        at_least(8, trials=trials)
        at_least(2, held_out=held_out)
        between(0, 1, closed="neither", lowest=lowest)
        between(1, 10, closed="right", highest=highest)
        self.samples = samples
        self.trials = trials
        self.lowest = lowest
        self.highest = highest
        self.held_out = held_out

    @torch.no_grad()
    def search(self, problem: SearchProblem, report: Report = silent) -> Artefact:
        solver = _solver_of(problem)
        indices = range(self.samples)
        exact = problem.solution(indices)
        predict = problem.predictor(indices)
        state = solver.start(problem.starts(indices), problem.noise(indices), problem.grid)
        ratios, losses = [], []
        for index in range(problem.grid.steps):
            asked = _Remembered(predict)
            ratio, loss = 1.0, None
            if index >= DEGREE:
                loss_of = self._loss(problem, solver, state, asked, exact[index + 1])
                ratio, loss = smallest(loss_of, self.lowest, self.highest, self.trials)
            state = solver.advanced(state, asked, problem.grid, ratio)
            ratios.append(ratio)
            losses.append(loss)
            report(index + 1, problem.grid.steps, loss)
        held_out = range(self.samples, self.samples + self.held_out)
        fitted = DCSolver(problem.grid.steps, **solver.settings(), ratios=ratios)
        values = {"ratios": ratios, "losses": losses, "solver": solver.settings()}
        plain = problem.scores(held_out, sampler=solver)
        return Artefact("dc_ratios", problem.key(), values, plain, problem.scores(held_out, sampler=fitted))

    def _loss(
        self, problem: SearchProblem, solver: DCSolver, state: State, predict: Predict, target: Tensor
    ) -> Callable[[float], float]:
        grid = problem.grid

        def loss(ratio: float) -> float:
            after = solver.advanced(state, predict, grid, ratio)
            x = after.x
            if after.index < grid.steps:
                x = solver.corrected(after, predict(x, grid[after.index]), grid)
            elif grid.denoises_last:
                x = predict(x, grid[-1]).data
            return float((x - target).double().square().mean())

        return loss

    def words(self, artefact: Artefact, path: str) -> list[str]:
        settings = artefact.values["solver"].items()
        options = [f"sampler.{name}={str(value).lower()}" for name, value in settings]
        steps = f"sampler.steps={len(artefact.values['ratios'])}"
        return ["+sampler=dc_solver", steps, *options, f"sampler.ratios={path}"]


class _Remembered:
    """Asks the network about one state once, however many ratios are tried there."""

    def __init__(self, predict: Predict) -> None:
        self.predict = predict
        self.known: tuple[Tensor, Prediction] | None = None

    def __call__(self, x: Tensor, level: Level, *, network_time: Tensor | float | None = None) -> Prediction:
        if self.known is None:
            self.known = x, self.predict(x, level, network_time=network_time)
        if x is self.known[0]:
            return self.known[1]
        return self.predict(x, level, network_time=network_time)


def _solver_of(problem: SearchProblem) -> DCSolver:
    held = problem.sampler
    if not isinstance(held, UniPC):
        raise CompositionError(
            "the ratios are those of DC-Solver",
            found=f"sampler {type(held).__name__}",
            allowed="dc_solver, or unipc, which it is built on; no wrapper around it",
            remedy="Choose +sampler=dc_solver.",
        )
    names = ("order", "form", "b", "corrector", "corrector_start", "lower_order_final")
    return DCSolver(problem.grid.steps, **{name: getattr(held, name) for name in names})
