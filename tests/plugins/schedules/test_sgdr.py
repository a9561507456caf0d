"""SGDR: the paper's values, torch's schedule, and cycles that fill the run."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from lightrail.errors import ConfigurationError
from lightrail_schedules import cosine, sgdr


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


def test_the_values_of_the_sheet():
    expected = [1, 0.5, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 1]
    assert rates(sgdr, 7, first_cycle=2, multiplier=2) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("first", "multiplier"), [(2, 2), (5, 1), (3, 3), (40, 1)])
def test_it_is_torchs(first, multiplier):
    optimizer = make(0.3)
    theirs = CosineAnnealingWarmRestarts(optimizer, T_0=first, T_mult=multiplier, eta_min=0.03)
    mine = rates(sgdr, 40, first_cycle=first, multiplier=multiplier, final=0.1)
    for rate in mine:
        assert 0.3 * rate == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_one_cycle_is_half_a_cosine_bit_for_bit():
    assert rates(sgdr, 30, cycles=1, warmup_steps=4, final=0.2) == rates(cosine, 30, warmup_steps=4, final=0.2)


def test_by_default_three_cycles_fill_the_run_whatever_its_length():
    for total in (70, 700):
        found = rates(sgdr, total)
        assert [t for t in range(total) if found[t] == 1] == [0, total // 7, 3 * total // 7]
        assert found[-1] < 0.02
    quick = rates(sgdr, 100, cycles=4, multiplier=1)
    assert quick == rates(sgdr, 25, cycles=1) * 4
    assert rates(sgdr, 100, first_cycle=0.25, multiplier=1) == quick


def test_cycles_follow_the_warm_up():
    found = rates(sgdr, 20, warmup_steps=4, cycles=2, multiplier=1)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert [t for t in range(20) if found[t] == 1] == [4, 12]


def test_beyond_the_last_cycle_it_does_not_restart():
    assert rates(sgdr, 14, count=40, final=0.1)[14:] == pytest.approx([0.1] * 26)
    # A cycle that the end of the run cuts off goes on to its own end.
    cut = rates(sgdr, 10, count=30, first_cycle=6, multiplier=2)
    assert cut[9:18] == sorted(cut[9:18], reverse=True)
    assert cut[18:] == pytest.approx([0] * 12, abs=1e-12)


@pytest.mark.parametrize("total", [1, 2, 3, 5])
def test_a_run_of_fewer_steps_than_cycles(total):
    found = rates(sgdr, total, count=total + 3, cycles=300, multiplier=50)
    assert all(0 <= rate <= 1 for rate in found)
    assert found[0] == 1
    assert rates(sgdr, total, warmup_steps=total)[0] > 0


@pytest.mark.parametrize(
    "options",
    [
        {"first_cycle": 0},
        {"first_cycle": 0.001},
        {"first_cycle": 21},
        {"first_cycle": 1.5},
        {"multiplier": 0.5},
        {"multiplier": float("inf")},
        {"cycles": 0},
        {"cycles": 1.5},
        {"final": 1.1},
        {"final": -0.1},
    ],
)
def test_what_is_out_of_range_is_refused_by_name(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        sgdr(make(), 20, **options)
