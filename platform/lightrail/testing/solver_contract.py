"""What the contract of a sampler asks whatever it computes: what is counted, where it ends, what is left alone."""

from __future__ import annotations

import torch
from torch import Tensor

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import Evaluator, GaussianMixture, Level, Prediction
from lightrail.generation.time_grid import ENDS
from lightrail.testing.solver_runs import (
    FixedNoise,
    Gaussian,
    Solver,
    Watched,
    begun,
    continued,
    fitting_mixture,
    grid_of,
    ready,
    require_near,
    rms,
    solved,
    starts,
)
from lightrail.testing.suite import NonConformance, NotApplicable, require

__all__ = [
    "require_any_form",
    "require_any_shape",
    "require_counted",
    "require_ends",
    "require_fewest_steps",
    "require_hands_off",
    "require_noise_as_declared",
    "require_types",
]


def require_fewest_steps(solver: Solver) -> None:
    """It runs with as few steps as it says, and refuses fewer by a ConfigurationError."""
    if not solver.takes_steps:
        raise NotApplicable("it takes no number of steps")
    mixture = fitting_mixture(solver)
    least = solver.build(None, mixture).minimum_steps
    for count in (least, least + 1):
        sampler = solver.of(mixture, count)
        grid = grid_of(sampler, mixture.path, end="zero")
        found = solved(sampler, mixture, grid, starts(mixture, grid[0], 3))
        require(bool(found.isfinite().all()), f"with {count} steps it ends at numbers that are not finite")
    for count in {0, least - 1}:
        try:
            solver.build(count, mixture)
        except ConfigurationError:
            continue
        except Exception as error:
            raise NonConformance(f"{count} steps raise {type(error).__name__}, no ConfigurationError") from error
        require(False, f"it is built with {count} steps, and minimum_steps is {least}")


def require_counted(solver: Solver) -> None:
    """``evaluations(grid)`` is what was spent, however the grid ends; ``None`` only where models differ in it."""
    mixture = fitting_mixture(solver)
    least = solver.build(None, mixture).minimum_steps
    counts = sorted({least, *range(max(least, 10), max(least, 10) + 3)}) if solver.takes_steps else [None]
    spent = set()
    for count in counts:
        sampler = solver.of(mixture, count)
        for end in ENDS:
            grid = grid_of(sampler, mixture.path, end=end)
            evaluator = Evaluator(mixture)
            continued(sampler, begun(sampler, mixture, grid, starts(mixture, grid[0], 3)), evaluator, grid)
            said = sampler.evaluations(grid)
            asked = evaluator.evaluations
            require(
                said is None or said == asked,
                f"evaluations(grid) says {said} for {grid.steps} steps to '{end}'; it asked {asked} times",
            )
            spent.add(said)
    if None in spent:
        _require_other_models_to_cost_otherwise(solver, mixture)


def _require_other_models_to_cost_otherwise(solver: Solver, mixture: GaussianMixture) -> None:
    narrow = GaussianMixture(variances=[v / 100 for v in (0.25, 0.16, 0.36)], path=mixture.path)
    wide = GaussianMixture(means=[[0.0, 0.0]], weights=[1.0], variances=[1.0], path=mixture.path)
    spent = []
    for model in (mixture, narrow, wide):
        sampler, evaluator = solver.of(model), Evaluator(model)
        grid = grid_of(sampler, model.path)
        continued(sampler, begun(sampler, model, grid, starts(model, grid[0], 3)), evaluator, grid)
        spent.append(evaluator.evaluations)
    require(
        len(set(spent)) > 1, f"evaluations(grid) is None, and yet three models are each asked {spent[0]} times: say so"
    )


def require_ends(solver: Solver) -> None:
    """With ``denoise`` the data predicted at the last level are returned; the network is never asked at σ = 0."""
    mixture, sampler, grid, start = ready(solver)
    noisy = solved(sampler, mixture, grid, start)
    denoised = solved(sampler, mixture, grid_of(sampler, mixture.path, end="denoise"), start)
    expected = mixture.predict(noisy, grid[-1]).data
    require_near(denoised, expected, "a grid that denoises last does not end at the data predicted at its last level")
    for end in ("zero", "minimum"):
        grid = grid_of(sampler, mixture.path, end=end)
        state = begun(sampler, mixture, grid, starts(mixture, grid[0], 3))
        state = continued(sampler, state, Watched(mixture), grid)
        require(state.index == grid.steps, f"after all steps state.index is {state.index}, not {grid.steps}")
        require(bool(state.x.isfinite().all()), f"to '{end}' it ends at numbers that are not finite")


