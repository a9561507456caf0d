"""Conformance of optimizers: what every ``torch.optim.Optimizer`` that lightrail runs must do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from lightrail.testing import optimizer_closure, optimizer_parameters
from lightrail.testing.building import (
    accepts,
    check_is_documented,
    check_names_its_paper,
    missing_options,
    refuses_unknown_options,
    with_defaults,
)
from lightrail.testing.optimizer_building import build, fresh_classifier, trajectory
from lightrail.testing.problems import Classifier, Problem, Rosenbrock, quadratic
from lightrail.testing.runs import require_equal, saved_and_loaded
from lightrail.testing.runs import run as run_problem
from lightrail.testing.suite import Check, NotApplicable, Suite, known_exceptions, name_of, require
from lightrail.traits import traits_of

__all__ = ["OptimizerSuite"]

Options = Mapping[str, Any]
MOST_STEPS = 1000


def check_builds_from_options(plugin: Any, options: Options) -> None:
    """``plugin(params, **options)`` is an optimizer that owns the parameters."""
    missing = missing_options(plugin, options, given=1)
    require(not missing, f"options without a default are not in traits.example: {missing}")
    problem = quadratic()
    optimizer = build(plugin, problem, options)
    require(isinstance(optimizer, Optimizer), f"it is no torch.optim.Optimizer but {type(optimizer).__name__}")
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    require(owned == {id(p) for p in problem.params}, "its param_groups do not hold the parameters that it was given")


def check_rejects_unknown_options(plugin: Any, options: Options) -> None:
    """An option that the signature lacks is an error."""
    refuses_unknown_options(lambda **given: build(plugin, quadratic(), given), options)


def check_lowers_a_quadratic(plugin: Any, options: Options) -> None:
    """It lowers a convex quadratic by a tenth within a thousand steps."""
    _lowers(plugin, options, quadratic())


def check_lowers_rosenbrock(plugin: Any, options: Options) -> None:
    """It lowers Rosenbrock's function, which is not convex, by a tenth within a thousand steps."""
    _lowers(plugin, options, Rosenbrock())


def _lowers(plugin: Any, options: Options, problem: Problem) -> None:
    def loss() -> float:
        with torch.no_grad():
            return float(problem.loss(problem.batch(0)))

    first = loss()
    optimizer = build(plugin, problem, options)
    for done in range(0, MOST_STEPS, 20):
        run_problem(problem, optimizer, 20, start=done)
        if loss() < first / 2:
            return
    require(loss() < 0.9 * first, f"the loss went from {first:.4g} to {loss():.4g} in {MOST_STEPS} steps")


DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def _after_three_steps(plugin: Any, options: Options, dtype: torch.dtype) -> tuple[Problem, Optimizer]:
    problem = Classifier(dtype)
    optimizer = build(plugin, problem, options)
    run_problem(problem, optimizer, 3)
    return problem, optimizer


def check_keeps_parameter_dtype(plugin: Any, options: Options) -> None:
    """Parameters in single, double and bfloat16 precision keep dtype, device and identity, and stay finite."""
    for dtype in DTYPES:
        problem, optimizer = _after_three_steps(plugin, options, dtype)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        require({id(p) for p in held} == {id(p) for p in problem.params}, "it replaced parameters by other tensors")
        for p in problem.params:
            require(p.dtype == dtype and p.device.type == "cpu", f"{dtype} parameters became {p.dtype} on {p.device}")
            require(bool(p.isfinite().all()), f"{dtype} parameters became non-finite within three steps")


def check_keeps_state_in_parameter_dtype(plugin: Any, options: Options) -> None:
    """State that grows with the parameters has their dtype and device; counters and other scalars are free."""
    wider = Classifier(widths=(9,))
    other = build(plugin, wider, options)
    run_problem(wider, other, 3)
    for dtype in DTYPES:
        _, optimizer = _after_three_steps(plugin, options, dtype)
        for tensor in _growing_state(optimizer, other):
            require(
                not tensor.is_floating_point() or tensor.dtype == dtype,
                f"with {dtype} parameters it keeps state of shape {tuple(tensor.shape)} in {tensor.dtype}",
            )
            require(tensor.device.type == "cpu", f"with parameters on the CPU it keeps state on {tensor.device}")


def _growing_state(optimizer: Optimizer, wider: Optimizer) -> list[Tensor]:
    """The state that has another shape where the parameters do."""
    theirs = dict(pytree.tree_flatten_with_path(wider.state_dict())[0])
    return [
        leaf
        for path, leaf in pytree.tree_flatten_with_path(optimizer.state_dict())[0]
        if isinstance(leaf, Tensor) and getattr(theirs.get(path), "shape", None) != leaf.shape
    ]


