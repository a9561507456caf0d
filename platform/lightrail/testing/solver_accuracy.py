"""How exact a solver is: its measured order, the distribution that it ends in, its way back."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from lightrail.errors import CompositionError, UserError
from lightrail.generation import Evaluator, GaussianMixture, Grid, Sampler, State, invert
from lightrail.generation.gaussian_mixture import PATHS
from lightrail.testing.solver_runs import (
    Gaussian,
    Solver,
    begun,
    continued,
    exact_solution,
    fitting_mixture,
    grid_of,
    mixture_on,
    rms,
    solved,
    starts,
)
from lightrail.testing.suite import NotApplicable, require

__all__ = ["measured_order", "require_gaussian", "require_inverse", "require_order", "require_paths"]

COUNTS = {1: (40, 160), 2: (40, 160)}  # steps between which the slope is taken, by the declared order
MORE = (60, 240)  # for higher orders
SEEDED = 6  # first steps that end at the exact solution, so that a history holds exact predictions
UNEVEN = (None,), (1, 2)  # seeds of the grids: even, uneven
MEAN, VARIANCE = (0.8, -0.4), 0.3


def _error_from_exact_history(sampler: Sampler, mixture: GaussianMixture, grid: Grid) -> float:
    start = starts(mixture, grid[0])
    seeded = min(SEEDED, grid.steps - 1)
    knots = [*grid.levels[1 : seeded + 1], grid[-1]]
    exact = exact_solution(mixture, grid[0], tuple(level.t for level in knots))
    state, evaluator = begun(sampler, mixture, grid, start), Evaluator(mixture)
    for index in range(seeded):
        state = continued(sampler, state, evaluator, grid, until=index + 1)
        state = dataclasses.replace(state, x=exact[index])
    return rms(continued(sampler, state, evaluator, grid).x - exact[-1])


def measured_order(
    solver: Solver, mixture: GaussianMixture, seeds: tuple[int | None, ...], counts: tuple[int, int] = MORE
) -> float:
    """The slope of the error between two numbers of steps, on grids of these seeds together."""
    errors = []
    for count in counts:
        sampler = solver.of(mixture, count)
        grids = [grid_of(sampler, mixture.path, uneven=seed) for seed in seeds]
        found = [_error_from_exact_history(sampler, mixture, grid) for grid in grids]
        errors.append(float(np.mean(np.log(np.maximum(found, 1e-300)))))
    return (errors[0] - errors[1]) / math.log(counts[1] / counts[0])


def require_order(solver: Solver, *, uneven: bool) -> None:
    """The declared order is the measured one on even grids, and at least reached on uneven ones."""
    order = solver.traits.order
    if order is None:
        raise NotApplicable("it declares no order of convergence")
    require(not solver.traits.is_stochastic, "it is stochastic, and traits.order is that of a solver without noise")
    if not solver.takes_steps:
        raise NotApplicable("it takes no number of steps")
    slope = measured_order(solver, fitting_mixture(solver), UNEVEN[uneven], COUNTS.get(order, MORE))
    where = "of random lengths" if uneven else "even in λ"
    require(slope > order - (0.4 if uneven else 0.3), f"traits.order is {order}; over steps {where} it is {slope:.2f}")
    if not uneven:
        require(slope < order + 0.5, f"traits.order is {order}; over steps {where} it is {slope:.2f}")


def require_gaussian(solver: Solver) -> None:
    """From a Gaussian's noise it comes to the Gaussian: its mean and covariance are right within some hundredths."""
    if not solver.takes_steps:
        raise NotApplicable("it takes no number of steps")
    pairs = 4096
    path = fitting_mixture(solver).path
    model = Gaussian(path, (2 * pairs,), torch.tensor(MEAN, dtype=torch.float64).repeat(pairs), VARIANCE)
    sampler = solver.of(model, 100)
    grid = grid_of(sampler, path)
    found = solved(sampler, model, grid, starts(model, grid[0], 4)).view(-1, 2)
    last = grid[-1]
    mean = last.alpha * torch.tensor(MEAN, dtype=torch.float64)
    variance = last.alpha**2 * VARIANCE + last.sigma**2
    offset = float((found.mean(0) - mean).abs().max()) / math.sqrt(variance)
    require(offset < 0.05, f"the mean of a Gaussian is off by {offset:.2g} of its standard deviations")
    excess = float((torch.cov(found.T) / variance - torch.eye(2, dtype=torch.float64)).abs().max())
    require(excess < 0.1, f"the covariance of a Gaussian is off by {excess:.2g} of its variance")


def require_paths(solver: Solver) -> None:
    """It comes near the exact solution on every path, or an error says that it is not made for the path."""
    worked = 0
    for name in PATHS:
        mixture = mixture_on(name)
        try:
            sampler = solver.of(mixture, 30)
            grid = grid_of(sampler, mixture.path)
            found = solved(sampler, mixture, grid, starts(mixture, grid[0]))
        except CompositionError:
            continue
        worked += 1
        _require_near(solver, mixture, grid, found, f"on the path {name}")
        grid = grid_of(sampler, mixture.path, end="zero")
        found = solved(sampler, mixture, grid, starts(mixture, grid[0]))
        _require_near(solver, mixture, grid, found, f"on the path {name}, to σ = 0,")
    require(worked, "it works on no path of noise")


def _require_near(solver: Solver, mixture: GaussianMixture, grid: Grid, found: Tensor, where: str) -> None:
    require(bool(found.isfinite().all()), f"{where} it ends at numbers that are not finite")
    if solver.traits.is_stochastic or not solver.takes_steps:
        require(rms(found) < 10, f"{where} it ends at {rms(found):.3g} where the data are of order one")
        return
    error = rms(found - exact_solution(mixture, grid[0], (grid[-1].t,))[0])
    require(error < 0.15, f"{where} it ends {error:.3g} off the exact solution after {grid.steps} steps")


def require_inverse(solver: Solver) -> None:
    """An invertible solver comes back to its noise, the better the more steps; others say that they cannot."""
    mixture = fitting_mixture(solver)
    if not solver.traits.is_invertible:
        sampler = solver.of(mixture)
        grid = grid_of(sampler, mixture.path)
        start = starts(mixture, grid[0], 2)
        try:
            invert(mixture, sampler, grid, start, range(2))
        except CompositionError:
            return
        except UserError as error:
            require(False, f"invert raises {type(error).__name__}, where the contract says CompositionError")
        require(False, "traits.is_invertible is false, and yet it is run from data to noise")
    require(not solver.traits.is_stochastic, "it is declared invertible and stochastic")
    few, many = (_round_trip(solver, mixture, count) for count in (20, 80))
    improves = many < 1e-8 or (many < 0.5 * few and many < 0.3)
    require(improves, f"back at its noise it is {few:.3g} off with 20 steps and {many:.3g} with 80")


def _round_trip(solver: Solver, mixture: GaussianMixture, count: int) -> float:
    sampler = solver.of(mixture, count)
    grid = grid_of(sampler, mixture.path)
    start = starts(mixture, grid[0])
    end = solved(sampler, mixture, grid, start)
    state: State = dataclasses.replace(begun(sampler, mixture, grid, end), index=grid.steps)
    with torch.no_grad():
        back = sampler.invert(state, Evaluator(mixture), grid)
    require(back.index == 0, f"after invert state.index is {back.index}, not 0")
    return rms(back.x - start) / max(rms(start), 1e-12)