def require_hands_off(solver: Solver) -> None:
    """States and predictions stay as they are, a step can be repeated, and torch's random numbers are left alone."""
    mixture, sampler, grid, start = ready(solver)
    random_state, before = torch.get_rng_state(), start.clone()
    evaluator = Watched(mixture)
    state = begun(sampler, mixture, grid, start)
    while state.index < grid.steps:
        given = state.x.clone()
        following = continued(sampler, state, evaluator, grid, until=state.index + 1)
        require(torch.equal(state.x, given), "a step changes in place the state that it was given")
        repeated = continued(sampler, state, evaluator, grid, until=state.index + 1)
        require(torch.equal(following.x, repeated.x), "the same step from the same state leads elsewhere")
        state = following
    evaluator.require_untouched()
    require(torch.equal(start, before), "it changes the start in place")
    unmoved = torch.equal(torch.get_rng_state(), random_state)
    require(unmoved, "it draws from torch's global generator: noise is `state.normal()`")


def require_noise_as_declared(solver: Solver) -> None:
    """It draws noise if its traits say so, from the seed; otherwise none."""
    mixture, sampler, grid, start = ready(solver)
    state = begun(sampler, mixture, grid, start)
    state = continued(sampler, state, Evaluator(mixture), grid)
    draws = state.noise.draws if isinstance(state.noise, FixedNoise) else 0
    declared = solver.traits.is_stochastic
    require(declared or not draws, f"traits.is_stochastic is false, and it draws noise {draws} times")
    if declared:
        require(draws, "traits.is_stochastic is true, and it draws no noise")
        other = solved(sampler, mixture, grid, start, seed=1)
        require(not torch.equal(state.x, other), "traits.is_stochastic is true, and another seed changes nothing")


def require_types(solver: Solver) -> None:
    """In single precision it stays in the type and near the run in double precision; in half too, or it refuses."""
    path = fitting_mixture(solver).path
    exact = None
    for dtype, allowed in (("float64", 0.0), ("float32", 1e-3), ("bfloat16", 0.2)):
        mixture = GaussianMixture(path=path, dtype=dtype)
        try:
            sampler = solver.of(mixture)
            grid = grid_of(sampler, path)
            start = starts(GaussianMixture(path=path, dtype="bfloat16"), grid[0], 32).to(mixture.dtype)
            found = solved(sampler, mixture, grid, start)
        except CompositionError as error:
            require(dtype == "bfloat16", f"it refuses {dtype}: {error.what}")
            return
        require(found.dtype == mixture.dtype, f"from {dtype} it comes to {found.dtype}")
        require(bool(found.isfinite().all()), f"in {dtype} it ends at numbers that are not finite")
        exact = found if exact is None else exact
        # A few samples may fall to another component; most may not.
        error = float((found.double() - exact.double()).square().mean(-1).sqrt().median())
        require(error <= allowed, f"in {dtype} most samples end {error:.3g} or more from those in float64")


class _Times(Evaluator):
    """Notes whether the network is told a time that is not the level's."""

    tells_others = False

    def __call__(self, x: Tensor, level: Level, *, network_time: Tensor | float | None = None) -> Prediction:
        self.tells_others |= network_time is not None
        return super().__call__(x, level, network_time=network_time)


def require_any_form(solver: Solver) -> None:
    """Whichever form the model answers in, the samples are the same."""
    mixture, sampler, grid, start = ready(solver)
    evaluator = _Times(mixture)
    expected = continued(sampler, begun(sampler, mixture, grid, start), evaluator, grid).x
    if evaluator.tells_others:
        raise NotApplicable("it tells the network other times, at which the forms of an answer are not one thing")
    for form in ("noise", "velocity", "flow", "score"):
        other = GaussianMixture(path=mixture.path, form=form)
        found = solved(solver.of(other), other, grid, start)
        require_near(found, expected, f"a model that answers with the {form} gives other samples", 1e-6)


def require_any_shape(solver: Solver) -> None:
    """States of three dimensions are treated as their numbers in a row."""
    path = fitting_mixture(solver).path
    found = []
    for shape in ((3, 2, 2), (12,)):
        model = Gaussian(path, shape, torch.tensor(0.5, dtype=torch.float64), 0.3)
        sampler = solver.of(model)
        grid = grid_of(sampler, path)
        start = starts(model, grid[0], 3)
        end = solved(sampler, model, grid, start)
        require(end.shape == start.shape, f"from states {tuple(start.shape)} it comes to {tuple(end.shape)}")
        found.append(end.flatten(1))
    require_near(found[0], found[1], "states [B, 3, 2, 2] end elsewhere than the same numbers as [B, 12]")
    require(rms(found[0]) > 0, "it ends at zero")
