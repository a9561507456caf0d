"""Clipping of each entry at one value."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightrail import Closure, TransformedOptimizer
from lightrail.errors import ConfigurationError
from lightrail_optimizers import ClipValue, CoordinateClip
from lightrail_optimizers.transforms.clip_value import clip_coordinates


def clipped(g, transform):
    """The gradient after the transform."""
    p = nn.Parameter(torch.zeros_like(g))
    p.grad = g.clone()
    with torch.no_grad():
        transform.before_step([p], Closure(lambda: p.sum(), [p]))
    return p.grad


def test_each_entry_by_itself():
    g = torch.tensor([-3.0, 0.5, 2.0, -0.1])
    assert clipped(g, ClipValue(1.0)).tolist() == pytest.approx([-1.0, 0.5, 1.0, -0.1])
    assert ClipValue().max_value == 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_it_is_torchs_and_that_of_a_fixed_threshold(dtype):
    torch.manual_seed(0)
    g = torch.randn(7, 5).to(dtype).t()
    p = nn.Parameter(torch.zeros_like(g))
    p.grad = g.clone()
    nn.utils.clip_grad_value_([p], 0.3)
    assert torch.equal(clipped(g, ClipValue(0.3)), p.grad)
    assert torch.equal(clipped(g, CoordinateClip(threshold=0.3)), p.grad)


def test_an_infinite_bound_clips_nothing():
    torch.manual_seed(0)
    g = torch.randn(4, 5)
    assert torch.equal(clipped(g, ClipValue(math.inf)), g)
    assert torch.equal(clipped(g.half(), ClipValue(1e6)), g.half())  # half precision cannot hold a million


def test_what_is_not_finite():
    found = clipped(torch.tensor([torch.nan, torch.inf, -torch.inf, 0.5]), ClipValue(1.0))
    assert found.isnan().tolist() == [True, False, False, False]
    assert found[1:].tolist() == [1.0, -1.0, 0.5]


def test_shapes_of_any_kind_and_parameters_without_gradient():
    assert clipped(torch.tensor(-5.0), ClipValue(1.0)).item() == -1.0
    assert clipped(torch.zeros(0, 3), ClipValue(1.0)).shape == (0, 3)
    unused = nn.Parameter(torch.ones(2))
    ClipValue().before_step([unused], Closure(lambda: unused.sum(), [unused]))
    assert unused.grad is None
    g = torch.ones(2)
    clip_coordinates(g, torch.tensor(0.5, dtype=torch.float64))
    assert g.tolist() == [0.5, 0.5]


def test_the_largest_entry_before_clipping_is_at_hand():
    transform = ClipValue(1.0)
    assert transform.logged() == {}
    clipped(torch.tensor([3.0, -40.0]), transform)
    assert transform.logged() == {"largest_gradient": 40.0}


def test_two_steps_are_those_of_a_loop_by_hand():
    def problem():
        torch.manual_seed(0)
        return nn.Linear(4, 3)

    mine, hand = problem(), problem()
    optimizer = TransformedOptimizer(torch.optim.SGD(mine.parameters(), lr=0.1, momentum=0.9), [ClipValue(0.05)])
    by_hand = torch.optim.SGD(hand.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(6, 4)
    for _ in range(3):
        optimizer.step(Closure(lambda: mine(x).square().mean(), list(mine.parameters())))
        by_hand.zero_grad()
        hand(x).square().mean().backward()
        for p in hand.parameters():
            assert p.grad is not None
            p.grad = p.grad.clamp(-0.05, 0.05)
        by_hand.step()
    assert all(torch.equal(p, q) for p, q in zip(mine.parameters(), hand.parameters(), strict=True))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), "1"])
def test_options_out_of_range(value):
    with pytest.raises(ConfigurationError, match="max_value"):
        ClipValue(max_value=value)


def test_complex_parameters_and_sparse_gradients_are_refused_by_name():
    w = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ConfigurationError, match="clip_value does not take complex"):
        ClipValue().before_step([w], Closure(lambda: w.abs().sum(), [w]))
    table = nn.Embedding(4, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigurationError, match="clip_value does not take sparse"):
        ClipValue().before_step([table.weight], Closure(lambda: table.weight.sum(), [table.weight]))
