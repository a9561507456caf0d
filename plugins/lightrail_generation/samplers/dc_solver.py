"""DC-Solver: the newest prediction is moved in time before each step, by ratios that were fitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from lightrail.errors import ConfigurationError
from lightrail.generation import Denoiser, Grid, NoisePath, Predict, Prediction, State, TimeGrid, weighted_sum
from lightrail.generation.search import Artefact
from lightrail.options import positive
from lightrail.traits import Traits
from lightrail_generation.samplers.exponential import carried, lagrange_basis
from lightrail_generation.samplers.unipc import UniPC, predictor_weights

__all__ = ["DEGREE", "DCSolver", "compensated"]

# Of the polynomial through the last predictions: K in the paper.
DEGREE = 2


def compensated(history: Sequence[Prediction], ratio: float, form: str) -> Prediction:
    """The newest prediction, replaced by the polynomial through the last ones at t' = r t_0 + (1 − r) t_{−1}.

    Args:
        history: Predictions, the newest first, at least ``DEGREE`` + 1.
        ratio: r; 1 changes nothing.
        form: What is interpolated, ``data`` or ``noise``.
    """
    newest, *older = history[: DEGREE + 1]
    times = [each.level.t for each in (newest, *older)]
    place = ratio * times[0] + (1 - ratio) * times[1]
    weights = [float(row[0]) for row in lagrange_basis(times, [place])]
    value = weighted_sum(*((w, each.get(form)) for w, each in zip(weights, (newest, *older), strict=True)))
    return Prediction(newest.x, newest.level, form, value)


class DCSolver(UniPC):
    """UniPC in which, before each step, the newest prediction is moved along those before it.

    m_0 ← the parabola in t through m_0, m_{−1}, m_{−2} at t' = r t_0 + (1 − r) t_{−1}

    What replaced it stays in the history. A step with r = 1, and the first two of a run, are UniPC's. The ratios are
    fitted by ``lightrail search dc_ratios`` for one model, time grid and number of steps. Without its corrector, with
    ``b=bh2``, UniPC is DPM-Solver++ of the same order.

    Args:
        steps: As for :class:`UniPC`.
        order: As for :class:`UniPC`.
        form: As for :class:`UniPC`.
        b: As for :class:`UniPC`.
        corrector: As for :class:`UniPC`.
        corrector_start: As for :class:`UniPC`.
        lower_order_final: As for :class:`UniPC`.
        ratios: r for each step, above 0; the file that the search wrote, which also says how the solver was set; or
            ``None`` for 1 everywhere.

    Raises:
        ConfigurationError: An option is out of range, there is not one ratio a step, or the file is for a solver that
            was set otherwise.
        DataError: The file cannot be read.
        CompositionError: It is for another model, noise path, number of steps or time grid.

    Example:
        >>> DCSolver(steps=4, ratios=[1, 1, 1.1, 1.4]).ratios
        (1.0, 1.0, 1.1, 1.4)

    Reference:
        W. Zhao, H. Wang, J. Zhou and J. Lu (2024), DC-Solver: Improving Predictor-Corrector Diffusion Sampler via
        Dynamic Compensation, arXiv 2409.03755, section 3.
    """

    traits: ClassVar[Traits] = Traits(
        rule="m_0 ← Σ_j L_j(r t_0 + (1 − r) t_{−1}) m_{−j}, then UniPC",
        paper="W. Zhao, H. Wang, J. Zhou, J. Lu, 2024, DC-Solver: Improving Predictor-Corrector Diffusion Sampler via "
        "Dynamic Compensation, arXiv 2409.03755",
        order=2,
        needs_predictions=("data",),
        example={"steps": 8},
    )

    @staticmethod
    def traits_under(options: dict[str, Any]) -> Traits:
        """Ratios that stay away from 1 as steps shrink leave no order; it is 2 where the last step has order 1."""
        order = int(options.get("order", 3)) + bool(options.get("corrector", True))
        order = min(order, 2) if options.get("lower_order_final", True) else order
        known = None if options.get("ratios") else order
        needs = (str(options.get("form", "data")),)
        return dataclasses.replace(DCSolver.traits, order=known, needs_predictions=needs)

    def __init__(
        self,
        steps: int = 10,
        order: int = 3,
        form: str = "data",
        b: str = "bh1",
        corrector: bool = True,
        corrector_start: int = 0,
        lower_order_final: bool = True,
        ratios: str | Sequence[float] | None = None,
    ) -> None:
        super().__init__(steps, order, form, b, corrector, corrector_start, lower_order_final)
        self.artefact = Artefact.load(ratios) if isinstance(ratios, str) else None
        if self.artefact is not None:
            self._check_solver(str(ratios))
            ratios = self.artefact.values["ratios"]
        assert not isinstance(ratios, str)
        self.ratios = tuple(float(r) for r in ratios) if ratios is not None else (1.0,) * steps
        for r in self.ratios:
            positive(ratios=r)
        if len(self.ratios) != steps and self.artefact is None:
            raise ConfigurationError(
                "there is not one ratio for each step",
                found=f"{len(self.ratios)} in sampler.ratios, sampler.steps={steps}",
                allowed="one ratio a step, the first two 1",
                remedy=f"Set sampler.steps={len(self.ratios)}, or list {steps} ratios.",
            )

    def settings(self) -> dict[str, Any]:
        """How UniPC is set, which ratios depend on."""
        names = ("order", "form", "b", "corrector", "corrector_start", "lower_order_final")
        return {name: getattr(self, name) for name in names}

    def _check_solver(self, file: str) -> None:
        assert self.artefact is not None
        if "ratios" not in self.artefact.values:
            raise ConfigurationError(
                f"the search '{self.artefact.search}' found no ratios",
                found=f"{file}: {', '.join(self.artefact.values)}",
                allowed="the file of the search dc_ratios",
                remedy="Search first: lightrail search dc_ratios …; then name its file in sampler.ratios.",
            )
        for name, wanted in self.artefact.values["solver"].items():
            if (found := getattr(self, name)) != wanted:
                raise ConfigurationError(
                    "the ratios were fitted for a solver that was set otherwise",
                    found=f"sampler.{name}={found}",
                    allowed=f"sampler.{name}={wanted}",
                    remedy=f"Set sampler.{name}={wanted}, or search again.",
                )

    def prepare(self, denoiser: Denoiser) -> None:
        if self.artefact is not None:
            self.artefact.check(denoiser=denoiser, steps=self.steps)

    def grid(self, path: NoisePath, times: TimeGrid) -> Grid:
        grid = super().grid(path, times)
        if self.artefact is not None:
            self.artefact.check_grid(grid)
        return grid

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        return self.advanced(state, predict, grid, self.ratios[state.index])

    def advanced(self, state: State, predict: Predict, grid: Grid, ratio: float) -> State:
        """A step with any ratio."""
        if ratio == 1 or len(state.history) < DEGREE:
            after = super().step(state, predict, grid)
            return dataclasses.replace(after, history=self._kept(after.history[0], state))
        here, there = grid[state.index], grid[state.index + 1]
        now = predict(state.x, here)
        x = self.corrected(state, now, grid)
        history = (compensated((now, *state.history), ratio, self.form), *state.history)
        used = history[: self._order_at(state.index, grid)]
        weights = predictor_weights(here, there, [each.level.lam for each in used], self.form, self.b)
        values = [(w, each.get(self.form)) for w, each in zip(weights, used, strict=True)]
        x = weighted_sum((carried(here, there, self.form), x), *values)
        return state.next(x, history=self._kept(history[0], state), predicted=len(used))

    def corrected(self, state: State, now: Prediction, grid: Grid) -> Any:
        """The states ``[B, …]`` as the corrector leaves them, with what the network said of them."""
        weights = self._correction(state, grid, now.level)
        values = [(w, each.get(self.form)) for w, each in zip(weights, (now, *state.history), strict=False)]
        return weighted_sum((1.0, state.x), *values)

    def _kept(self, newest: Prediction, state: State) -> tuple[Prediction, ...]:
        return (newest, *state.history)[: max(self.order, DEGREE + 1)]
