"""DPM-Solver++: exponential multistep or Runge–Kutta steps on the predicted data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from lightrail.errors import ConfigurationError
from lightrail.generation import Grid, Level, NoisePath, Predict, Prediction, Sampler, State, TimeGrid, weighted_sum
from lightrail.options import at_least, between, one_of
from lightrail.traits import Traits
from lightrail_generation.samplers.dpm_solver import (
    SOLVER_TYPES,
    fast_grid,
    levels_between,
    orders_within,
    single_step,
)
from lightrail_generation.samplers.exponential import adams_weights, divided_difference, phi

__all__ = ["DPMSolverPP", "final_order", "multistep_weights", "stochastic_weights", "thresholded"]

# Runs this short end with lower orders, which are steadier where the steps are long.
SHORT_RUN = 15


def multistep_weights(
    here: Level,
    there: Level,
    lams: Sequence[float],
    solver_type: str = "midpoint",
    third_order: str = "exact",
) -> list[float]:
    """Weights of D_0, D_{−1}, … in x_t = (σ_t/σ_s) x_s + Σ w_j D_{−j}; the order is how many there are.

    The exponential Adams–Bashforth weights, but for two: ``midpoint`` of order 2 takes
    α_t (1 − e^{−h}) (D_0 + (h/2) D[λ_0, λ_{−1}]), and ``compat`` of order 3 half of the second derivative.

    Args:
        here: The level s.
        there: The level t; where it or a knot is infinite in λ, fewer predictions are used.
        lams: λ of each prediction, the newest first; 1 to 3.
        solver_type: Of order 2, ``midpoint`` or ``taylor``.
        third_order: ``exact`` or ``compat``.

    Example:
        >>> from lightrail.generation import KarrasVE
        >>> levels = [KarrasVE().level(t) for t in (1.0, 2.0, 4.0)]
        >>> [round(w, 4) for w in multistep_weights(levels[1], levels[0], [levels[1].lam, levels[2].lam])]
        [0.75, -0.25]
    """
    weights = adams_weights(here, there, lams, "data")
    used = [lam for lam, weight in zip(lams, weights, strict=True) if weight != 0]
    h = there.lam - here.lam
    if len(used) == 2 and solver_type == "midpoint":
        half = there.alpha * -math.expm1(-h) * h / 2 / (used[0] - used[1])
        weights = [there.alpha * -math.expm1(-h) + half, -half, *[0.0] * (len(lams) - 2)]
    if len(used) == 3 and third_order == "compat":
        lost = there.alpha * h**3 * phi(3, -h)
        weights = [w - lost * d for w, d in zip(weights, divided_difference(used), strict=True)]
    return weights


def stochastic_weights(
    here: Level, there: Level, lams: Sequence[float], solver_type: str = "midpoint"
) -> tuple[float, list[float], float]:
    """The share of x_s, the weights of D_0 and D_{−1}, and the standard deviation of the fresh noise.

    x_t = (σ_t/σ_s) e^{−h} x_s + 2 α_t ∫₀ʰ e^{2(u−h)} D du + σ_t √(1 − e^{−2h}) z

    Args:
        here: The level s.
        there: The level t, not clean.
        lams: λ of each prediction, the newest first; 1 or 2.
        solver_type: ``midpoint`` or ``taylor``.
    """
    h = there.lam - here.lam
    all_of_it = there.alpha * -math.expm1(-2 * h)
    carry, spread = there.sigma / here.sigma * math.exp(-h), there.sigma * math.sqrt(-math.expm1(-2 * h))
    if len(lams) == 1 or math.isinf(lams[1]):
        return carry, [all_of_it], spread
    slope = all_of_it / 2 if solver_type == "midpoint" else 2 * there.alpha * h * phi(2, -2 * h)
    slope *= h / (lams[0] - lams[1])
    return carry, [all_of_it + slope, -slope], spread


def thresholded(prediction: Prediction, quantile: float) -> Prediction:
    """The prediction with each sample's data clamped at a quantile of their magnitude, at least 1, and divided by it.

    Args:
        prediction: Of states whose data lie in [−1, 1].
        quantile: In (0, 1].
    """
    data = prediction.data
    wide = data.flatten(1).to(torch.promote_types(data.dtype, torch.float32))
    limit = _quantile(wide.abs(), quantile).clamp(min=1).to(data.dtype).view(-1, *[1] * (data.ndim - 1))
    return prediction.with_data(torch.maximum(torch.minimum(data, limit), -limit) / limit)


def _quantile(rows: torch.Tensor, quantile: float) -> torch.Tensor:
    """Each row's quantile, interpolated; torch.quantile refuses rows of more than 16 million numbers."""
    place = quantile * (rows.shape[1] - 1)
    low = math.floor(place)
    largest = rows.topk(rows.shape[1] - low, dim=1).values
    return torch.lerp(largest[:, -1], largest[:, max(-2, -largest.shape[1])], place - low)


