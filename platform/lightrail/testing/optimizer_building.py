"""How the checks build an optimizer, and the run that most of them compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightrail.testing.problems import Classifier, Problem
from lightrail.testing.runs import run
from lightrail.testing.suite import NotApplicable
from lightrail.traits import traits_of

__all__ = ["build", "build_in_groups", "fresh_classifier", "trajectory"]


def build(plugin: Any, problem: Problem, options: Mapping[str, Any]) -> Optimizer:
    """The optimizer of all parameters of a problem; named ones where its traits ask for names."""
    traits = traits_of(plugin, options)
    if traits.needs_per_sample_gradients:
        raise NotApplicable("it needs one gradient a sample, which a plain loop does not give")
    return plugin(problem.named if traits.needs_parameter_names else problem.params, **options)


def build_in_groups(
    plugin: Any, problem: Problem, options: Mapping[str, Any], *own: Mapping[str, Any], sizes: tuple[int, ...]
) -> Optimizer:
    """The optimizer over consecutive groups of the given sizes, each with options of its own."""
    entries: list[Any] = problem.named if traits_of(plugin, options).needs_parameter_names else problem.params
    groups, start = [], 0
    for size, extra in zip(sizes, own, strict=True):
        groups.append({"params": entries[start : start + size], **extra})
        start += size
    return plugin(groups, **options)


def fresh_classifier() -> Classifier:
    return Classifier(torch.float32)


def trajectory(plugin: Any, options: Mapping[str, Any], problem: Problem, steps: int) -> list[Tensor]:
    """Where a method ends from a fixed seed."""
    torch.manual_seed(3)
    return run(problem, build(plugin, problem, options), steps)
