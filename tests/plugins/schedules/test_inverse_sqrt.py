"""One over the square root of the step: the formula of the Transformer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightrail.errors import ConfigurationError
from lightrail_schedules import inverse_sqrt


def rates(total, count=None, lr=1.0, **options):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=lr)
    schedule = inverse_sqrt(optimizer, total, **options)
    found = []
    for _ in range(count or total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_it_is_the_formula_of_the_paper():
    width, warmup = 512, 40
    expected = [width**-0.5 * min(n**-0.5, n * warmup**-1.5) for n in range(1, 201)]
    found = rates(200, warmup_steps=warmup - 1, lr=(width * warmup) ** -0.5)
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_peak_is_the_learning_rate_and_half_is_left_after_four_times_as_many_steps():
    found = rates(100, warmup_steps=9)
    assert found[9] == max(found) == 1
    assert found[39] == pytest.approx(0.5, abs=1e-15)


def test_the_default_warm_up_is_a_part_of_the_run():
    assert rates(1000).index(1.0) == 40
    assert rates(100).index(1.0) == 4


def test_a_warm_up_in_steps_makes_it_independent_of_the_length():
    assert rates(50, count=120, warmup_steps=5) == rates(120, warmup_steps=5)


def test_without_warm_up():
    assert rates(4, warmup_steps=0) == pytest.approx([1, 2**-0.5, 3**-0.5, 0.5], abs=1e-15)


def test_a_warm_up_that_does_not_fit_is_refused():
    with pytest.raises(ConfigurationError, match="warmup_steps"):
        rates(10, warmup_steps=11)
