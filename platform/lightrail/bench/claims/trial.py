"""One trial: a method on a problem from one seed, until the passes are spent."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightrail.bench.claims.outcome import Trial
from lightrail.bench.claims.problem import Problem
from lightrail.bench.claims.run_trial import trial_by_run
from lightrail.catalogue import load
from lightrail.step import Transform, TransformedOptimizer
from lightrail.step.transform import has_evaluation_point
from lightrail.traits import traits_of

__all__ = ["Trial", "run_trial"]

_MARKS = 20


def run_trial(
    problem: str,
    kind: str,
    method: str,
    options: Mapping[str, Any],
    seed: int,
    behind: Mapping[str, Any] | None = None,
) -> Trial:
    """Trains once.

    The learning rate falls on a straight line to zero over the passes, for methods that take a schedule.

    Args:
        problem: The name of a plugin of the kind ``problem``.
        kind: Of the method.
        method: Its name.
        options: Its options, and the learning rate as ``lr``.
        seed: Of weights, batches and whatever is drawn.
        behind: For a method that is no optimizer, the one behind it: ``{"optimizer": name, **options}``.
    """
    cls = load("problem", problem)
    if kind not in ("optimizer", "transform"):
        return trial_by_run(problem, kind, method, options, seed, behind or {})
    torch.manual_seed(seed)
    task: Problem = cls()
    optimizer = _optimizer(task, kind, method, options, behind or {"optimizer": "adamw"})
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
    return Trial(tuple(passes), tuple(merits), cls.outcome(merits))


def _optimizer(
    task: Problem, kind: str, method: str, options: Mapping[str, Any], behind: Mapping[str, Any]
) -> Optimizer:
    if kind == "transform":
        own = {name: value for name, value in options.items() if name != "lr"}
        transform: Transform = load("transform", method)(**own)
        if task.module is not None:
            transform.attach(task.module)
        rate = {"lr": options["lr"]} if "lr" in options else {}
        inner = {name: value for name, value in behind.items() if name != "optimizer"}
        return TransformedOptimizer(
            _optimizer(task, "optimizer", behind["optimizer"], {**inner, **rate}, {}), [transform]
        )
    cls = load(kind, method)
    return cls(task.groups(named=traits_of(cls, options).needs_parameter_names), **options)


def _merit(task: Problem, optimizer: Any) -> float:
    """At the point that the method wants evaluated."""
    if not has_evaluation_point(optimizer):
        return task.merit()
    optimizer.eval()
    found = task.merit()
    optimizer.train()
    return found
