"""The trapezoid: straight sides around a plateau."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightrail.errors import ConfigurationError
from lightrail_schedules import trapezoid, warmup_stable_decay


def rates(schedule_fn, total, count=None, **options):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0)
    schedule = schedule_fn(optimizer, total, **options)
    found = []
    for _ in range(count or total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_values():
    found = rates(trapezoid, 10, warmup_steps=2, decay_steps=4, final=0.2)
    assert found == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4], abs=1e-15)


def test_its_formula():
    total, up, down = 200, 20, 50
    expected = [min(1, (t + 1) / (up + 1), (total - t) / down) for t in range(total)]
    assert rates(trapezoid, total, warmup_steps=up, decay_steps=down) == pytest.approx(expected, abs=1e-14)


def test_it_is_warmup_stable_decay_up_to_defaults():
    options = {"warmup_steps": 0.1, "decay_steps": 0.3, "final": 0.1}
    assert rates(trapezoid, 50, **options) == rates(warmup_stable_decay, 50, **options)
    found = rates(trapezoid, 1000)
    assert found[19] < found[20] == 1 == found[800] > found[801]


def test_beyond_the_end_it_stays():
    assert rates(trapezoid, 10, count=14, final=0.1)[10:] == pytest.approx([0.1] * 4)


def test_both_sides_must_fit_into_the_run():
    with pytest.raises(ConfigurationError, match="together"):
        rates(trapezoid, 10, warmup_steps=6, decay_steps=5)
    with pytest.raises(ConfigurationError, match="decay_steps"):
        rates(trapezoid, 10, decay_steps=11)
