"""Averages of iterates, and the way to them and back."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightrail.errors import UserError
from lightrail_optimizers import DoG
from lightrail_optimizers.iterate_average import (
    IterateAverage,
    average_,
    exponential_weight,
    polynomial_weight,
)


class Averaged(IterateAverage):
    """Gradient descent, evaluated at the mean of its iterates."""

    state_names = ("average",)

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "maximize": False, "foreach": True, "compile": False})

    @staticmethod
    def rule(x: list[Tensor], g: list[Tensor], average: list[Tensor], *, lr: Any, c: float) -> None:  # type: ignore[override]
        torch._foreach_add_(x, g, alpha=-lr)
        average_(average, x, c)

    def scalars(self, group, t):
        return {"lr": group["lr"], "c": polynomial_weight(t, 0.0)}


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def params():
    torch.manual_seed(1)
    return [nn.Parameter(torch.randn(shape)) for shape in [(3, 2), (), (4,)]]


def descend(optimizer, params, steps):
    for t in range(steps):
        for i, p in enumerate(params):
            wave = torch.sin(torch.arange(p.numel()) + float(t + i)).reshape(p.shape)
            p.grad = wave.to(p.dtype) + p.detach()
        optimizer.step()
    return [p.detach().clone() for p in params]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_the_first_iterate_weighs_everything():
    assert polynomial_weight(1, 8.0) == exponential_weight(1, 0.9) == 1.0


@pytest.mark.parametrize("gamma", [0.0, 1.0, 8.0])
def test_the_polynomial_average_weighs_an_iterate_by_a_power_of_its_number(gamma):
    x, average = np.random.default_rng(0).normal(size=12), 0.0
    for t, value in enumerate(x, 1):
        average += polynomial_weight(t, gamma) * (value - average)
    # The product of (1 - c) over later iterates: i (i+1) … (i+gamma-1), up to a constant, for a whole gamma.
    weights = np.array([np.prod(np.arange(i, i + gamma)) if gamma else 1.0 for i in range(1, 13)])
    assert average == pytest.approx(weights @ x / weights.sum(), abs=1e-12)


def test_the_exponential_average_is_unbiased_from_the_start():
    x, average = np.random.default_rng(0).normal(size=12), 0.0
    for t, value in enumerate(x, 1):
        average += exponential_weight(t, 0.9) * (value - average)
        weights = 0.9 ** np.arange(t - 1, -1, -1)
        assert average == pytest.approx(weights @ x[:t] / weights.sum(), abs=1e-12)


def test_a_tensor_weight_is_the_number():
    a, x = [doubles(1.0, 5.0)], [doubles(3.0, -1.0)]
    average_(a, x, torch.tensor(0.25, dtype=torch.float64))
    assert a[0].tolist() == [1.5, 3.5]
    average_(a, x, 1.0)
    assert a[0].tolist() == x[0].tolist()


def test_evaluation_is_at_the_mean_of_the_iterates():
    w = nn.Parameter(doubles(1.0))
    optimizer, iterates = Averaged([w]), []
    for g in (2.0, -1.0, 4.0):
        w.grad = doubles(g)
        optimizer.step()
        iterates.append(w.item())
    optimizer.eval()
    assert w.item() == pytest.approx(np.mean(iterates), abs=1e-12)
    optimizer.train()
    assert w.item() == iterates[-1]


def test_going_there_twice_is_going_there_once():
    some = params()
    optimizer = Averaged(some)
    x = descend(optimizer, some, 5)
    optimizer.train()
    assert same(some, x)
    optimizer.eval()
    average = [p.detach().clone() for p in some]
    optimizer.eval()
    assert same(some, average)
    assert not any(torch.equal(a, b) for a, b in zip(average, x, strict=True))
    optimizer.train()
    optimizer.train()
    assert same(some, x)


def test_evaluating_on_the_way_changes_nothing():
    some, others = params(), params()
    optimizer, other = Averaged(some), Averaged(others)
    for t in range(4):
        descend(optimizer, some, t)
        descend(other, others, t)
        other.eval()
        other.train()
    assert same(some, others)


@pytest.mark.parametrize("evaluating", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_of_either_mode_resumes_exactly(evaluating, dtype):
    def fresh():
        return [nn.Parameter(p.detach().to(dtype)) for p in params()]

    some = fresh()
    optimizer = Averaged(some)
    descend(optimizer, some, 5)
    if evaluating:
        optimizer.eval()
    checkpoint = loaded({"optimizer": optimizer.state_dict(), "model": [p.detach() for p in some]})
    optimizer.train()
    expected = descend(optimizer, some, 5)

    resumed = fresh()
    with torch.no_grad():
        for p, value in zip(resumed, checkpoint["model"], strict=True):
            p.copy_(value)
    optimizer = Averaged(resumed)
    optimizer.load_state_dict(checkpoint["optimizer"])
    optimizer.train()
    assert same(descend(optimizer, resumed, 5), expected)


@pytest.mark.parametrize("make", [Averaged, DoG])
def test_a_step_at_the_evaluation_point_is_refused(make):
    some = params()
    optimizer = make(some)
    descend(optimizer, some, 1)
    optimizer.eval()
    before = [p.detach().clone() for p in some]
    with pytest.raises(UserError, match="where it is evaluated") as caught:
        optimizer.step()
    assert "optimizer.train()" in caught.value.remedy
    assert same(some, before)
    optimizer.train()
    optimizer.step()


def test_what_has_not_moved_stays_and_gets_no_state():
    w, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Averaged([w, unused])
    optimizer.eval()
    optimizer.train()
    assert not optimizer.state
    w.grad = torch.ones(2)
    optimizer.step()
    optimizer.eval()
    assert unused.tolist() == [1.0, 1.0]
    assert unused not in optimizer.state


def test_a_group_that_joins_at_the_evaluation_point_is_trained_with_the_others():
    w, late = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Averaged([w])
    descend(optimizer, [w], 2)
    optimizer.eval()
    optimizer.add_param_group({"params": [late]})
    optimizer.train()
    descend(optimizer, [w, late], 2)
    assert late.tolist() != [1.0, 1.0]


def test_a_copy_goes_on_as_the_original():
    some = params()
    optimizer = Averaged(some)
    descend(optimizer, some, 3)
    optimizer.eval()
    others, other = copy.deepcopy((some, optimizer))
    for each in (optimizer, other):
        each.train()
    assert same(descend(optimizer, some, 3), descend(other, others, 3))
