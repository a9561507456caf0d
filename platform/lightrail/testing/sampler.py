"""Conformance of samplers: solvers of the generative process, on mixtures whose solution is known, and of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from lightrail.catalogue import available
from lightrail.generation import Denoiser, Sampler
from lightrail.generation.text import TokenSampler
from lightrail.testing import solver_accuracy, solver_contract, solver_state, token_sampler
from lightrail.testing.building import (
    accepts,
    check_is_documented,
    check_names_its_paper,
    missing_options,
    refuses_unknown_options,
)
from lightrail.testing.solver_runs import Solver
from lightrail.testing.suite import Check, NotApplicable, Suite, known_exceptions, name_of, require
from lightrail.traits import traits_of

__all__ = ["SamplerSuite"]

Options = Mapping[str, Any]


def _solver(plugin: Any, options: Options) -> Solver:
    def build(steps: int | None, model: Denoiser) -> Sampler:
        return plugin(**options) if steps is None else plugin(**{**options, "steps": steps})

    return Solver(build, traits_of(plugin, options), accepts(plugin, "steps"))


def _takes_tokens(plugin: Any) -> bool:
    return isinstance(plugin, type) and issubclass(plugin, TokenSampler)


def _of_solvers(name: str, requirement: Callable[..., None], **options: Any) -> Check:
    """A check of samplers that solve the generative process."""

    def check(plugin: Any, given: Options) -> None:
        if _takes_tokens(plugin):
            raise NotApplicable("it chooses tokens")
        requirement(_solver(plugin, given), **options)

    return _named(check, name, requirement)


def _of_tokens(name: str, requirement: Callable[..., None]) -> Check:
    """A check of samplers that choose tokens."""

    def check(plugin: Any, given: Options) -> None:
        if not _takes_tokens(plugin):
            raise NotApplicable("it chooses no tokens")
        requirement(plugin(**given))

    return _named(check, name, requirement)


def _named(check: Check, name: str, requirement: Callable[..., None]) -> Check:
    check.__name__, check.__doc__ = f"check_{name}", requirement.__doc__
    return check


def check_says_where_it_is_from(plugin: Any, options: Options) -> None:
    """A solver declares traits, with its paper; a sampler of tokens may be anybody's."""
    if not _takes_tokens(plugin):
        check_names_its_paper(plugin, options)


def check_builds_from_options(plugin: Any, options: Options) -> None:
    """``plugin(**options)`` is a lightrail.Sampler, or a lightrail.TokenSampler."""
    missing = missing_options(plugin, options, given=0)
    require(not missing, f"options without a default are not in traits.example: {missing}")
    sampler = plugin(**options)
    is_one = isinstance(sampler, Sampler | TokenSampler)
    require(is_one, f"it is neither lightrail.Sampler nor lightrail.TokenSampler but {type(sampler).__name__}")
    if isinstance(sampler, Sampler):
        grids = available("time_grid")
        known = not grids or sampler.grid_name in grids
        require(known, f"its grid_name '{sampler.grid_name}' is no installed time grid: {', '.join(grids)}")


def check_rejects_unknown_options(plugin: Any, options: Options) -> None:
    """An option that the signature lacks is an error."""
    refuses_unknown_options(plugin, options)


CHECKS: tuple[Check, ...] = (
    check_is_documented,
    check_says_where_it_is_from,
    check_builds_from_options,
    check_rejects_unknown_options,
    _of_solvers("refuses_too_few_steps", solver_contract.require_fewest_steps),
    _of_solvers("counts_its_evaluations", solver_contract.require_counted),
    _of_solvers("ends_as_the_grid_asks", solver_contract.require_ends),
    _of_solvers("treats_samples_apart", solver_state.require_apart),
    _of_solvers("can_be_resampled", solver_state.require_selectable),
    _of_solvers("keeps_nothing_on_itself", solver_state.require_no_memory),
    _of_solvers("resumes_exactly", solver_state.require_resumed),
    _of_solvers("keeps_its_hands_off", solver_contract.require_hands_off),
    _of_solvers("draws_noise_as_declared", solver_contract.require_noise_as_declared),
    _of_solvers("works_in_half_precision", solver_contract.require_types),
    _of_solvers("reads_any_form", solver_contract.require_any_form),
    _of_solvers("takes_any_shape", solver_contract.require_any_shape),
    _of_solvers("works_on_its_paths", solver_accuracy.require_paths),
    _of_solvers("has_its_declared_order", solver_accuracy.require_order, uneven=False),
    _of_solvers("has_its_order_on_uneven_grids", solver_accuracy.require_order, uneven=True),
    _of_solvers("comes_to_the_distribution", solver_accuracy.require_gaussian),
    _of_solvers("inverts_if_it_says_so", solver_accuracy.require_inverse),
    _of_tokens("gives_probabilities", token_sampler.require_probabilities),
    _of_tokens("prefers_likelier_tokens", token_sampler.require_likelier_first),
    _of_tokens("treats_rows_apart", token_sampler.require_alone),
)


class SamplerSuite(Suite):
    """Every check of a sampler."""

    kind: ClassVar[str] = "sampler"
    checks: ClassVar[tuple[Check, ...]] = (*CHECKS, known_exceptions(frozenset(map(name_of, CHECKS))))
