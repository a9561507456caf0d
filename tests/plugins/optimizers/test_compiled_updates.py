"""Updates as rules over lists compile into one graph, once, however the learning rate moves."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from lightrail.catalogue import available, load
from lightrail.traits import traits_of
from lightrail_optimizers import tensorwise
from lightrail_optimizers.tensorwise import TensorwiseOptimizer


def compiled_methods() -> list[str]:
    found: dict[Any, str] = {}
    for name in available("optimizer"):
        cls = load("optimizer", name)
        offers = isinstance(cls, type) and "compile" in inspect.signature(cls).parameters
        if offers and issubclass(cls, TensorwiseOptimizer) and not traits_of(cls).evaluates_again:
            found.setdefault(cls, name)
    return sorted(found.values())


def trained(name: str, steps: int, **options: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)  # for methods that draw
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 4), (5,), (), (3, 2, 2)]
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]
    optimizer = load("optimizer", name)(params, **options)
    for t in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (t + 1)
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("name", compiled_methods())
def test_an_update_compiles_once_and_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    rules: dict[Any, Any] = {}

    def compiled(rule: Any) -> Any:
        return rules.setdefault(rule, torch.compile(rule, fullgraph=True, backend=counter))

    expected = trained(name, 2)
    monkeypatch.setattr(tensorwise, "_compiled", compiled)
    two = trained(name, 2, compile=True)
    for a, b in zip(two, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    graphs = counter.frame_count
    assert graphs >= 1
    expected = trained(name, 6)
    for a, b in zip(trained(name, 6, compile=True), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert counter.frame_count == graphs