def _large_state(optimizer: Optimizer) -> list[Tensor]:
    leaves = pytree.tree_leaves(optimizer.state_dict())
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.numel() > 1]


def check_declares_its_state_size(plugin: Any, options: Options) -> None:
    """``traits.state`` is what it keeps for each parameter under its defaults, in copies of the parameters."""
    defaults = with_defaults(plugin, options)
    declared = traits_of(plugin, defaults).state
    if declared is None:
        raise NotApplicable("traits.state is not declared")
    problem = Classifier(widths=(160, 160))  # nearly all in one matrix, so that other shapes count for little
    optimizer = build(plugin, problem, defaults)
    run_problem(problem, optimizer, 12)
    parameters = sum(p.numel() for p in problem.params)
    measured = sum(tensor.numel() for tensor in _large_state(optimizer)) / parameters
    slack = max(0.1, 0.1 * declared)
    require(abs(measured - declared) <= slack, f"traits.state is {declared:g}, but it keeps {measured:.3g} copies")


def check_is_deterministic(plugin: Any, options: Options) -> None:
    """The same seed gives the same parameters, bit for bit."""
    first, second = (trajectory(plugin, options, fresh_classifier(), steps=12) for _ in range(2))
    require_equal(second, first, "two runs from one seed differ")


def check_resumes_exactly(plugin: Any, options: Options) -> None:
    """Saved in mid-run, through a file of plain values, and loaded: it ends where the uninterrupted run ends."""
    for dtype in (torch.float32, torch.bfloat16):
        problem = Classifier(dtype)
        optimizer = build(plugin, problem, options)
        middle = run_problem(problem, optimizer, 7)
        checkpoint = saved_and_loaded(optimizer.state_dict())
        random_state = torch.get_rng_state()
        expected = run_problem(problem, optimizer, 7, start=7)

        resumed = Classifier(dtype)
        with torch.no_grad():
            torch._foreach_copy_(resumed.params, middle)
        optimizer = build(plugin, resumed, options)
        optimizer.load_state_dict(checkpoint)
        torch.set_rng_state(random_state)
        found = run_problem(resumed, optimizer, 7, start=7)
        require_equal(found, expected, f"a resumed run in {dtype} differs from the uninterrupted one")


def _only_with(option: str, plugin: Any) -> None:
    if not accepts(plugin, option):
        raise NotApplicable(f"the signature has no '{option}'")


def check_foreach_equals_loop(plugin: Any, options: Options) -> None:
    """``foreach=True`` and ``foreach=False`` agree to rounding, where the signature has it."""
    _only_with("foreach", plugin)
    at_once, one_by_one = (
        trajectory(plugin, {**options, "foreach": flag}, Classifier(torch.float64), steps=12) for flag in (True, False)
    )
    for a, b in zip(at_once, one_by_one, strict=True):
        require(torch.allclose(a, b, rtol=1e-9, atol=1e-12), "foreach=True and foreach=False part")


def check_maximize_is_minimize_negated(plugin: Any, options: Options) -> None:
    """``maximize=True`` on the negated loss takes the same path, where the signature has it."""
    _only_with("maximize", plugin)
    down = trajectory(plugin, {**options, "maximize": False}, Classifier(torch.float64), steps=12)
    up = trajectory(plugin, {**options, "maximize": True}, Classifier(torch.float64, sign=-1), steps=12)
    for a, b in zip(up, down, strict=True):
        require(torch.allclose(a, b, rtol=1e-9, atol=1e-12), "maximising the negated loss is not minimising the loss")


CHECKS: tuple[Check, ...] = (
    check_is_documented,
    check_names_its_paper,
    check_builds_from_options,
    check_rejects_unknown_options,
    check_lowers_a_quadratic,
    check_lowers_rosenbrock,
    check_keeps_parameter_dtype,
    check_keeps_state_in_parameter_dtype,
    check_declares_its_state_size,
    check_is_deterministic,
    check_resumes_exactly,
    check_foreach_equals_loop,
    check_maximize_is_minimize_negated,
    *optimizer_parameters.CHECKS,
    *optimizer_closure.CHECKS,
)


class OptimizerSuite(Suite):
    """Every check of an optimizer."""

    kind: ClassVar[str] = "optimizer"
    checks: ClassVar[tuple[Check, ...]] = (*CHECKS, known_exceptions(frozenset(map(name_of, CHECKS))))
