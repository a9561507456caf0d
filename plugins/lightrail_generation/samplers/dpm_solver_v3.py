"""DPM-Solver-v3: the parametrisation that suits the model, from its statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lightrail.errors import ConfigurationError
from lightrail.generation import Denoiser, Grid, Level, Predict, Prediction, Sampler, State
from lightrail.generation.search import Artefact
from lightrail.options import at_least, between
from lightrail.traits import Traits
from lightrail_generation.samplers.model_statistics import ModelStatistics, step_weights, weighted_states

__all__ = ["DPMSolverV3", "remainder", "solved"]


def solved(
    statistics: ModelStatistics,
    x: Tensor,
    here: Level,
    there: Level,
    points: Sequence[tuple[float, Tensor]],
    pseudo: bool = False,
) -> Tensor:
    """x_t = α_t e^{−L} (x_s/α_s − Σ w_j f_j − c): one step.

    Args:
        statistics: l, s and b of the model.
        x: x_s.
        here: The level s, α > 0 and σ > 0.
        there: The level t, σ > 0.
        points: (λ_j, f_j) through which the polynomial goes; the first is at s, one may be at t.
        pseudo: See :func:`step_weights`.
    """
    weights = step_weights(statistics, here.lam, there.lam, tuple(lam for lam, _ in points), pseudo)
    scale = there.alpha * weights.decay
    terms = [(-scale * w, f) for w, (_, f) in zip(weights.of_f, points, strict=True)]
    return weighted_states((scale / here.alpha, x), *terms, (-scale * weights.constant, None), like=x)


def remainder(prediction: Prediction, statistics: ModelStatistics) -> Tensor:
    """f = (σ ε − l x)/α = (1 − l) x/α − D: what is left to extrapolate of a prediction."""
    level, x = prediction.level, prediction.x
    l = l_at(statistics, level.lam, x)  # noqa: E741
    if prediction.form == "noise":
        return weighted_states((level.rho, prediction.noise), (-l / level.alpha, x), like=x)
    return weighted_states((-1.0, prediction.data), ((1 - l) / level.alpha, x), like=x)


def l_at(statistics: ModelStatistics, lam: float, like: Tensor) -> Any:
    """l at one λ, a number or a tensor ``[*shape]``."""
    value = statistics.at(np.array([lam]))[0][0]
    return float(value) if np.ndim(value) == 0 else torch.as_tensor(value, device=like.device)


class DPMSolverV3(Sampler):
    """A multistep method on f = (σ ε − l x)/α, for the l, s and b that leave the least to extrapolate.

    x_t = α_t e^{−L} (x_s/α_s − ∫ e^{L+S} B dλ − ∫ e^{L+S} g dλ), g = e^{−S} f − B, with L = ∫ l, S = ∫ s and
    B = ∫ e^{−S} b from λ_s, and g a polynomial in λ through the last values.

    The statistics of a model are measured once, by ``lightrail search ems``. (l, s, b) = (1, 0, 0) extrapolates the
    data, (0, −1, 0) the noise.

    Args:
        steps: Steps, each one evaluation, at least 1.
        order: From 1 to 3.
        statistics: ``data``, ``noise``, or the file that the search wrote.
        pseudo: Whether the predictor takes derivatives of g from divided differences of low order.
        corrector: Whether each state is corrected once the model was asked there, at no evaluation more; for few
            steps.
        corrector_pseudo: Whether the corrector is one order higher, with derivatives of low order.
        half: Whether only the cleaner half of the path is corrected, as large guidance wants.
        lower_order_final: Whether the order falls to 1 over the last steps.

    Raises:
        ConfigurationError: An option is out of range, or the file holds no statistics.
        DataError: The file cannot be read.
        CompositionError: It is for another model, or another noise path.

    Deviations:
        The published code moves the knots onto those of the statistics; here the statistics are linear between theirs
        and constant beyond, so that knots stay. The step to σ = 0, which the paper leaves out, is DDIM's.

    Example:
        >>> DPMSolverV3(steps=8).order
        3

    Reference:
        K. Zheng, C. Lu, J. Chen and J. Zhu (2023), DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model
        Statistics, arXiv 2310.13268, section 3, and appendix A.2 for l = 1.
    """

    traits: ClassVar[Traits] = Traits(
        rule="x_t = α_t e^{−L} (x_s/α_s − ∫ e^{L+S} (B + g) dλ), g = e^{−S} (σ ε − l x)/α − B",
        paper="K. Zheng, C. Lu, J. Chen, J. Zhu, 2023, DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical "
        "Model Statistics, arXiv 2310.13268",
        order=2,
        steps_from_newest=False,  # the corrector steps once more from the state before
        needs_predictions=("data",),
        example={"steps": 10},
    )

    @staticmethod
    def traits_under(options: dict[str, Any]) -> Traits:
        """``order`` needs derivatives that are exact to it, and the last step to be of it too."""
        order = options.get("order", 3)
        corrects = options.get("corrector", True)
        if corrects and options.get("corrector_pseudo", True):
            order = 2
        elif options.get("pseudo") or options.get("lower_order_final", True):
            order = min(order, 2)
        return dataclasses.replace(DPMSolverV3.traits, order=order, steps_from_newest=not corrects)

    def __init__(
        self,
        steps: int = 10,
        order: int = 3,
        statistics: str = "data",
        pseudo: bool = False,
        corrector: bool = True,
        corrector_pseudo: bool = True,
        half: bool = False,
        lower_order_final: bool = True,
    ) -> None:
        super().__init__(steps)
        at_least(1, order=order)
        between(1, 3, closed="both", order=order)
        self.order = order
        self.pseudo = pseudo
        self.corrector = corrector
        self.corrector_pseudo = corrector_pseudo
        self.half = half
        self.lower_order_final = lower_order_final
        known = {"data": ModelStatistics.constant(1.0), "noise": ModelStatistics.constant(0.0, -1.0)}
        self.artefact = None if statistics in known else Artefact.load(statistics)
        if self.artefact is None:
            self.statistics = known[statistics]
        else:
            self.statistics = _statistics(self.artefact, statistics)

    def settings(self) -> dict[str, Any]:
        """How it is set, but for the statistics."""
        names = ("steps", "order", "pseudo", "corrector", "corrector_pseudo", "half", "lower_order_final")
        return {name: getattr(self, name) for name in names}

    def prepare(self, denoiser: Denoiser) -> None:
        if self.artefact is not None:
            self.artefact.check(denoiser=denoiser)

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        here, there = grid[state.index], grid[state.index + 1]
        now = (here.lam, remainder(predict(state.x, here), self.statistics))
        before = tuple(zip(state.memory.get("lams", ()), state.memory.get("remainders", ()), strict=True))
        # The remainder stays what it was at the state that was predicted.
        x = self._corrected(state, now, before, grid)
        points = (now, *before)[: self.order]
        if there.is_clean:
            share = (1 - l_at(self.statistics, here.lam, x)) / here.alpha
            after = weighted_states((there.alpha * share, x), (-there.alpha, now[1]), like=x)
        else:
            after = solved(self.statistics, x, here, there, points[: self._order_at(state.index, grid)], self.pseudo)
        lams, remainders = zip(*points, strict=True)
        return state.next(after, base=x, lams=lams, remainders=remainders)

    def _order_at(self, index: int, grid: Grid) -> int:
        order = min(self.order, index + 1)
        return min(order, grid.steps - index) if self.lower_order_final else order

    def _corrects(self, here: Level, grid: Grid) -> bool:
        path = grid.path
        return self.corrector and (not self.half or here.t - path.t_zero <= 0.5 * (path.t_max - path.t_zero))

    def _corrected(
        self, state: State, now: tuple[float, Tensor], before: tuple[tuple[float, Tensor], ...], grid: Grid
    ) -> Tensor:
        """The state as solved again from the one before, with what the model said of it."""
        here = grid[state.index]
        if not before or not self._corrects(here, grid):
            return state.x
        order = min(self._order_at(state.index - 1, grid), len(before)) + self.corrector_pseudo
        if order < 2:
            return state.x
        points = (before[0], now, *before[1:])[:order]
        base = state.memory["base"]
        return solved(self.statistics, base, grid[state.index - 1], here, points, self.corrector_pseudo)


def _statistics(artefact: Artefact, file: str) -> ModelStatistics:
    values = artefact.values
    if not {"lam", "l", "s", "b"} <= values.keys():
        raise ConfigurationError(
            f"the search '{artefact.search}' found no statistics",
            found=f"{file}: {', '.join(values)}",
            allowed="data, noise, or the file of the search ems",
            remedy="Search first: lightrail search ems …; then name its file in sampler.statistics.",
        )
    return ModelStatistics(*(np.asarray(values[name], dtype=np.float64) for name in ("lam", "l", "s", "b")))
