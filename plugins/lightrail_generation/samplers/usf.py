"""USF: a solver whose every step is chosen by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightrail.errors import ConfigurationError, closest
from lightrail.generation import (
    Denoiser,
    Grid,
    Level,
    NoisePath,
    Predict,
    Prediction,
    Sampler,
    State,
    TimeGrid,
    weighted_sum,
)
from lightrail.generation.search import Artefact
from lightrail.options import at_least, between, one_of
from lightrail.traits import Traits
from lightrail_generation.samplers.exponential import (
    adams_weights,
    carried,
    divided_difference,
    kernel_moments,
    scale_of,
)
from lightrail_generation.samplers.unipc import corrector_weights, predictor_weights

__all__ = ["DERIVATIVES", "USF", "SolverStep"]

FORMS = ("data", "noise")
DERIVATIVES = ("exact", "bh1", "bh2", "low")
FURTHEST = 2
DEFAULT_STEPS = 10


@dataclass(frozen=True)
class SolverStep:
    """How one step is solved.

    Args:
        order: How many predictions it uses, 1 to 4; fewer where there are fewer, and 1 to σ = 0.
        form: What it interpolates, ``data`` or ``noise``.
        derivatives: Of the prediction: ``exact`` to the order; ``bh1`` or ``bh2``, with UniPC's scaling at order 2; or
            ``low``, each by the fewest predictions that give it.
        corrector: Whether the state it leads to is corrected once the network was asked there.
        back: How many knots before the present it starts from, 0 to 2: 0 is a multistep method, more are the last
            stages of a single-step one. It needs ``exact``.
    """

    order: int = 3
    form: str = "data"
    derivatives: str = "bh2"
    corrector: bool = False
    back: int = 0

    def __post_init__(self) -> None:
        at_least(1, order=self.order)
        between(1, 4, closed="both", order=self.order)
        one_of(FORMS, form=self.form)
        one_of(DERIVATIVES, derivatives=self.derivatives)
        at_least(0, back=self.back)
        between(0, FURTHEST, closed="both", back=self.back)
        if self.back and self.derivatives != "exact":
            raise ConfigurationError(
                "a step from an earlier knot takes its derivatives exactly",
                found=f"back={self.back}, derivatives={self.derivatives}",
                allowed="derivatives=exact, or back=0",
                remedy="Change one of the two in that entry of the schedule.",
            )

    def predicting(self, here: Level, there: Level, lams: Sequence[float]) -> list[float]:
        """Weights of the predictions at ``lams``, the newest first, for a step that starts at ``here``."""
        if self.back or self.derivatives == "exact":
            return adams_weights(here, there, lams, self.form)
        if self.derivatives == "low" and not there.is_clean:
            return _low_order(here, there, lams, self.form)
        return predictor_weights(here, there, lams, self.form, _scaling(self.derivatives))

    def correcting(self, here: Level, there: Level, lams: Sequence[float]) -> list[float] | None:
        """Weights of the prediction at ``there`` and of those at ``lams``; ``None`` where λ is infinite at an end."""
        if self.back:
            of_0, of_t, *older = adams_weights(here, there, [lams[0], there.lam, *lams[1:]], self.form)
            return [of_t, of_0, *older]
        return corrector_weights(here, there, lams, self.form, _scaling(self.derivatives))


def _scaling(derivatives: str) -> str:
    return derivatives if derivatives in ("bh1", "bh2") else "vary"


def _low_order(here: Level, there: Level, lams: Sequence[float], form: str) -> list[float]:
    """The Taylor series in which the kth derivative is k! times the divided difference of the first k + 1 values."""
    moments = kernel_moments(there.lam - here.lam, len(lams), form)
    weights = [0.0] * len(lams)
    for k, moment in enumerate(moments):
        for j, share in enumerate(divided_difference(lams[: k + 1])):
            weights[j] += scale_of(here, there, form) * moment * share
    return weights


class USF(Sampler):
    """Exponential integration of the probability flow in which each step has an order and a form of its own.

    x_t = (σ_t/σ_s) x_s + α_t ∫ e^{λ−λ_t} D dλ, or x_t = (α_t/α_s) x_s − α_t ∫ e^{−λ} ε dλ, with D or ε a polynomial in
    λ through the predictions that the step uses, from the knot that it starts from.

    A schedule is written by hand, or found by ``lightrail search usf`` for one model and number of steps together with
    the times that are visited: ``time_grid=searched`` reads them from the same file. All steps with the data form and
    order p are UniP of order p; order 2 with ``bh2`` is DPM-Solver++(2M).

    Args:
        steps: Steps, each one evaluation, at least 1; ``None`` for as many as the schedule has, 10 without one.
        schedule: An entry a step, each with options of :class:`SolverStep`; the file of a search; or ``None`` for
            order 3 in the data form throughout.

    Raises:
        ConfigurationError: An entry is wrong, or there is not one a step.
        DataError: The file cannot be read.
        CompositionError: It is for another model, noise path, number of steps or time grid.

    Deviations:
        The paper's authors published no code; the choices here follow its description: order, prediction, corrector,
        estimate of the derivatives, and starting point.

    Example:
        >>> USF(schedule=[{"order": 1}, {"order": 2, "corrector": True}, {"order": 2, "form": "noise"}]).steps
        3

    Reference:
        E. Liu, X. Ning, H. Yang and Y. Wang (2023), A Unified Sampling Framework for Solver Searching of Diffusion
        Probabilistic Models, arXiv 2312.07243.
    """

    traits: ClassVar[Traits] = Traits(
        rule="x_t = (σ_t/σ_s) x_s + α_t ∫ e^{λ−λ_t} P_i(λ) dλ, P_i chosen for each step",
        paper="E. Liu, X. Ning, H. Yang, Y. Wang, 2023, A Unified Sampling Framework for Solver Searching of Diffusion "
        "Probabilistic Models, arXiv 2312.07243",
        order=3,
        needs_predictions=("data",),
        example={"steps": 8},
    )

    @staticmethod
    def traits_under(options: dict[str, Any]) -> Traits:
        """Of a schedule of its own the order is not known."""
        schedule = options.get("schedule")
        if schedule is None:
            return USF.traits
        entries = () if isinstance(schedule, str) else schedule
        looks_back = any(each.get("back") if isinstance(each, Mapping) else each.back for each in entries)
        return dataclasses.replace(USF.traits, order=None, steps_from_newest=not looks_back)

    def __init__(self, steps: int | None = None, schedule: str | Sequence[Mapping[str, Any]] | None = None) -> None:
        self.artefact = Artefact.load(schedule) if isinstance(schedule, str) else None
        if self.artefact is not None:
            schedule = self.artefact.values.get("schedule")
        self.schedule: tuple[SolverStep, ...]
        if schedule is None:
            self._refuse_without_schedule()
            self.schedule = (SolverStep(),) * (DEFAULT_STEPS if steps is None else steps)
        else:
            assert not isinstance(schedule, str)
            self.schedule = tuple(_entry(each, index) for index, each in enumerate(schedule))
        super().__init__(len(self.schedule) if steps is None else steps)
        if len(self.schedule) != self.steps:
            raise ConfigurationError(
                "the schedule has not one entry for each step",
                found=f"{len(self.schedule)} entries, sampler.steps={self.steps}",
                allowed="an entry a step",
                remedy=f"Set sampler.steps={len(self.schedule)}, or change the schedule.",
            )
        self._reaches_back = max(each.back for each in self.schedule)
        self._longest = max(each.order for each in self.schedule)

    def _refuse_without_schedule(self) -> None:
        if self.artefact is not None:
            raise ConfigurationError(
                f"the search '{self.artefact.search}' found no schedule",
                found=", ".join(self.artefact.values),
                allowed="the file of the search usf",
                remedy="Search first: lightrail search usf …; then name its file in sampler.schedule.",
            )

    def prepare(self, denoiser: Denoiser) -> None:
        if self.artefact is not None:
            self.artefact.check(denoiser=denoiser, steps=self.steps)

    def grid(self, path: NoisePath, times: TimeGrid) -> Grid:
        grid = super().grid(path, times)
        if self.artefact is not None:
            self.artefact.check_grid(grid, self.artefact.values["times"])
        return grid

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        entry, there = self.schedule[state.index], grid[state.index + 1]
        now = predict(state.x, grid[state.index])
        states = (self._corrected(state, now, grid), *state.memory.get("states", ()))[: self._reaches_back + 1]
        history = (now, *state.history)[: self._longest]
        used = history[: 1 if there.is_clean else entry.order]
        here = grid[state.index - entry.back]
        weights = entry.predicting(here, there, [each.level.lam for each in used])
        values = [(w, each.get(entry.form)) for w, each in zip(weights, used, strict=True)]
        x = weighted_sum((carried(here, there, entry.form), states[entry.back]), *values)
        return state.next(x, history=history, states=states[: self._reaches_back], used=len(used))

    def _corrected(self, state: State, now: Prediction, grid: Grid) -> Tensor:
        """The states as the corrector of the step before leaves them, with what the network said of them."""
        if not state.index or not (entry := self.schedule[state.index - 1]).corrector:
            return state.x
        used = state.history[: state.memory["used"]]
        lams = [each.level.lam for each in used]
        here = grid[state.index - 1 - entry.back]
        wanted = entry.correcting(here, now.level, lams)
        if wanted is None:
            return state.x
        had = [0.0, *entry.predicting(here, now.level, lams)]
        moved = [new - old for new, old in zip(wanted, had, strict=True)]
        return weighted_sum(
            (1.0, state.x), *((w, each.get(entry.form)) for w, each in zip(moved, (now, *used), strict=True))
        )


def _entry(given: Mapping[str, Any], index: int) -> SolverStep:
    names = [each.name for each in dataclasses.fields(SolverStep)]
    for name in given:
        if name not in names:
            raise ConfigurationError(
                f"an entry of the schedule has no option '{name}'",
                found=f"sampler.schedule[{index}].{name}",
                allowed=", ".join(names),
                remedy=f"{closest(str(name), names)}Leave it out, or choose one of those.",
            )
    entry = SolverStep(**given)
    if entry.back > index:
        raise ConfigurationError(
            "a step cannot start before the first knot",
            found=f"back={entry.back} at step {index}",
            allowed=f"back of at most {index} there",
            remedy="Start that step later, or take back=0.",
        )
    return entry
