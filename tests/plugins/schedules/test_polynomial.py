"""Polynomial decay: its values, torch's schedule, and the straight line it contains."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import PolynomialLR

from lightrail.errors import ConfigurationError
from lightrail_schedules import linear_decay, polynomial


def make(lr=1.0):
    return torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=lr)


def rates(schedule_fn, total, count=None, **options):
    optimizer = make()
    schedule = schedule_fn(optimizer, total, **options)
    found = []
    for _ in range(count or total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_values():
    assert rates(polynomial, 4, power=2) == pytest.approx([1, 9 / 16, 1 / 4, 1 / 16], abs=1e-15)
    assert rates(polynomial, 4, power=2, final=0.5)[2] == pytest.approx(0.5 + 0.5 / 4, abs=1e-15)
    assert rates(polynomial, 10, power=0.5, count=15)[10:] == [0] * 5


@pytest.mark.parametrize("power", [0.5, 0.9, 2.0, 3.0])
def test_it_is_torchs(power):
    optimizer = make()
    theirs = PolynomialLR(optimizer, total_iters=25, power=power)
    for rate in rates(polynomial, 25, power=power):
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_power_one_is_linear_decay():
    assert rates(polynomial, 50, power=1, warmup_steps=0.1) == rates(linear_decay, 50, warmup_steps=0.1)
    options = {"warmup_steps": 0.1, "final": 0.05}
    assert rates(polynomial, 50, power=1.0, **options) == pytest.approx(rates(linear_decay, 50, **options), abs=1e-15)


def test_the_warm_up_is_linear_and_the_peak_follows_it():
    assert rates(polynomial, 20, warmup_steps=3, power=2)[:4] == [0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize("options", [{"power": 0}, {"power": -1}, {"final": 2}, {"warmup_steps": 21}])
def test_what_is_out_of_range_is_refused_by_name(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        polynomial(make(), 20, **options)
