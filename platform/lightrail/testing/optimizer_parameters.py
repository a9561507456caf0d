"""What an optimizer must take: parameters of every shape, groups, missing, sparse and complex gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightrail.testing.building import is_foreign, unless_named
from lightrail.testing.optimizer_building import build, build_in_groups, trajectory
from lightrail.testing.problems import Classifier, ComplexLeastSquares, Linear, Problem, SparseEmbedding
from lightrail.testing.runs import require_close, require_equal, run
from lightrail.testing.suite import Check, NotApplicable, require
from lightrail.traits import traits_of

__all__ = ["CHECKS"]

Options = Mapping[str, Any]


def _values(seed: int = 5, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def _moves_finitely(plugin: Any, options: Options, problem: Linear, *names: str) -> None:
    """Runs a few steps; every parameter stays finite and those that are named have moved."""
    before = {name: p.detach().clone() for name, p in problem.named}
    run(problem, build(plugin, problem, options), 4)
    for name, p in problem.named:
        require(bool(p.isfinite().all()), f"the {name} parameter became non-finite")
        require(name not in names or not torch.equal(p, before[name]), f"the {name} parameter did not move")


def check_takes_scalars_and_vectors(plugin: Any, options: Options) -> None:
    """Parameters of no, one, three and four dimensions are updated."""
    shapes = {"scalar": (), "vector": (5,), "matrix": (4, 3), "volume": (2, 3, 2), "kernel": (2, 2, 3, 3)}
    _moves_finitely(plugin, options, Linear(_values(**shapes)), *shapes)


def check_takes_empty_tensors(plugin: Any, options: Options) -> None:
    """A parameter without entries is left alone and harms no other."""
    if is_foreign(plugin):
        raise NotApplicable("torch makes no promise of it, and not all of its own optimizers do it")
    problem = Linear(_values(matrix=(4, 3), hollow=(0, 3), vector=(5,), nothing=(0,)))
    _moves_finitely(plugin, options, problem, "matrix", "vector")


def check_takes_noncontiguous_parameters(plugin: Any, options: Options) -> None:
    """A transposed parameter takes the same path as a contiguous copy of it, and keeps its strides."""

    def path(transposed: bool) -> list[Tensor]:
        values = _values(matrix=(3, 4), vector=(5,))
        values["matrix"] = values["matrix"].t() if transposed else values["matrix"].t().contiguous()
        problem = Linear(values)
        end = trajectory(plugin, options, problem, steps=6)
        require(problem.params[0].is_contiguous() is not transposed, "it changed the strides of a parameter")
        return end

    turned, plain = path(transposed=True), path(transposed=False)
    if not traits_of(plugin, options).is_stochastic:  # random directions are drawn in the order of memory
        require_close(turned, plain, "a transposed parameter takes another path", 1e-9)


def check_takes_missing_gradients(plugin: Any, options: Options) -> None:
    """A parameter without a gradient stays where it is, before it had one and after."""
    problem = Linear(_values(matrix=(4, 3), late=(3, 3), vector=(5,), frozen=(2, 2), unused=(2,)), frozen=["frozen"])
    optimizer = build(plugin, problem, options)
    names = [name for name, _ in problem.named]
    for still in ({"late", "unused"}, {"unused"}, {"late", "unused"}):
        problem.skip = still
        before = dict(zip(names, problem.snapshot(), strict=True))
        after = dict(zip(names, run(problem, optimizer, 3), strict=True))
        for name in names:
            require(bool(after[name].isfinite().all()), f"the parameter '{name}' became non-finite")
            if name in still or name == "frozen":
                require(torch.equal(after[name], before[name]), f"'{name}' had no gradient, and yet it moved")
            else:
                require(not torch.equal(after[name], before[name]), f"'{name}' had a gradient, and did not move")


def check_takes_no_gradient_at_all(plugin: Any, options: Options) -> None:
    """A step in which every gradient is missing goes through and moves nothing."""
    if traits_of(plugin, options).evaluates_again:
        raise NotApplicable("it evaluates the loss itself")
    problem = Classifier()
    optimizer = build(plugin, problem, options)
    before = problem.snapshot()
    optimizer.step()
    require_equal(problem.snapshot(), before, "parameters moved without any gradient")


def check_takes_an_empty_group(plugin: Any, options: Options) -> None:
    """A group without parameters changes nothing."""
    alone = trajectory(plugin, options, Classifier(), steps=4)
    problem = Classifier()
    torch.manual_seed(3)
    count = len(problem.params)
    beside = run(problem, build_in_groups(plugin, problem, options, {}, {}, sizes=(count, 0)), 4)
    require_equal(beside, alone, "an empty group beside the other changes the path")


def check_takes_groups_with_own_lr(plugin: Any, options: Options) -> None:
    """Another lr in one group changes the first step of that group and of no other."""
    if traits_of(plugin, options).sets_step_size:
        raise NotApplicable("it sets its own step size")
    lr = build(plugin, Classifier(), options).param_groups[0].get("lr")
    if lr is None:
        raise NotApplicable("its groups have no lr")

    def first_step(second: float) -> list[Tensor]:
        problem = Classifier()
        torch.manual_seed(3)
        return run(problem, build_in_groups(plugin, problem, options, {"lr": lr}, {"lr": second}, sizes=(2, 2)), 1)

    same, other = first_step(lr), first_step(lr / 4)
    require_equal(other[:2], same[:2], "the lr of the second group changes the first group")
    moved = any(not torch.equal(a, b) for a, b in zip(other[2:], same[2:], strict=True))
    require(moved, "the lr of the second group has no effect on it")


def _ends_lower(plugin: Any, options: Options, problem: Problem) -> Callable[[], None]:
    def attempt() -> None:
        first = float(problem.loss(problem.batch(0)).detach())
        optimizer = build(plugin, problem, options)
        start = problem.snapshot()
        end = run(problem, optimizer, 20)
        last = float(problem.loss(problem.batch(0)).detach())
        require(all(bool(p.isfinite().all()) for p in end), "it takes them and makes the parameters non-finite")
        require(any(not torch.equal(a, b) for a, b in zip(end, start, strict=True)), "it takes them and does nothing")
        require(last < first, f"it takes them and raises the loss from {first:.4g} to {last:.4g}")

    return attempt


def check_takes_or_names_sparse_gradients(plugin: Any, options: Options) -> None:
    """Sparse gradients are used, or refused by an error that says "sparse"."""
    unless_named("sparse", _ends_lower(plugin, options, SparseEmbedding()))


def check_takes_or_names_complex_gradients(plugin: Any, options: Options) -> None:
    """Complex parameters are optimized, or refused by an error that says "complex"."""
    unless_named("complex", _ends_lower(plugin, options, ComplexLeastSquares()))


CHECKS: tuple[Check, ...] = (
    check_takes_scalars_and_vectors,
    check_takes_empty_tensors,
    check_takes_noncontiguous_parameters,
    check_takes_missing_gradients,
    check_takes_no_gradient_at_all,
    check_takes_an_empty_group,
    check_takes_groups_with_own_lr,
    check_takes_or_names_sparse_gradients,
    check_takes_or_names_complex_gradients,
)
