# pyright: reportArgumentType=false
"""The problem of sharpness: its merit is the top eigenvalue, and what has not learnt yet is not flat."""

from __future__ import annotations

import pytest
import torch

from lightrail import Closure, TransformedOptimizer
from lightrail_optimizers.problems.sharpness import Sharpness
from lightrail_optimizers.transforms.sam import SAM


def made(seed: int = 1) -> Sharpness:
    torch.manual_seed(seed)
    return Sharpness()


def trained(*transforms, steps: int = 300) -> Sharpness:
    problem = made()
    inner = torch.optim.AdamW(problem.groups(named=False), lr=0.05)
    optimizer = TransformedOptimizer(inner, transforms)
    for step in range(steps):
        inner.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        optimizer.step(problem.closure(step))
    return problem


@pytest.fixture(scope="module")
def fitted() -> Sharpness:
    return trained()


def whole(problem: Sharpness) -> Closure:
    return Closure(problem._loss, [p for _, p in problem.named_parameters()], (problem._x, problem._y))


def largest_by_powers(closure: Closure) -> float:
    torch.manual_seed(0)
    v = [torch.randn_like(p) for p in closure.params]
    size = 0.0
    for _ in range(200):
        norm = torch.sqrt(sum((x**2).sum() for x in v))
        v = closure.hvp([x / norm for x in v])
        size = float(torch.sqrt(sum((x**2).sum() for x in v)))
    return size


def test_the_merit_is_the_top_eigenvalue_once_it_has_learnt(fitted):
    assert whole(fitted).loss() < 0.05
    assert fitted.merit() == pytest.approx(largest_by_powers(whole(fitted)), rel=1e-2)


def test_before_that_it_is_held_against_it(fitted):
    problem = made()
    loss = float(whole(problem).loss())
    assert loss > 0.3
    assert problem.merit() == pytest.approx(largest_by_powers(whole(problem)) * loss / 0.05, rel=1e-2)
    assert problem.merit() > 2 * fitted.merit()


def test_after_as_many_steps_sam_is_flatter(fitted):
    flat = trained(SAM(rho=0.05))
    assert whole(flat).loss() < 0.1
    assert largest_by_powers(whole(flat)) < 0.75 * largest_by_powers(whole(fitted))


def test_batches_are_not_changed_by_what_a_method_draws():
    problems = made(), made()
    for step in range(3):
        torch.rand(step)
        losses = [float(problem.closure(step)()) for problem in problems]
        assert losses[0] == losses[1]
