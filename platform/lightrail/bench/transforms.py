"""What a step behind each gradient transform costs, and how much of that is not evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightrail.bench.table import Table
from lightrail.catalogue import available, load
from lightrail.errors import UserError
from lightrail.step import Closure, TransformedOptimizer
from lightrail.step.closure import QUESTIONS
from lightrail.testing.problems import Classifier
from lightrail.traits import traits_of

__all__ = ["measure_transforms"]

_STEPS, _WARM = 7, 2
_BATCH, _ROWS = 512, 64  # samples; fewer where a step has a gradient for each of them


def measure_transforms(table: Table, rounds: int) -> None:
    """Adds, for each installed transform, its step beside the plain one and beside what it was answered.

    What a step was answered is the time inside its closure (each evaluation, Hessian-vector product, Jacobian) and
    inside the optimizer's own update, both taken in that very step; the rest is the transform's own.

    Args:
        table: Where the rows go.
        rounds: How often all of them are measured in turn.
    """
    names = [name for name in available("transform") if _can_be_built(name)]
    steps: dict[str, list[float]] = {name: [] for name in names}
    answered: dict[str, list[float]] = {name: [] for name in names}
    beside: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            size = _ROWS if traits_of(load("transform", name)).needs_sample_losses else _BATCH
            beside[name].append(_time_steps(None, size)[0])
            step, asked = _time_steps(name, size)
            steps[name].append(step)
            answered[name].append(asked)
    for name in names:
        table.add(f"{name}, a step", steps[name], "the plain step", beside=beside[name])
        label = f"{name}, beside its evaluations"
        table.add(label, steps[name], "its evaluations and the update", 1.05, answered[name])


class _TimedAdamW(torch.optim.AdamW):
    """Counts the time of its update, without that of the closure which it calls."""

    seconds = 0.0

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        inside = 0.0

        def timed() -> Any:
            nonlocal inside
            began = time.perf_counter()
            loss = closure()
            inside += time.perf_counter() - began
            return loss

        began = time.perf_counter()
        loss = super().step(timed)
        self.seconds += time.perf_counter() - began - inside
        return loss


class _Timed(Closure):
    """Counts the time spent inside the outermost question of a step."""

    seconds = 0.0
    _depth = 0

    def _timed(self, ask: Callable[..., Any], *args: Any, **options: Any) -> Any:
        self._depth += 1
        began = time.perf_counter()
        try:
            return ask(*args, **options)
        finally:
            self._depth -= 1
            if self._depth == 0:
                self.seconds += time.perf_counter() - began

    def __call__(self) -> Tensor:
        return self._timed(super().__call__)

    def gradient(self) -> Any:
        return self._timed(super().gradient)


def _timing(question: str) -> Callable[..., Any]:
    plain = getattr(Closure, question)
    return lambda self, *args, **options: self._timed(plain, self, *args, **options)


for _question in QUESTIONS:
    setattr(_Timed, _question, _timing(_question))


class _Wide(Classifier):
    """Three classes in a network where a step is mostly its evaluation, as it is in networks that are used."""

    closure_class = _Timed

    def __init__(self, size: int = _BATCH) -> None:
        super().__init__(widths=(512, 512))
        self.size = size

    def batch(self, step: int) -> Any:
        generator = torch.Generator().manual_seed(step)
        targets = torch.randint(3, (self.size,), generator=generator)
        return torch.randn(self.size, 6, generator=generator) + F.one_hot(targets, 6), targets

    def sample_losses(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.module(batch[0]), batch[1], reduction="none")


def _can_be_built(name: str) -> bool:
    """Whether what it needs is installed, and its example fits this problem."""
    try:
        _transformed(_Wide(), name)
    except UserError:
        return False
    return True


def _transformed(problem: _Wide, name: str | None) -> TransformedOptimizer:
    transforms = []
    if name is not None:
        cls = load("transform", name)
        transforms = [cls(**traits_of(cls).example)]
        transforms[0].attach(problem.module)
    return TransformedOptimizer(_TimedAdamW(problem.params, lr=1e-3), transforms)


def _time_steps(name: str | None, size: int) -> tuple[float, float]:
    """Microseconds a step, and of these inside the closure and the update; medians of some steps."""
    problem = _Wide(size)
    optimizer = _transformed(problem, name)
    inner: Any = optimizer.optimizer
    batches = [problem.batch(step) for step in range(2)]
    steps, inside = [], []
    for step in range(_STEPS):
        closure: Any = problem.closure(batches[step % 2])
        inner.seconds = 0.0
        began = time.perf_counter()
        optimizer.step(closure)
        steps.append(time.perf_counter() - began)
        inside.append(closure.seconds + inner.seconds)
    return 1e6 * median(steps[_WARM:]), 1e6 * median(inside[_WARM:])
