"""Conformance of batchings: what they ask for can be given, and a resumed one goes on where it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from lightrail.errors import UserError
from lightrail.step.batching import Batching, Extent, Portion
from lightrail.testing.building import check_is_documented, missing_options, refuses_unknown_options
from lightrail.testing.problems import Classifier
from lightrail.testing.runs import saved_and_loaded
from lightrail.testing.suite import Check, NotApplicable, Suite, known_exceptions, name_of, require
from lightrail.traits import traits_of

__all__ = ["BatchingSuite"]

Options = Mapping[str, Any]
EXTENT = Extent(data_size=640, batch_size=16, total_samples=6400, scales_with_gradient=True)


def _begun(plugin: Any, options: Options, extent: Extent = EXTENT) -> Batching:
    batching = plugin(**options)
    batching.begin(extent)
    return batching


def _run(batching: Batching, steps: int, samples: int = 0, start: int = 0) -> tuple[list[Portion], int]:
    """The portions of some steps, each with its gradient looked at where the batching watches it."""
    portions = []
    for step in range(start, start + steps):
        portion = batching.next(samples, step)
        if traits_of(type(batching)).watches_gradient:
            problem = Classifier()
            closure = problem.closure(problem.batch(step))
            closure()
            with torch.no_grad():
                batching.observe(closure.params, closure)
        portions.append(portion)
        samples += portion.samples
    return portions, samples


def check_builds_from_options(plugin: Any, options: Options) -> None:
    """``plugin(**options)`` is a lightrail.Batching with an answer to ``next``."""
    missing = missing_options(plugin, options, given=0)
    require(not missing, f"options without a default are not in traits.example: {missing}")
    batching = plugin(**options)
    require(isinstance(batching, Batching), f"it is no lightrail.Batching but {type(batching).__name__}")
    require(type(batching).next is not Batching.next, "it does not override next")
    watches = type(batching).observe is not Batching.observe
    declared = traits_of(plugin, options).watches_gradient
    require(watches == declared, f"it {'overrides' if watches else 'lacks'} observe; watches_gradient is {declared}")


def check_rejects_unknown_options(plugin: Any, options: Options) -> None:
    """An option that the signature lacks is an error."""
    refuses_unknown_options(plugin, options)


def check_asks_for_what_the_data_have(plugin: Any, options: Options) -> None:
    """Every portion has at least one sample, no more than the data, and a positive factor of the rate."""
    for step, portion in enumerate(_run(_begun(plugin, options), 60)[0]):
        require(isinstance(portion, Portion), f"next returns no lightrail.Portion but {type(portion).__name__}")
        require(isinstance(portion.samples, int), f"step {step} asks for {portion.samples!r} samples")
        require(1 <= portion.samples <= EXTENT.data_size, f"step {step} asks for {portion.samples} of 640 samples")
        require(portion.lr_factor > 0, f"step {step} multiplies the learning rate by {portion.lr_factor}")


def check_refuses_what_the_data_cannot_fill(plugin: Any, options: Options) -> None:
    """With three samples it asks for at most three, or an error says before the first step that it cannot."""
    extent = Extent(data_size=3, batch_size=3, total_samples=30, scales_with_gradient=True)
    try:
        batching = _begun(plugin, options, extent)
    except UserError:
        return
    largest = max(portion.samples for portion in _run(batching, 10)[0])
    require(largest <= 3, f"with three samples it asks for {largest}, and begin said nothing")


def check_keeps_its_hands_off(plugin: Any, options: Options) -> None:
    """Looking at the gradient changes neither parameters nor gradients nor torch's random numbers."""
    if not traits_of(plugin, options).watches_gradient:
        raise NotApplicable("it does not look at the gradient")
    batching, problem = _begun(plugin, options), Classifier()
    for step in range(3):
        closure = problem.closure(problem.batch(step))
        closure()
        gradients = [p.grad.clone() for p in problem.params if p.grad is not None]
        before, random_state = problem.snapshot(), torch.get_rng_state()
        with torch.no_grad():
            batching.observe(closure.params, closure)
        found = [p.grad for p in problem.params if p.grad is not None]
        pairs = [*zip(problem.snapshot(), before, strict=True), *zip(found, gradients, strict=True)]
        require(all(torch.equal(a, b) for a, b in pairs), "observe changes parameters or gradients")
        require(torch.equal(torch.get_rng_state(), random_state), "observe draws random numbers")


def check_resumes_exactly(plugin: Any, options: Options) -> None:
    """Saved in mid-run and loaded, every later portion is the same."""
    batching = _begun(plugin, options)
    _, samples = _run(batching, 7)
    state = saved_and_loaded(batching.state_dict())
    expected, _ = _run(batching, 9, samples, start=7)
    resumed = _begun(plugin, options)
    resumed.load_state_dict(state)
    found, _ = _run(resumed, 9, samples, start=7)
    require(found == expected, "a resumed batching asks for other portions than the uninterrupted one")


def check_logs_numbers(plugin: Any, options: Options) -> None:
    """Its figures are numbers by name."""
    batching = _begun(plugin, options)
    _run(batching, 3)
    for name, value in batching.logged().items():
        require(isinstance(name, str) and isinstance(value, int | float), f"logged() holds {name!r}: {value!r}")


CHECKS: tuple[Check, ...] = (
    check_is_documented,
    check_builds_from_options,
    check_rejects_unknown_options,
    check_asks_for_what_the_data_have,
    check_refuses_what_the_data_cannot_fill,
    check_keeps_its_hands_off,
    check_resumes_exactly,
    check_logs_numbers,
)


class BatchingSuite(Suite):
    """Every check of a batching."""

    kind: ClassVar[str] = "batching"
    checks: ClassVar[tuple[Check, ...]] = (*CHECKS, known_exceptions(frozenset(map(name_of, CHECKS))))
