"""One trial: a method on a problem from one seed, until the passes are spent."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightrail.bench.claims.problem import Problem
from lightrail.catalogue import load
from lightrail.step import Transform, TransformedOptimizer
from lightrail.traits import traits_of

__all__ = ["Trial", "run_trial"]

_MARKS = 20


@dataclass(frozen=True)
class Trial:
    """What came of one trial.

    Args:
        passes: How many had been spent when the merit was looked at.
        merits: The merit then; infinite from where the loss was not finite.
    """

    passes: tuple[float, ...]
    merits: tuple[float, ...]

    @property
    def final(self) -> float:
        return self.merits[-1]

    def passes_to(self, merit: float) -> float:
        """After how many passes the merit was first as low, between marks on a straight line; infinite if never."""
        before = None
        for spent, found in zip(self.passes, self.merits, strict=True):
            if found <= merit:
                if before is None or not math.isfinite(before[1]):
                    return spent
                return before[0] + (spent - before[0]) * (before[1] - merit) / max(before[1] - found, 1e-30)
            before = spent, found
        return math.inf


def run_trial(problem: str, kind: str, method: str, options: Mapping[str, Any], seed: int) -> Trial:
    """Trains once.

    The learning rate falls on a straight line to zero over the passes, for methods that take a schedule.

    Args:
        problem: The name of a plugin of the kind ``problem``.
        kind: ``optimizer``, or ``transform`` in front of AdamW.
        method: Its name.
        options: Its options.
        seed: Of weights, batches and whatever is drawn.
    """
    torch.manual_seed(seed)
    task: Problem = load("problem", problem)()
    optimizer = _optimizer(task, kind, method, options)
    scheduler, share = None, [0.0]
    if not traits_of(load(kind, method), options).sets_step_size:
        scheduler = LambdaLR(optimizer, lambda _: max(0.0, 1 - share[0]))
    spent, step, passes, merits = 0.0, 0, [0.0], [task.merit()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while spent < task.passes:
            closure = task.closure(step)
            loss = optimizer.step(closure)  # type: ignore[arg-type]
            if not math.isfinite(float(loss)):
                break
            step += 1
            spent += closure.passes
            share[0] = spent / task.passes
            if scheduler is not None:
                scheduler.step()
            if spent >= task.passes * len(merits) / _MARKS:
                passes.append(spent)
                merits.append(_merit(task, optimizer))
                if not math.isfinite(merits[-1]):
                    break
    if spent < task.passes or not math.isfinite(merits[-1]):
        passes.append(float(task.passes))
        merits.append(math.inf)
    return Trial(tuple(passes), tuple(merits))


def _optimizer(task: Problem, kind: str, method: str, options: Mapping[str, Any]) -> Optimizer:
    if kind == "transform":
        own = {name: value for name, value in options.items() if name != "lr"}
        transform: Transform = load("transform", method)(**own)
        rate = {"lr": options["lr"]} if "lr" in options else {}
        return TransformedOptimizer(torch.optim.AdamW(task.groups(named=False), **rate), [transform])
    cls = load(kind, method)
    return cls(task.groups(named=traits_of(cls, options).needs_parameter_names), **options)


def _merit(task: Problem, optimizer: Any) -> float:
    """At the point that the method wants evaluated."""
    if not traits_of(type(optimizer)).has_evaluation_point:
        return task.merit()
    optimizer.eval()
    found = task.merit()
    optimizer.train()
    return found
