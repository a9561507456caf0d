"""Running a method on a problem, saving and loading on the way, and comparing where runs end."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightrail.testing.problems import Problem
from lightrail.testing.suite import NotApplicable, require
from lightrail.traits import Traits

__all__ = ["require_close", "require_declared_evaluations", "require_equal", "run", "saved_and_loaded"]


def run(problem: Problem, optimizer: Optimizer, steps: int, start: int = 0) -> list[Tensor]:
    """Steps a method, each on its own batch, and returns copies of the parameters."""
    for step in range(start, start + steps):
        optimizer.step(problem.closure(problem.batch(step)))  # type: ignore[arg-type]
    return problem.snapshot()


def saved_and_loaded(state: Any) -> Any:
    """What a checkpoint makes of a state: through a file format, plain values and tensors only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def require_equal(found: Sequence[Tensor], expected: Sequence[Tensor], message: str) -> None:
    """Bit for bit."""
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        if not torch.equal(a, b):
            require(False, f"{message}: tensor {index} differs by up to {(a - b).abs().max().item():.3g}")


def require_close(found: Sequence[Tensor], expected: Sequence[Tensor], message: str, relative: float = 1e-6) -> None:
    """Up to ``relative`` times the largest entry of each tensor."""
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a.numel() == 0:
            continue
        allowed = relative * max(b.abs().max().item(), 1e-3)
        difference = (a - b).abs().max().item()
        require(difference <= allowed, f"{message}: tensor {index} differs by {difference:.3g}, {allowed:.3g} allowed")


def require_declared_evaluations(traits: Traits, spent: Sequence[float]) -> None:
    """Compares what a method says that it spends with what it spent in each of its steps."""
    if traits.extra_evaluations is None:
        raise NotApplicable("what it spends depends on the model")
    if not traits.evaluates_again:
        require(max(spent) <= 1, f"it evaluated {max(spent)} times in one step, and its traits say once")
    declared, measured = 1 + traits.extra_evaluations, sum(spent[1:]) / len(spent[1:])
    require(
        abs(measured - declared) <= 0.1 * declared,
        f"traits.extra_evaluations says {declared:g} evaluations a step in all; it spent {measured:g}",
    )