def final_order(order: int, index: int, grid: Grid, *, lowers: bool) -> int:
    """The order of a step near the end: no more than there are steps left in a short run, 1 to σ = 0 and from α = 0."""
    left = grid.steps - index
    if grid[index + 1].is_clean or grid[index].alpha == 0:
        return 1
    return min(order, left) if lowers and grid.steps < SHORT_RUN else order


class DPMSolverPP(Sampler):
    """Solves the probability flow, or its stochastic twin, in λ = log(α/σ) by polynomials through the predicted data.

    x_t = (σ_t/σ_s) x + α_t (1 − e^{−h}) (D_0 + (h/(2 h_{−1})) (D_0 − D_{−1})),  h = λ_t − λ_s

    is order 2, the default. The first steps of a multistep run have the orders 1, 2, …; a step to σ = 0 has order 1 and
    returns the predicted data.

    Args:
        steps: At least 1; each one evaluation for ``multistep``, ``order`` evaluations for ``single``; for ``fast`` the
            evaluations, exactly.
        order: 1, 2 or 3.
        variant: ``multistep`` keeps earlier predictions; ``single`` asks the network within the step; ``fast`` does
            so too, with lower orders at the end so that the evaluations come out.
        solver_type: Of order 2: ``midpoint``, above, or ``taylor``, which is exact for data linear in λ.
        stochastic: Solves the reverse diffusion with fresh noise instead; multistep of order 1 or 2.
        third_order: Of multistep order 3: ``exact`` interpolates by a parabola; ``compat`` takes half of its second
            derivative, as the published code does, and is of order 2 only.
        lower_order_final: Whether a run of fewer than 15 steps ends with the orders …, 2, 1.
        dynamic_threshold: The quantile, in (0, 1], at which each sample's predicted data are clamped, 0.995 in the
            paper; ``None`` for no clamping. For images in [−1, 1] only.

    Raises:
        ConfigurationError: An option is out of range, or ``stochastic`` meets ``single``, ``fast`` or order 3.

    Deviations:
        The published code of order 3 halves the second derivative and is of order 2; ``exact`` mends that, ``compat``
        keeps it. The paper's ``single`` spaces its inner places in λ, as here. ``lower_order_final`` acts below 15
        steps, as in diffusers; the published code says so too, and does it below 10.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail_generation.time_grids.uniform_lambda import UniformLambda
        >>> mixture, sampler = GaussianMixture(), DPMSolverPP(steps=10)
        >>> sample(mixture, sampler, sampler.grid(mixture.path, UniformLambda()), range(4)).evaluations
        10

    Reference:
        C. Lu, Y. Zhou, F. Bao, J. Chen, C. Li and J. Zhu (2022), DPM-Solver++: Fast Solver for Guided Sampling of
        Diffusion Probabilistic Models, arXiv 2211.01095, algorithms 1 (2S) and 2 (2M), and its
        SDE-DPM-Solver++ for the stochastic form.
    """

    traits: ClassVar[Traits] = Traits(
        rule="x_t = (σ_t/σ_s) x + α_t (1 − e^{−h}) (D_0 + (h/(2 h_{−1})) (D_0 − D_{−1}))",
        paper="C. Lu, Y. Zhou, F. Bao, J. Chen, C. Li, J. Zhu, 2022, DPM-Solver++: Fast Solver for Guided Sampling of "
        "Diffusion Probabilistic Models, arXiv 2211.01095",
        order=2,
        needs_predictions=("data",),
        example={"steps": 8},
    )

    @staticmethod
    def traits_under(options: dict[str, Any]) -> Traits:
        """The stochastic form has no order of a deterministic solver; the published third order is the second."""
        if options.get("stochastic"):
            return dataclasses.replace(
                DPMSolverPP.traits, is_stochastic=True, order=None, fresh_noise=1.0, solves_reverse_diffusion=True
            )
        is_compat = options.get("third_order") == "compat" and options.get("variant", "multistep") == "multistep"
        order = int(options.get("order", 2))
        return dataclasses.replace(DPMSolverPP.traits, order=min(order, 2) if is_compat else order)

    def __init__(
        self,
        steps: int = 20,
        order: int = 2,
        variant: str = "multistep",
        solver_type: str = "midpoint",
        stochastic: bool = False,
        third_order: str = "exact",
        lower_order_final: bool = True,
        dynamic_threshold: float | None = None,
    ) -> None:
        super().__init__(steps)
        at_least(1, order=order)
        between(1, 3, closed="both", order=order)
        one_of(("multistep", "single", "fast"), variant=variant)
        one_of(SOLVER_TYPES, solver_type=solver_type)
        one_of(("exact", "compat"), third_order=third_order)
        if dynamic_threshold is not None:
            between(0, 1, closed="right", dynamic_threshold=dynamic_threshold)
        if stochastic and (order == 3 or variant != "multistep"):
            raise ConfigurationError(
                "the stochastic solver has no such form",
                found=f"stochastic=true, order={order}, variant={variant}",
                allowed="multistep of order 1 or 2",
                remedy="Set sampler.order=2 and sampler.variant=multistep, or sampler.stochastic=false.",
            )
        self.order = order
        self.variant = variant
        self.solver_type = solver_type
        self.stochastic = stochastic
        self.third_order = third_order
        self.lower_order_final = lower_order_final
        self.dynamic_threshold = dynamic_threshold

    def grid(self, path: NoisePath, times: TimeGrid) -> Grid:
        return fast_grid(path, times, self.steps, self.order) if self.variant == "fast" else super().grid(path, times)

    def evaluations(self, grid: Grid) -> int | None:
        if self.variant == "multistep":
            return super().evaluations(grid)
        return sum(self._final_order(index, grid) for index in range(grid.steps)) + grid.denoises_last

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        here, there = grid[state.index], grid[state.index + 1]
        order = self._final_order(state.index, grid)
        if self.variant != "multistep":
            levels = levels_between(grid.path, here, there, order)
            asked = self._asked(predict)
            return state.next(single_step(state.x, asked, levels, order, "data", self.solver_type))
        history = (self._asked(predict)(state.x, here), *state.history)
        used = history[:order]
        lams = [each.level.lam for each in used]
        x, kept = state.x, history[: self.order - 1]
        if self.stochastic and not there.is_clean:
            carry, weights, spread = stochastic_weights(here, there, lams, self.solver_type)
            noise = ((spread, state.normal()),)
        else:
            carry, noise = there.sigma / here.sigma, ()
            weights = multistep_weights(here, there, lams, self.solver_type, self.third_order)
        # A weight of 0 may belong to data that could not be had, at α = 0.
        data = [(weight, each.data) for weight, each in zip(weights, used, strict=False) if weight != 0]
        return state.next(weighted_sum((carry, x), *data, *noise), history=kept)

    def _final_order(self, index: int, grid: Grid) -> int:
        if self.variant == "fast":
            free = self.steps - grid.denoises_last
            return orders_within(free, grid.steps, self.order, ends_clean=grid[-1].is_clean)[index]
        return final_order(self.order, index, grid, lowers=self.lower_order_final)

    def _asked(self, predict: Predict) -> Predict:
        quantile = self.dynamic_threshold
        if quantile is None:
            return predict
        return lambda x, level, network_time=None: thresholded(predict(x, level, network_time=network_time), quantile)
