"""Conformance of sampler wrappers, each around a method of first and one of second order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from lightrail.errors import CompositionError
from lightrail.generation import (
    Denoiser,
    GaussianMixture,
    Grid,
    Predict,
    Prediction,
    Sampler,
    SamplerWrapper,
    State,
    weighted_sum,
)
from lightrail.testing import solver_accuracy, solver_contract, solver_state
from lightrail.testing.building import (
    accepts,
    check_is_documented,
    check_names_its_paper,
    missing_options,
    refuses_unknown_options,
)
from lightrail.testing.solver_runs import Solver, fitting_mixture, grid_of, solved, starts
from lightrail.testing.suite import Check, NonConformance, NotApplicable, Suite, known_exceptions, name_of, require
from lightrail.traits import Traits, traits_of

__all__ = ["FirstOrder", "SamplerWrapperSuite", "SecondOrder"]

Options = Mapping[str, Any]
STEPS = 12


class FirstOrder(Sampler):
    """x_t = α_t D + σ_t ε."""

    traits: ClassVar[Traits] = Traits(order=1)

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        there = grid[state.index + 1]
        now = predict(state.x, grid[state.index])
        return state.next(_transferred(state.x, now, now.data, there.alpha, there.sigma))


class SecondOrder(Sampler):
    """As the first order, with the data continued to the middle of the step along the line through the last two."""

    traits: ClassVar[Traits] = Traits(order=2)

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        there = grid[state.index + 1]
        now = predict(state.x, grid[state.index])
        data = now.data
        if state.history and math.isfinite(there.lam):
            before = state.history[0]
            share = (there.lam - now.level.lam) / (now.level.lam - before.level.lam) / 2
            data = weighted_sum((1 + share, data), (-share, before.data))
        return state.next(_transferred(state.x, now, data, there.alpha, there.sigma), history=(now,))


def _transferred(x: Tensor, now: Prediction, data: Tensor, alpha: float, sigma: float) -> Tensor:
    ratio = sigma / now.level.sigma
    return weighted_sum((ratio, x), (alpha - ratio * now.level.alpha, data))


BASES: dict[str, type[Sampler]] = {"a method of first order": FirstOrder, "a method of second order": SecondOrder}


def _around(plugin: Any, options: Options, base: type[Sampler]) -> Solver:
    def build(steps: int | None, model: Denoiser) -> SamplerWrapper:
        given = {"denoiser": model} if accepts(plugin, "denoiser") else {}
        return plugin(sampler=base(STEPS if steps is None else steps), **given, **options)

    return Solver(build, traits_of(plugin, options))


def _around_each(name: str, requirement: Callable[..., None], **options: Any) -> Check:
    def check(plugin: Any, given: Options) -> None:
        for label, base in BASES.items():
            try:
                requirement(_around(plugin, given, base), **options)
            except NonConformance as error:
                raise NonConformance(f"around {label}: {error}") from error

    check.__name__, check.__doc__ = f"check_{name}", requirement.__doc__
    return check


def check_builds_from_options(plugin: Any, options: Options) -> None:
    """``plugin(sampler=…, **options)`` is a lightrail.SamplerWrapper that holds the sampler."""
    supplied = {"sampler", "denoiser"}
    missing = [name for name in missing_options(plugin, options, given=0) if name not in supplied]
    require(not missing, f"options without a default are not in traits.example: {missing}")
    for base in BASES.values():
        wrapper: Any = _around(plugin, options, base).build(None, GaussianMixture())
        require(isinstance(wrapper, SamplerWrapper), f"it is no lightrail.SamplerWrapper but {type(wrapper).__name__}")
        require(isinstance(wrapper.sampler, base), "wrapper.sampler is not the sampler that it was put around")
        require(wrapper.steps == STEPS, f"around a sampler of {STEPS} steps it has {wrapper.steps}")


def check_rejects_unknown_options(plugin: Any, options: Options) -> None:
    """An option that the signature lacks is an error."""
    refuses_unknown_options(lambda **given: plugin(sampler=FirstOrder(STEPS), **given), options)


def check_leaves_the_sampler_as_it_is(plugin: Any, options: Options) -> None:
    """The sampler that it holds solves by itself as before."""
    for label, base in BASES.items():
        solver = _around(plugin, options, base)
        mixture = fitting_mixture(solver)
        wrapper: Any = solver.of(mixture)
        grid = grid_of(wrapper, mixture.path)
        start = starts(mixture, grid[0], 4)
        solved(wrapper, mixture, grid, start)
        levels = grid_of(base(STEPS), mixture.path)
        alone = solved(wrapper.sampler, mixture, levels, starts(mixture, levels[0], 4))
        expected = solved(base(STEPS), mixture, levels, starts(mixture, levels[0], 4))
        require(bool((alone == expected).all()), f"{label} solves otherwise by itself once it was inside")


def check_goes_around_another_wrapper(plugin: Any, options: Options) -> None:
    """Around itself it still solves, or an error says that it cannot."""
    solver = _around(plugin, options, FirstOrder)
    mixture = fitting_mixture(solver)
    given = {"denoiser": mixture} if accepts(plugin, "denoiser") else {}
    try:
        wrapper = plugin(sampler=solver.build(None, mixture), **given, **options)
        wrapper.prepare(mixture)
        grid = grid_of(wrapper, mixture.path)
        found = solved(wrapper, mixture, grid, starts(mixture, grid[0], 4))
    except CompositionError as error:
        raise NotApplicable(f"it refuses: {error.what}") from error
    require(bool(found.isfinite().all()), "around itself it ends at numbers that are not finite")


CHECKS: tuple[Check, ...] = (
    check_is_documented,
    check_names_its_paper,
    check_builds_from_options,
    check_rejects_unknown_options,
    check_leaves_the_sampler_as_it_is,
    check_goes_around_another_wrapper,
    _around_each("counts_its_evaluations", solver_contract.require_counted),
    _around_each("ends_as_the_grid_asks", solver_contract.require_ends),
    _around_each("treats_samples_apart", solver_state.require_apart),
    _around_each("can_be_resampled", solver_state.require_selectable),
    _around_each("keeps_nothing_on_itself", solver_state.require_no_memory),
    _around_each("resumes_exactly", solver_state.require_resumed),
    _around_each("keeps_its_hands_off", solver_contract.require_hands_off),
    _around_each("draws_noise_as_declared", solver_contract.require_noise_as_declared),
    _around_each("works_in_half_precision", solver_contract.require_types),
    _around_each("reads_any_form", solver_contract.require_any_form),
    _around_each("takes_any_shape", solver_contract.require_any_shape),
    _around_each("has_its_declared_order", solver_accuracy.require_order, uneven=False),
    _around_each("inverts_if_it_says_so", solver_accuracy.require_inverse),
)


class SamplerWrapperSuite(Suite):
    """Every check of a sampler wrapper."""

    kind: ClassVar[str] = "sampler_wrapper"
    checks: ClassVar[tuple[Check, ...]] = (*CHECKS, known_exceptions(frozenset(map(name_of, CHECKS))))
