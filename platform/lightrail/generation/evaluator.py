"""The network as a sampler asks it: with its condition, guided, counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightrail.generation.denoiser import Condition, Denoiser
from lightrail.generation.guidance import GUIDANCE_DRAWS, VISIT_DRAWS, Guidance, Moment
from lightrail.generation.measurement import Observed
from lightrail.generation.noise import Noise
from lightrail.generation.noise_path import Level
from lightrail.generation.prediction import Prediction
from lightrail.generation.sampler import State, mapped
from lightrail.generation.time_grid import Grid

__all__ = ["Evaluator"]


class Evaluator:
    """Asks a denoiser about a batch under its condition, guided, and counts.

    What a chain of guidance asks together is asked in one call of the network; what one of them makes of it is ``cond``
    to the next.

    Args:
        denoiser: The network on its path.
        condition: What steers these samples, one row each.
        guidance: What else does, in order.
        grid: The levels of the run; needed where there is guidance.
        noise: The random numbers of these samples; needed where there is guidance.
        observed: What was measured of them, one row each.

    Attributes:
        evaluations: How often the network was asked for each sample.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        condition: Condition | None = None,
        guidance: Sequence[Guidance] = (),
        grid: Grid | None = None,
        noise: Noise | None = None,
        observed: Observed | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.condition = condition
        self.guidance = tuple(guidance)
        self.evaluations = 0
        self._grid = grid
        self._noise = noise
        self._observed = observed
        self._index = 0
        self._memories: list[dict[str, Any]] = [{} for _ in self.guidance]
        self._first: Prediction | None = None
        self._visits: dict[int, int] = {0: 1}  # how often each step was begun

    def __call__(self, x: Tensor, level: Level, *, network_time: Tensor | float | None = None) -> Prediction:
        if not self.guidance:
            self.evaluations += 1
            return self.denoiser.predict(x, level, self.condition, network_time)
        keeps_graph = any(
            each.needs_every_gradient or (each.needs_gradient and self._first is None) for each in self.guidance
        )
        with torch.set_grad_enabled(keeps_graph or torch.is_grad_enabled()):
            asked = x.detach().requires_grad_() if keeps_graph else x
            prediction = self._guided(asked, level, network_time)
        if self._first is None:
            self._first = prediction
        return prediction.map(Tensor.detach) if keeps_graph else prediction

    def _guided(self, x: Tensor, level: Level, network_time: Tensor | float | None) -> Prediction:
        moments = [self._moment(number, x, level, time=network_time) for number in range(len(self.guidance))]
        active = [(each, moment) for each, moment in zip(self.guidance, moments, strict=True) if each.is_active(moment)]
        asks_uncond = any("uncond" in each.asks for each, _ in active)
        conditions = [self.condition, *([self.denoiser.unconditional(self.condition)] if asks_uncond else [])]
        self.evaluations += len(conditions)
        found = self.denoiser.predict_each(x, level, conditions, network_time)
        named: dict[str, Prediction] = dict(zip(("cond", "uncond"), found, strict=False))
        named["plain"] = found[0]
        for each, moment in active:
            for name in each.asks:
                if name not in ("cond", "uncond", "plain"):
                    self.evaluations += 1
                    named[name] = each.evaluate(name, moment)
            named["cond"] = each.mix(named, moment)
        prediction = named["cond"]
        for each, moment in active:
            prediction = each.correct(prediction, moment)
        return prediction

    def _moment(
        self,
        number: int,
        x: Tensor,
        level: Level,
        prediction: Prediction | None = None,
        time: Tensor | float | None = None,
    ) -> Moment:
        """What guidance of this number in the chain sees."""
        assert self._grid is not None
        assert self._noise is not None
        return Moment(
            self.denoiser,
            self.condition,
            self._grid,
            self._index,
            self._noise,
            x,
            level,
            self._memories[number],
            prediction,
            self._resampled,
            self._observed,
            self._count,
            time,
            GUIDANCE_DRAWS * (number + 1) + VISIT_DRAWS * (self._visits.get(self._index, 1) - 1),
        )

    def _count(self, evaluations: int) -> None:
        self.evaluations += evaluations

    def before(self, number: int, x: Tensor) -> Moment:
        """What guidance of this number in the chain sees before the first step, at the states ``x``."""
        assert self._grid is not None
        return self._moment(number, x, self._grid[0])

    def after_step(self, state: State) -> State:
        """Lets guidance act on the state after a step."""
        first = self._first
        if first is not None:
            for number, each in enumerate(self.guidance):
                moment = self._moment(number, first.x.detach(), first.level, first)
                if each.is_active(moment):
                    state = each.after_step(state, moment)
        self._index, self._first = state.index, None
        self._visits[state.index] = self._visits.get(state.index, 0) + 1
        return state

    def _resampled(self, state: State, rows: Tensor) -> State:
        for memory in self._memories:
            memory.update({name: mapped(value, lambda tensor: tensor[rows]) for name, value in memory.items()})
        return state.select(rows)

    def begin(self) -> None:
        """Forgets what guidance remembers, before the samples are run (again)."""
        self._index, self._first = 0, None
        self._visits = {0: 1}
        for memory in self._memories:
            memory.clear()
