"""Scaling with the batch size: the two rules, the cap, the shapes, and the probe of the first step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lightrail import Closure, TransformedOptimizer
from lightrail.errors import ConfigurationError
from lightrail.traits import traits_of
from lightrail_optimizers import Lion
from lightrail_schedules import batch_scaling as batch_scaling_schedule
from lightrail_schedules import constant, cosine, linear_decay
from lightrail_schedules.batch_scaling import batch_factor

# Its schedulers have more methods than torch's class declares.
batch_scaling: Any = batch_scaling_schedule


def make(lr=0.1, kind: Any = torch.optim.SGD, **options):
    return kind([nn.Parameter(torch.zeros(2))], lr=lr, **options)


def rates(optimizer, schedule, count):
    found = []
    for _ in range(count):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return found


def curve(schedule_fn, total=20, lr=0.1, **options):
    optimizer = make(lr)
    return rates(optimizer, schedule_fn(optimizer, total, **options), total)


def quadratic(curvatures=(8.0, 1.0)):
    w = nn.Parameter(torch.ones(len(curvatures), dtype=torch.float64))
    h = torch.tensor(curvatures, dtype=torch.float64)
    return w, Closure(lambda: (h * w**2).sum() / 2, [w])


def test_the_rules():
    assert batch_factor(512, 128, p=1) == 4
    assert batch_factor(512, 128, p=0.5) == 2
    assert batch_factor(32, 128, p=0.5) == 0.5
    assert batch_factor(512, 128, p=1, cap=3) == 3


@pytest.mark.parametrize(
    ("optimizer", "factor"),
    [
        (make(), 4.0),
        (make(momentum=0.9, nesterov=True), 4.0),
        (TransformedOptimizer(make()), 4.0),
        (make(kind=torch.optim.AdamW), 2.0),
        (make(kind=torch.optim.Adagrad), 2.0),
        (make(kind=Lion), 2.0),
    ],
)
def test_the_rule_is_what_the_optimizer_asks_for(optimizer, factor):
    schedule = batch_scaling(optimizer, 10, base_batch_size=64, batch_size=256)
    assert schedule.get_last_lr() == pytest.approx([0.1 * factor], rel=1e-12)
    assert f"{factor:g}" in schedule.notes[0]


def test_the_rule_can_be_set():
    assert curve(batch_scaling, base_batch_size=64, batch_size=256, rule="sqrt") == pytest.approx([0.2] * 20)
    optimizer = make(kind=torch.optim.AdamW)
    batch_scaling(optimizer, 10, base_batch_size=64, batch_size=256, rule="linear", cap=3)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("shape", "same"), [("constant", constant), ("cosine", cosine), ("linear_decay", linear_decay)]
)
def test_at_the_base_batch_size_it_is_its_shape_bit_for_bit(shape, same):
    options: dict[str, Any] = {"warmup_steps": 0.2} | ({} if shape == "constant" else {"final": 0.1})
    plain = curve(same, **options)
    assert curve(batch_scaling, base_batch_size=32, batch_size=32, shape=shape, **options) == plain
    doubled = curve(batch_scaling, base_batch_size=32, batch_size=64, shape=shape, **options)
    assert doubled == [2 * rate for rate in plain]


def test_without_a_known_batch_size_nothing_is_scaled_and_it_says_so():
    schedule = batch_scaling(make(), 10, base_batch_size=32)
    assert schedule.get_last_lr() == [0.1]
    assert "not known" in schedule.notes[0]


def test_groups_keep_their_ratio():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.25)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    batch_scaling(optimizer, 10, base_batch_size=32, batch_size=16)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.125]


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_the_probe_holds_the_peak_of_sgd_at_the_bound_from_the_first_step_on(momentum):
    w, closure = quadratic()
    optimizer = torch.optim.SGD([w], lr=1.0, momentum=momentum)
    schedule = batch_scaling(optimizer, 10, base_batch_size=32, shape="cosine", probe=True, batch_size=128)
    assert optimizer.param_groups[0]["lr"] == 4.0
    closure()
    with torch.no_grad():
        schedule.observe([w], closure)
    bound = 2 * (1 + momentum) / 8
    assert optimizer.param_groups[0]["lr"] == pytest.approx(bound, rel=1e-9)
    assert schedule.logged() == pytest.approx({"sharpness": 8.0, "max_lr": bound})
    reference = curve(cosine, 10, lr=bound)
    found = rates(optimizer, schedule, 10)
    assert found == pytest.approx(reference, rel=1e-9, abs=1e-12)


def test_the_probe_leaves_a_rate_below_the_bound_and_probes_once():
    w, closure = quadratic()
    schedule = batch_scaling(torch.optim.SGD([w], lr=0.1), 10, base_batch_size=1, probe=True, batch_size=2)
    schedule.observe([w], closure)
    asked = closure.evaluations
    assert schedule.get_last_lr() == [0.2]
    schedule.observe([w], closure)
    assert closure.evaluations == asked > 0


def test_the_bound_is_that_of_the_group_that_reaches_it_first():
    a, b = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
    groups = [{"params": [a], "lr": 0.1, "momentum": 0.9}, {"params": [b], "lr": 0.2}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    schedule = batch_scaling(optimizer, 10, base_batch_size=1, probe=True, batch_size=100)
    schedule.observe([a, b], Closure(lambda: 2 * (a**2 + b**2), [a, b]))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.25, 0.5], rel=1e-6)


def test_for_adam_the_probe_reports_only():
    w, closure = quadratic()
    schedule = batch_scaling(torch.optim.AdamW([w], lr=1.0), 10, base_batch_size=1, probe=True, batch_size=16)
    schedule.observe([w], closure)
    assert schedule.get_last_lr() == [4.0]
    assert schedule.logged() == pytest.approx({"sharpness": 8.0, "max_lr": 0.25})
    assert "reports only" in schedule.notes[1]


def test_a_loss_that_bounds_nothing_logs_only_numbers():
    w = nn.Parameter(torch.ones(2))
    schedule = batch_scaling(torch.optim.SGD([w], lr=1.0), 10, base_batch_size=1, probe=True, batch_size=2)
    assert schedule.logged() == {}
    schedule.observe([w], Closure(lambda: w.sum(), [w]))
    assert schedule.get_last_lr() == [2.0]
    assert schedule.logged() == {"sharpness": 0.0}
    bad = batch_scaling(torch.optim.SGD([w], lr=1.0), 10, base_batch_size=1, probe=True, batch_size=2)
    bad.observe([w], Closure(lambda: (w * math.inf).square().sum(), [w]))
    assert bad.get_last_lr() == [2.0]
    assert bad.logged() == {}


def test_a_resumed_run_keeps_what_was_probed(tmp_path):
    w, closure = quadratic()
    optimizer = torch.optim.SGD([w], lr=1.0)
    options = {"base_batch_size": 1, "shape": "linear_decay", "probe": True, "batch_size": 4}
    schedule = batch_scaling(optimizer, 10, **options)
    schedule.observe([w], closure)
    rates(optimizer, schedule, 4)
    torch.save([optimizer.state_dict(), schedule.state_dict()], tmp_path / "state")
    expected = rates(optimizer, schedule, 6)
    other, second = quadratic(curvatures=(100.0, 1.0))
    again = torch.optim.SGD([other], lr=1.0)
    resumed = batch_scaling(again, 10, **options)
    saved = torch.load(tmp_path / "state", weights_only=True)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    resumed.observe([other], second)
    assert second.evaluations == 0
    assert rates(again, resumed, 6) == expected


def test_a_tensor_rate_stays_the_very_tensor():
    w, closure = quadratic()
    rate = torch.tensor(1.0, dtype=torch.float64)
    optimizer = torch.optim.SGD([w], lr=rate)
    schedule = batch_scaling(optimizer, 10, base_batch_size=1, probe=True, batch_size=4)
    schedule.observe([w], closure)
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.25)


def test_it_works_inside_a_step():
    w, closure = quadratic()
    optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=1.0))
    schedule = batch_scaling(optimizer, 10, base_batch_size=1, probe=True, batch_size=4)
    optimizer.observers.append(schedule.observe)
    optimizer.step(closure)
    # The update of the very first step is made at the bound 2/8.
    assert w.tolist() == pytest.approx([1 - 0.25 * 8, 1 - 0.25], rel=1e-9)


def test_its_needs_depend_on_the_probe():
    assert not traits_of(batch_scaling).watches_gradient
    assert not traits_of(batch_scaling, {"base_batch_size": 2}).needs_second_derivatives
    probing = traits_of(batch_scaling, {"base_batch_size": 2, "probe": True})
    assert probing.watches_gradient
    assert probing.needs_second_derivatives


@pytest.mark.parametrize(
    "options",
    [
        {"base_batch_size": 0},
        {"base_batch_size": 1.5},
        {"rule": "cubic"},
        {"shape": "step"},
        {"cap": 0},
        {"final": 2},
        {"warmup_steps": 30},
    ],
)
def test_what_is_out_of_range_is_refused_by_name(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        batch_scaling(make(), 20, **{"base_batch_size": 32, **options})
