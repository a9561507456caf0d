"""DPM-Solver: exponential Runge–Kutta steps on the predicted noise."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightrail.errors import ConfigurationError
from lightrail.generation import Grid, Level, NoisePath, Predict, Sampler, State, TimeGrid, weighted_sum
from lightrail.options import at_least, between, one_of, positive
from lightrail.traits import Traits
from lightrail_generation.samplers.exponential import adams_weights, carried, phi

__all__ = ["SOLVER_TYPES", "DPMSolver", "fast_grid", "levels_between", "orders_within", "single_step", "stage_weights"]

SOLVER_TYPES = ("midpoint", "taylor")
# r_1, r_2: where between two levels the network is asked, in shares of the step in λ.
INNER = {1: (), 2: (1 / 2,), 3: (1 / 3, 2 / 3)}
# A step this small in λ is taken whatever its error, so that a network with jumps does not stop a run.
SMALLEST_STEP = 1e-4


def stage_weights(level: Level, h: Any, form: str, r: float = 1.0, solver_type: str = "taylor") -> tuple[Any, Any]:
    """The weights of m_s and of m at λ_s + r h in x at ``level``, where λ = λ_s + h.

    A h (φ_1(z) m_s + φ_2(z) (m_r − m_s)/r) for ``taylor``, A h φ_1(z) (m_s + (m_r − m_s)/(2 r)) for ``midpoint``;
    A = α, z = −h in data form, A = −σ, z = h in noise form.

    Args:
        level: Where it leads.
        h: The step in λ: a number, or one a sample ``[B, 1, …]``.
        form: ``data`` or ``noise``.
        r: Where the second prediction was made, above 0.
        solver_type: ``midpoint`` or ``taylor``.

    Example:
        >>> from lightrail.generation import KarrasVE
        >>> [round(w, 4) for w in stage_weights(KarrasVE().level(1.0), math.log(2), "noise", 1.0, "midpoint")]
        [-0.5, -0.5]
    """
    z, scale = (-h, level.alpha * h) if form == "data" else (h, -level.sigma * h)
    all_of_it = scale * phi(1, z)
    slope = all_of_it / (2 * r) if solver_type == "midpoint" else scale * phi(2, z) / r
    return all_of_it - slope, slope


def single_step(
    x: Tensor, predict: Predict, levels: tuple[Level, ...], order: int, form: str, solver_type: str = "midpoint"
) -> Tensor:
    """One exponential Runge–Kutta step; as many evaluations as its order.

    Args:
        x: The states at ``levels[0]``.
        predict: Asks the network.
        levels: Where it starts, the ``order`` − 1 levels between, and where it leads, all with finite λ; for order 1
            the last may be clean.
        order: 1, 2 or 3.
        form: ``data`` or ``noise``.
        solver_type: Of order 2, ``midpoint`` or ``taylor``.
    """
    here, there = levels[0], levels[-1]
    m_s = predict(x, here).get(form)
    if order == 1:
        weight = adams_weights(here, there, [here.lam], form)[0]
        return weighted_sum((carried(here, there, form), x), (weight, m_s))
    h = there.lam - here.lam
    return _stages(x, m_s, predict, levels, h, form, solver_type)[0]


def _stages(
    x: Tensor,
    m_s: Tensor,
    predict: Predict,
    levels: tuple[Level, ...],
    h: Any,
    form: str,
    solver_type: str,
    *,
    is_pair: bool = False,
) -> tuple[Tensor, ...]:
    """x at the end of the step; for a pair also by one order less, from the same predictions."""
    here, *inner, there = levels
    r = INNER[len(levels) - 1]

    def led(to: Level, share: float, m_r: Tensor | None = None, of_r: float = 1.0, kind: str = "taylor") -> Tensor:
        at_s, at_r = stage_weights(to, share * h, form, of_r / share, kind)
        carry = carried(here, to, form)
        if m_r is None:
            return _summed((carry, x), (at_s + at_r, m_s))
        return _summed((carry, x), (at_s, m_s), (at_r, m_r))

    m_1 = predict(led(inner[0], r[0]), inner[0]).get(form)
    if len(r) == 1:
        found = led(there, 1.0, m_1, r[0], solver_type)
        return (found, led(there, 1.0)) if is_pair else (found,)
    m_2 = predict(led(inner[1], r[1], m_1, r[0]), inner[1]).get(form)
    found = led(there, 1.0, m_2, r[1])
    return (found, led(there, 1.0, m_1, r[0], "midpoint")) if is_pair else (found,)


def _summed(*terms: tuple[Any, Tensor]) -> Tensor:
    if not isinstance(terms[0][0], Tensor):
        return weighted_sum(*terms)
    wide = torch.promote_types(terms[0][1].dtype, torch.float32)
    total = sum(weight.to(wide) * tensor for weight, tensor in terms)
    return total.to(terms[0][1].dtype)  # type: ignore[union-attr]


def orders_within(evaluations: int, steps: int, order: int, *, ends_clean: bool) -> list[int]:
    """Orders of steps that use so many evaluations: the highest first, and 1 for a last step to σ = 0.

    Example:
        >>> orders_within(9, 4, 3, ends_clean=False), orders_within(10, 4, 3, ends_clean=True)
        ([3, 3, 2, 1], [3, 3, 3, 1])
    """
    last = [1] if ends_clean else []
    free, left = steps - len(last), evaluations - len(last)
    orders = []
    for after in reversed(range(free)):
        orders.append(max(1, min(order, left - after)))
        left -= orders[-1]
    return orders + last


def fast_grid(path: NoisePath, times: TimeGrid, evaluations: int, order: int) -> Grid:
    """The grid whose steps, of the orders of :func:`orders_within`, use exactly so many evaluations.

    Args:
        path: The noise path.
        times: The spacing that was chosen.
        evaluations: At least 1.
        order: The highest, 1 to 3.

    Raises:
        ConfigurationError: There are too few evaluations for the spacing.
    """

    def outer(free: int) -> int:
        # Order 3 always ends with a lower one, as the paper has it; order 2 only where the evaluations are odd.
        return free // 3 + 1 if order == 3 else -(-free // order)

    grid = times.grid(path, outer(evaluations), finite=True)
    if evaluations == grid.denoises_last:
        raise ConfigurationError(
            "there are too few evaluations",
            found=f"sampler.steps={evaluations} with time_grid.end=denoise",
            allowed="at least 2",
            remedy="Set sampler.steps=2 or more.",
        )
    wanted = outer(evaluations - grid.denoises_last)
    if grid[-1].is_clean:
        wanted = 1 + -(-(evaluations - 1) // order)
    return grid if wanted == grid.steps else times.grid(path, wanted, finite=True)


class DPMSolver(Sampler):
    """Solves the probability flow by exponential Runge–Kutta steps in λ = log(α/σ) on the predicted noise.

    Order 2, with h = λ_t − λ_s and λ_r = λ_s + h/2:

    u = (α_r/α_s) x − σ_r (e^{h/2} − 1) ε_s,  x_t = (α_t/α_s) x − σ_t (e^h − 1) ε(u, λ_r)

    Order 3 asks at a third and at two thirds of the step. A step to σ = 0 has order 1.

    Args:
        steps: At least 1. For ``single`` the steps of the grid, each ``order`` evaluations; for ``fast`` the
            evaluations, exactly; for ``adaptive`` the intervals within each of which steps are chosen by the error.
        order: 2 or 3.
        variant: ``single``: every step of that order. ``fast``: steps of that order, and lower ones at the end so that
            the evaluations come out. ``adaptive``: step sizes by the difference to the solution of one order less.
        solver_type: Of order 2: ``midpoint``, above, or ``taylor``, which weighs the second prediction by φ_2.
        atol: Absolute tolerance of ``adaptive``, above 0, in units of the states.
        rtol: Relative tolerance of ``adaptive``, above 0.
        safety: θ, by which ``adaptive`` shortens the step that would just be accepted, in (0, 1].
        first_step: Its first step in λ, above 0.

    Raises:
        ConfigurationError: An option is out of range, or ``fast`` has too few steps or listed times that do not fit.

    Deviations:
        The places inside a step are uniform in λ, as the paper has them; its code spaces them uniformly in t on a grid
        that is. The paper stops at a small t; on the way to σ = 0, ``fast`` keeps one evaluation for that. The error
        is controlled for each sample on its own, where the code takes the worst of the batch: a batch is asked until
        its last sample is done, those that are done stay as they are. A step below 1e-4 in λ is always taken.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> mixture, sampler = GaussianMixture(), DPMSolver(steps=12, variant="fast")
        >>> from lightrail_generation.time_grids.uniform_lambda import UniformLambda
        >>> sample(mixture, sampler, sampler.grid(mixture.path, UniformLambda()), range(4)).evaluations
        12

    Reference:
        C. Lu, Y. Zhou, F. Bao, J. Chen, C. Li and J. Zhu (2022), DPM-Solver: A Fast ODE Solver for Diffusion
        Probabilistic Model Sampling in Around 10 Steps, arXiv 2206.00927, algorithms 1 and 2, appendix C for the
        adaptive steps.
    """

    traits: ClassVar[Traits] = Traits(
        rule="x_t = (α_t/α_s) x − σ_t (e^h − 1) ε(x_{s+h/2})",
        paper="C. Lu, Y. Zhou, F. Bao, J. Chen, C. Li, J. Zhu, 2022, DPM-Solver: A Fast ODE Solver for Diffusion "
        "Probabilistic Model Sampling in Around 10 Steps, arXiv 2206.00927",
        order=3,
        needs_predictions=("noise",),
        example={"steps": 5},
    )

    @staticmethod
    def traits_under(options: dict[str, Any]) -> Traits:
        """Adaptive steps have no order in their number."""
        order = None if options.get("variant") == "adaptive" else int(options.get("order", 3))
        return dataclasses.replace(DPMSolver.traits, order=order)

    def __init__(
        self,
        steps: int = 10,
        order: int = 3,
        variant: str = "single",
        solver_type: str = "midpoint",
        atol: float = 0.0078,
        rtol: float = 0.05,
        safety: float = 0.9,
        first_step: float = 0.05,
    ) -> None:
        super().__init__(steps)
        at_least(2, order=order)
        between(2, 3, closed="both", order=order)
        one_of(("single", "fast", "adaptive"), variant=variant)
        one_of(SOLVER_TYPES, solver_type=solver_type)
        positive(atol=atol, rtol=rtol, first_step=first_step)
        between(0, 1, closed="right", safety=safety)
        self.order = order
        self.variant = variant
        self.solver_type = solver_type
        self.atol = atol
        self.rtol = rtol
        self.safety = safety
        self.first_step = first_step

    def grid(self, path: NoisePath, times: TimeGrid) -> Grid:
        if self.variant == "fast":
            return fast_grid(path, times, self.steps, self.order)
        grid = times.grid(path, self.steps, finite=True)
        if self.variant == "adaptive" and grid[-1].is_clean and grid[-2].t > path.t_min:
            # Its one step of order 1, to the data, must not be a long one.
            levels = (*grid.levels[:-1], path.level(path.t_min), grid[-1])
            return dataclasses.replace(grid, levels=levels)
        return grid

    def orders(self, grid: Grid) -> list[int]:
        """The order of each step."""
        ends_clean = grid[-1].is_clean
        if self.variant == "fast":
            return orders_within(self.steps - grid.denoises_last, grid.steps, self.order, ends_clean=ends_clean)
        return [self.order] * (grid.steps - ends_clean) + [1] * ends_clean

    def evaluations(self, grid: Grid) -> int | None:
        return None if self.variant == "adaptive" else sum(self.orders(grid)) + grid.denoises_last

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        here, there = grid[state.index], grid[state.index + 1]
        if self.variant == "adaptive" and not there.is_clean:
            return self._adaptive_step(state, predict, grid)
        order = self.orders(grid)[state.index]
        levels = levels_between(grid.path, here, there, order)
        return state.next(single_step(state.x, predict, levels, order, "noise", self.solver_type))

    def _adaptive_step(self, state: State, predict: Predict, grid: Grid) -> State:
        """From one level of the grid to the next, by as many steps as each sample needs."""
        x, end = state.x, grid[state.index + 1].lam
        dims = x.ndim
        lam = torch.full((len(x),), grid[state.index].lam, dtype=torch.float64, device=x.device)
        h = state.memory.get("h", torch.full_like(lam, self.first_step))
        compared = x
        while bool((lam < end).any()):
            taken = torch.minimum(h, end - lam)
            shares = (0.0, *INNER[self.order], 1.0)
            levels = tuple(grid.path.levels(grid.path.t_of_lam(lam + share * taken), dims) for share in shares)
            m_s = predict(x, levels[0]).noise
            high, low = _stages(x, m_s, predict, levels, _rows(taken, dims), "noise", self.solver_type, is_pair=True)
            error = self._error(high, low, compared)
            is_lost = ~high.flatten(1).isfinite().all(1) & (taken <= SMALLEST_STEP)
            is_taken = (lam < end) & ((error <= 1) | (taken <= SMALLEST_STEP))
            x = torch.where(_rows(is_taken, dims), high, x)
            compared = torch.where(_rows(is_taken, dims), low, compared)
            is_last = taken >= end - lam
            lam = torch.where(is_taken, torch.where(is_last | is_lost, end, lam + taken), lam)
            wanted = self.safety * taken * error.clamp(min=1e-8) ** (-1 / self.order)
            # What was cut at the end of an interval says little about the next.
            wanted = torch.where(is_last & is_taken, torch.maximum(wanted, h), wanted)
            h = torch.where(taken > 0, wanted.clamp(min=SMALLEST_STEP), h)
        return state.next(x, h=h)

    def _error(self, high: Tensor, low: Tensor, compared: Tensor) -> Tensor:
        """√mean((x_high − x_low)²/max(atol, rtol |x|)²) of each sample, ``[B]``; 1 is just accepted."""
        allowed = torch.maximum(low.abs(), compared.abs()).mul(self.rtol).clamp(min=self.atol)
        error = ((high - low) / allowed).double().square().flatten(1).mean(1).sqrt()
        return error.nan_to_num(nan=math.inf, posinf=math.inf)


def levels_between(path: NoisePath, here: Level, there: Level, order: int) -> tuple[Level, ...]:
    """The levels that a step of this order asks the network at, and where it leads."""
    h = there.lam - here.lam
    return (here, *(path.level_at_lam(here.lam + r * h) for r in INNER[order]), there)


def _rows(values: Tensor, dims: int) -> Tensor:
    return values.view(-1, *[1] * (dims - 1))
