"""Every ordered pair of transforms, around three optimizers, under accumulation: it runs, or it says why not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from lightrail import Transform, TransformedOptimizer
from lightrail.catalogue import available, load
from lightrail.errors import PluginError, UserError
from lightrail.testing.problems import Classifier
from lightrail.traits import traits_of
from lightrail_optimizers import SophiaG

NAMES = available("transform")
OPTIMIZERS: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    "sgd": lambda params: SGD(params, lr=0.01, momentum=0.9),
    "adamw": lambda params: AdamW(params, lr=0.01),
    # Asks for the gradient of sampled labels besides: the chain must pass that question on.
    "sophia": lambda params: SophiaG(params, lr=0.01, update_every=1),
}


def make(name: str) -> Transform:
    try:
        cls = load("transform", name)
    except PluginError as error:  # of an extra that is not installed
        pytest.skip(str(error))
    return cls(**traits_of(cls).example)


def steps(names: tuple[str, ...], build: Callable[[list[Tensor]], Optimizer]) -> list[Tensor]:
    problem = Classifier()
    torch.manual_seed(0)
    transforms = [make(name) for name in names]
    for transform in transforms:
        transform.attach(problem.module)
    optimizer = TransformedOptimizer(build(problem.params), transforms)
    for step in range(2):
        loss: Any = optimizer.step(problem.closure(problem.batch(2 * step), problem.batch(2 * step + 1)))
        assert bool(torch.isfinite(loss))
    return problem.snapshot()


@pytest.mark.parametrize("first", NAMES)
def test_a_pair_runs_or_is_refused_with_a_reason(first: str) -> None:
    refusals: list[UserError] = []
    start = Classifier().snapshot()
    for second, (label, build) in itertools.product(NAMES, OPTIMIZERS.items()):
        if second == first:
            continue
        try:
            found = steps((first, second), build)
        except UserError as error:
            refusals.append(error)
            continue
        assert all(bool(p.isfinite().all()) for p in found), f"[{first}, {second}] around {label}"
        assert any(not torch.equal(a, b) for a, b in zip(found, start, strict=True)), f"[{first}, {second}] {label}"
    assert all(error.found and error.allowed and error.remedy for error in refusals)
