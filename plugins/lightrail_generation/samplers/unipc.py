"""UniPC: a predictor and a corrector of any order that share their evaluations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

from lightrail.generation import Grid, Level, Predict, Sampler, State, weighted_sum
from lightrail.options import at_least, between, one_of
from lightrail.traits import Traits
from lightrail_generation.samplers.exponential import adams_weights, carried, kernel_moments, scale_of

__all__ = ["UniPC", "corrector_weights", "predictor_weights"]


def predictor_weights(here: Level, there: Level, lams: Sequence[float], form: str, b: str) -> list[float]:
    """UniP: the weights of m_0, m_{−1}, …, the predictions at ``lams``, in x_t beside the share of x_s.

    Σ_j ρ_j r_jⁱ⁻¹ = i! z φ_{i+1}(z)/B(h) for i < p leaves B no part, and the exponential Adams–Bashforth weights; but
    for p = 2 the published ρ_1 = 1/2, which holds to the order only, makes B matter.

    Args:
        here: The level s.
        there: The level t.
        lams: λ of each prediction, the newest first.
        form: ``data`` or ``noise``.
        b: ``bh1`` for B = z, ``bh2`` for e^z − 1, with z = −h in data form and h in noise form; ``vary`` solves for
            ρ_1 too.

    Example:
        >>> from lightrail.generation import KarrasVE
        >>> levels = [KarrasVE().level(t) for t in (1.0, 2.0, 4.0)]
        >>> lams = [levels[1].lam, levels[2].lam]
        >>> [round(w, 4) for w in predictor_weights(levels[1], levels[0], lams, "data", "bh2")]
        [0.75, -0.25]
    """
    if len(lams) == 2 and b != "vary" and all(map(math.isfinite, (there.lam, *lams))):
        return _halved(here, there, lams[1], form, b)
    return adams_weights(here, there, lams, form)


def corrector_weights(here: Level, there: Level, lams: Sequence[float], form: str, b: str) -> list[float] | None:
    """UniC: the weights of m_t, m_0, m_{−1}, …; ``None`` where λ is infinite at an end and nothing can be corrected.

    Args:
        here: The level s.
        there: The level t, where m_t was predicted.
        lams: λ of m_0, m_{−1}, …, as the predictor had them.
        form: ``data`` or ``noise``.
        b: As for :func:`predictor_weights`; here the published ρ = 1/2 is that of p = 1.
    """
    if not (math.isfinite(here.lam) and math.isfinite(there.lam)):
        return None
    if len(lams) == 1 and b != "vary":
        return _halved(here, there, there.lam, form, b)[::-1]
    of_0, of_t, *older = adams_weights(here, there, [lams[0], there.lam, *lams[1:]], form)
    return [of_t, of_0, *older]


def _halved(here: Level, there: Level, other: float, form: str, b: str) -> list[float]:
    """The weights of m_0 and of the prediction at ``other``, with ρ = 1/2."""
    h = there.lam - here.lam
    scale = scale_of(here, there, form)
    all_of_it = scale * kernel_moments(h, 1, form)[0]
    slope = all_of_it
    if b == "bh1":
        slope = there.alpha * h if form == "data" else -there.sigma * h
    slope *= h / (2 * (other - here.lam))
    return [all_of_it - slope, slope]


class UniPC(Sampler):
    """Predicts with the last p predictions, and corrects each state once the network was asked there.

    x_t = (σ_t/σ_s) x_s − α_t (e^{−h} − 1) m_0 − α_t B(h) Σ_j ρ_j (m_j − m_0)/r_j,  r_j = (λ_j − λ_s)/h

    With j < 0 it predicts, to order p; with m_t among the m_j it corrects, to order p + 1, at no further evaluation:
    m_t is what the network said of the state as it was predicted. The first steps have the orders 1, 2, …; a step to
    σ = 0 has order 1, and the last state is not corrected.

    Args:
        steps: At least 1; each one evaluation.
        order: p, 1 to 4.
        form: What is interpolated: ``data``, which bears strong guidance, or ``noise``.
        b: B(h): ``bh2``, e^z − 1; ``bh1``, z, which the paper prefers without guidance; ``vary``, no shortcut at low
            orders, which is the exponential Adams–Bashforth–Moulton method.
        corrector: Whether states are corrected.
        corrector_start: How many states are left as predicted before the first is corrected, at least 0; strong
            guidance wants 1.
        lower_order_final: Whether the last steps have the orders …, 2, 1, which are steadier where the steps are long;
            the last one's error then is of order 2 however many steps there are.

    Raises:
        ConfigurationError: An option is out of range.

    Deviations:
        The published ``vary`` leaves equations out and is of order 1 from p = 2; here it solves all. Predictor and
        corrector are both linear in the predictions, so a step adds the corrector's difference to the state; it does
        not keep the state before.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail_generation.time_grids.uniform_lambda import UniformLambda
        >>> mixture, sampler = GaussianMixture(), UniPC(steps=10, order=3)
        >>> sample(mixture, sampler, sampler.grid(mixture.path, UniformLambda()), range(4)).evaluations
        10

    Reference:
        W. Zhao, L. Bai, Y. Rao, J. Zhou and J. Lu (2023), UniPC: A Unified Predictor-Corrector Framework for Fast
        Sampling of Diffusion Models, arXiv 2302.04867, algorithms 1 and 2.
    """

    traits: ClassVar[Traits] = Traits(
        rule="x_t = (σ_t/σ_s) x_s − α_t (e^{−h} − 1) m_0 − α_t B(h) Σ_j ρ_j (m_j − m_0)/r_j",
        paper="W. Zhao, L. Bai, Y. Rao, J. Zhou, J. Lu, 2023, UniPC: A Unified Predictor-Corrector Framework for Fast "
        "Sampling of Diffusion Models, arXiv 2302.04867",
        order=2,
        needs_predictions=("data",),
        example={"steps": 8},
    )

    @staticmethod
    def traits_under(options: dict[str, Any]) -> Traits:
        """p, and one more with the corrector; 2 at most where the last steps are of lower order."""
        order = int(options.get("order", 2)) + bool(options.get("corrector", True))
        order = min(order, 2) if options.get("lower_order_final", True) else order
        return dataclasses.replace(UniPC.traits, order=order, needs_predictions=(str(options.get("form", "data")),))

    def __init__(
        self,
        steps: int = 20,
        order: int = 2,
        form: str = "data",
        b: str = "bh2",
        corrector: bool = True,
        corrector_start: int = 0,
        lower_order_final: bool = True,
    ) -> None:
        super().__init__(steps)
        at_least(1, order=order)
        between(1, 4, closed="both", order=order)
        one_of(("data", "noise"), form=form)
        one_of(("bh1", "bh2", "vary"), b=b)
        at_least(0, corrector_start=corrector_start)
        self.order = order
        self.form = form
        self.b = b
        self.corrector = corrector
        self.corrector_start = corrector_start
        self.lower_order_final = lower_order_final

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        here, there = grid[state.index], grid[state.index + 1]
        history = (predict(state.x, here), *state.history)
        used = history[: self._order_at(state.index, grid)]
        carry = carried(here, there, self.form)
        predicted = predictor_weights(here, there, [each.level.lam for each in used], self.form, self.b)
        corrected = self._correction(state, grid, here)
        weights = [carry * each for each in corrected] + [0.0] * (len(history) - len(corrected))
        for j, weight in enumerate(predicted):
            weights[j] += weight
        values = [(w, each.get(self.form)) for w, each in zip(weights, history, strict=True) if w != 0]
        x = weighted_sum((carry, state.x), *values)
        return state.next(x, history=history[: self.order], predicted=len(used))

    def _correction(self, state: State, grid: Grid, here: Level) -> list[float]:
        """By how much each prediction moves the state that the step before predicted; the newest first."""
        lams = [each.level.lam for each in state.history[: state.memory.get("predicted", 0)]]
        if not lams or not self.corrector or state.index <= self.corrector_start:
            return []
        before = grid[state.index - 1]
        wanted = corrector_weights(before, here, lams, self.form, self.b)
        if wanted is None:
            return []
        had = [0.0, *predictor_weights(before, here, lams, self.form, self.b)]
        return [new - old for new, old in zip(wanted, had, strict=True)]

    def _order_at(self, index: int, grid: Grid) -> int:
        if grid[index + 1].is_clean:
            return 1
        return min(self.order, grid.steps - index) if self.lower_order_final else self.order
