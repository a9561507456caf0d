"""Runge–Kutta solvers of a flow, in its own time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightrail.generation import Grid, Level, NoisePath, Predict, Sampler, State, weighted_sum
from lightrail.traits import Traits

__all__ = [
    "EULER",
    "HEUN",
    "MIDPOINT",
    "RALSTON",
    "RALSTON3",
    "RK4",
    "FlowEuler",
    "FlowHeun",
    "FlowMidpoint",
    "FlowRK4",
    "Tableau",
    "runge_kutta",
]

PAPER = (
    "Y. Lipman, R. T. Q. Chen, H. Ben-Hamu, M. Nickel, M. Le, 2023, Flow Matching for Generative Modeling, "
    "arXiv 2210.02747"
)


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge–Kutta rule: stage i lies at c_i and at x + h Σ_j a_ij k_j, and the step is x + h Σ_i b_i k_i.

    Args:
        nodes: c, the first 0.
        coupling: a, one row for each stage after the first.
        weights: b.
    """

    nodes: tuple[float, ...]
    coupling: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


EULER = Tableau((0,), (), (1,))
MIDPOINT = Tableau((0, 1 / 2), ((1 / 2,),), (0, 1))
HEUN = Tableau((0, 1), ((1,),), (1 / 2, 1 / 2))
RK4 = Tableau((0, 1 / 2, 1 / 2, 1), ((1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))
# Ralston's rules of order 2 and 3 stay away from the end of the step.
RALSTON = Tableau((0, 2 / 3), ((2 / 3,),), (1 / 4, 3 / 4))
RALSTON3 = Tableau((0, 1 / 2, 3 / 4), ((1 / 2,), (0, 3 / 4)), (2 / 9, 1 / 3, 4 / 9))


def runge_kutta(x: Tensor, here: Level, there: Level, path: NoisePath, predict: Predict, rule: Tableau) -> Tensor:
    """One step of dx/dt = u(x, t) from ``here`` to ``there``.

    Args:
        x: The states at ``here``.
        here: Where they are.
        there: Where they go.
        path: The noise path, for the times between.
        predict: Asks the network, once a stage.
        rule: The rule.
    """
    h = there.t - here.t
    slopes = [predict(x, here).flow]
    for node, row in zip(rule.nodes[1:], rule.coupling, strict=True):
        level = there if node == 1 else path.level(here.t + node * h)
        inner = weighted_sum((1.0, x), *((h * a, k) for a, k in zip(row, slopes, strict=True)))
        slopes.append(predict(inner, level).flow)
    return weighted_sum((1.0, x), *((h * b, k) for b, k in zip(rule.weights, slopes, strict=True)))


class _FlowSolver(Sampler):
    rule: ClassVar[Tableau]
    last_rule: ClassVar[Tableau]
    grid_name = "uniform"
    needs_finite_start = False

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        here, there = grid[state.index], grid[state.index + 1]
        rule = self.last_rule if there.is_clean else self.rule
        return state.next(runge_kutta(state.x, here, there, grid.path, predict, rule))

    def evaluations(self, grid: Grid) -> int:
        last = self.last_rule if grid[-1].is_clean else self.rule
        return (grid.steps - 1) * len(self.rule.nodes) + len(last.nodes) + grid.denoises_last


class FlowEuler(_FlowSolver):
    """Euler's method on the flow.

    x_t = x_s + (t − s) u(x_s, s)

    It works with any model, whose prediction is converted to u = (dα/dt) D + (dσ/dt) ε. On α = 1 − t, σ = t, and on
    α = 1, σ = t, it is DDIM.

    Args:
        steps: Steps, each one evaluation, at least 1.

    Raises:
        ConfigurationError: ``steps`` is out of range.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail_generation.time_grids.uniform import Uniform
        >>> mixture, sampler = GaussianMixture(path="flow"), FlowEuler(steps=10)
        >>> sample(mixture, sampler, sampler.grid(mixture.path, Uniform()), range(4)).evaluations
        10

    Reference:
        Y. Lipman, R. T. Q. Chen, H. Ben-Hamu, M. Nickel and M. Le (2023), Flow Matching for Generative Modeling, arXiv
        2210.02747, equation 1, for the flow.
    """

    rule = EULER
    last_rule = EULER
    traits: ClassVar[Traits] = Traits(
        rule="x_t = x_s + (t − s) u(x_s, s)",
        paper=PAPER,
        order=1,
        needs_predictions=("flow",),
        example={"steps": 10},
    )

    def __init__(self, steps: int = 50) -> None:
        super().__init__(steps)


class FlowMidpoint(_FlowSolver):
    """The midpoint rule on the flow.

    x_t = x_s + h u(x_s + (h/2) u(x_s, s), s + h/2),  h = t − s

    Args:
        steps: Steps, each two evaluations, at least 1.

    Raises:
        ConfigurationError: ``steps`` is out of range.

    Example:
        >>> from lightrail.generation import LinearFlow
        >>> from lightrail_generation.time_grids.uniform import Uniform
        >>> sampler = FlowMidpoint(steps=10)
        >>> sampler.evaluations(sampler.grid(LinearFlow(), Uniform()))
        20

    Reference:
        E. Hairer, S. P. Nørsett and G. Wanner (1993), Solving Ordinary Differential Equations I, section II.1,
        doi 10.1007/978-3-540-78862-1.
    """

    rule = MIDPOINT
    last_rule = MIDPOINT
    traits: ClassVar[Traits] = Traits(
        rule="x_t = x_s + h u(x_s + (h/2) u(x_s, s), s + h/2)",
        paper=PAPER,
        order=2,
        needs_predictions=("flow",),
        example={"steps": 5},
    )

    def __init__(self, steps: int = 25) -> None:
        super().__init__(steps)


class FlowHeun(_FlowSolver):
    """Heun's method on the flow.

    x_t = x_s + (h/2) (u(x_s, s) + u(x_s + h u(x_s, s), t)),  h = t − s

    Args:
        steps: Steps, each two evaluations, at least 1.

    Raises:
        ConfigurationError: ``steps`` is out of range.

    Deviations:
        A model that predicts data or score has no flow at σ = 0, and none was trained there. The step that ends there
        is Ralston's, with slopes at s and s + 2h/3 weighted 1/4 and 3/4: of the same order and cost. Other code ends
        with a step of Euler's method.

    Example:
        >>> from lightrail.generation import LinearFlow
        >>> from lightrail_generation.time_grids.uniform import Uniform
        >>> sampler = FlowHeun(steps=10)
        >>> sampler.evaluations(sampler.grid(LinearFlow(), Uniform()))
        20

    Reference:
        E. Hairer, S. P. Nørsett and G. Wanner (1993), Solving Ordinary Differential Equations I, section II.1,
        doi 10.1007/978-3-540-78862-1; A. Ralston (1962), Runge-Kutta Methods with Minimum Error Bounds, doi
        10.1090/S0025-5718-1962-0150954-0, for the last step.
    """

    rule = HEUN
    last_rule = RALSTON
    traits: ClassVar[Traits] = Traits(
        rule="x_t = x_s + (h/2) (u(x_s, s) + u(x_s + h u_s, t))",
        paper=PAPER,
        order=2,
        needs_predictions=("flow",),
        example={"steps": 5},
    )

    def __init__(self, steps: int = 25) -> None:
        super().__init__(steps)


class FlowRK4(_FlowSolver):
    """The classical Runge–Kutta method of order 4 on the flow.

    x_t = x_s + (h/6) (k₁ + 2 k₂ + 2 k₃ + k₄),  h = t − s

    Args:
        steps: Steps, each four evaluations, at least 1.

    Raises:
        ConfigurationError: ``steps`` is out of range.

    Deviations:
        k₄ is asked at the end of the step. A model that predicts data or score has no flow at σ = 0, and none was
        trained there, so the step that ends there is Ralston's of order 3, with slopes at s, s + h/2 and s + 3h/4
        weighted 2/9, 1/3 and 4/9. One step of order 3 leaves the whole at order 4, and saves an evaluation.

    Example:
        >>> from lightrail.generation import LinearFlow
        >>> from lightrail_generation.time_grids.uniform import Uniform
        >>> sampler = FlowRK4(steps=10)
        >>> sampler.evaluations(sampler.grid(LinearFlow(), Uniform()))
        39

    Reference:
        E. Hairer, S. P. Nørsett and G. Wanner (1993), Solving Ordinary Differential Equations I, table II.1.2,
        doi 10.1007/978-3-540-78862-1; A. Ralston (1962), Runge-Kutta Methods with Minimum Error Bounds, doi
        10.1090/S0025-5718-1962-0150954-0, for the last step.
    """

    rule = RK4
    last_rule = RALSTON3
    traits: ClassVar[Traits] = Traits(
        rule="x_t = x_s + (h/6) (k₁ + 2 k₂ + 2 k₃ + k₄)",
        paper=PAPER,
        order=4,
        needs_predictions=("flow",),
        example={"steps": 4},
    )

    def __init__(self, steps: int = 12) -> None:
        super().__init__(steps)
