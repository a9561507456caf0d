"""The schedules: their values, their horizons, and what a resumed run finds."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from lightrail.errors import ConfigurationError
from lightrail.traits import traits_of
from lightrail_optimizers import Muon, SophiaH
from lightrail_schedules import constant, cosine, linear_decay, onecycle, warmup_stable_decay

SCHEDULES = [constant, cosine, linear_decay, onecycle, warmup_stable_decay]


def make(lr=1.0, **options):
    return torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=lr, **options)


def rates(schedule_fn, total, optimizer=None, group=0, **options):
    optimizer = optimizer or make()
    schedule = schedule_fn(optimizer, total, **options)
    found = []
    for _ in range(total):
        found.append(float(optimizer.param_groups[group]["lr"]))
        optimizer.step()
        schedule.step()
    return found


def test_linear_decay_is_exact():
    assert rates(linear_decay, 5, make(lr=2.0)) == [2.0 * (1 - t / 5) for t in range(5)]


def test_constant_is_constant():
    assert rates(constant, 4) == [1.0] * 4


def test_cosine_values_and_torch():
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * t / 8)) / 2 for t in range(8)]
    assert rates(cosine, 8, final=0.1) == pytest.approx(expected, abs=1e-15)
    optimizer = make()
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8, eta_min=0.1)
    for value in expected:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(value, abs=1e-12)
        optimizer.step()
        theirs.step()


def test_warmup_stable_decay_values():
    linear = rates(warmup_stable_decay, 8, warmup_steps=1, decay_steps=4, final=0.2)
    assert linear == pytest.approx([0.5, 1, 1, 1, 1, 0.8, 0.6, 0.4], abs=1e-15)
    root = rates(warmup_stable_decay, 8, decay_steps=0.5, shape="sqrt")
    assert root == pytest.approx([1, 1, 1, 1, 1, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)], abs=1e-15)


def test_onecycle_is_torchs():
    total, up = 20, 5
    mine_optimizer, their_optimizer = make(lr=0.3, momentum=0.9), make(lr=0.3, momentum=0.9)
    mine = onecycle(mine_optimizer, total, warmup_steps=up, cycle_momentum=True)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        their_optimizer, max_lr=0.3, total_steps=total, pct_start=(up + 1) / total
    )
    for t in range(total):
        for key in ("lr", "momentum"):
            assert mine_optimizer.param_groups[0][key] == pytest.approx(their_optimizer.param_groups[0][key], abs=1e-12)
        mine_optimizer.step()
        their_optimizer.step()
        mine.step()
        if t < total - 1:
            theirs.step()


@pytest.mark.parametrize("schedule_fn", SCHEDULES)
def test_warm_up_is_linear_from_above_zero_or_a_cycle(schedule_fn):
    found = rates(schedule_fn, 20, warmup_steps=4)
    assert found == rates(schedule_fn, 20, warmup_steps=0.2)
    assert found[4] == 1.0
    assert found[:5] == sorted(set(found[:5]))
    assert found[0] > 0
    if schedule_fn is not onecycle:
        assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], abs=1e-15)


@pytest.mark.parametrize("schedule_fn", SCHEDULES)
@pytest.mark.parametrize("total", [0, -1, float("inf"), 2.5])
def test_a_run_without_length_is_refused(schedule_fn, total):
    with pytest.raises(ConfigurationError) as error:
        schedule_fn(make(), total)
    assert "max_steps" in error.value.remedy


@pytest.mark.parametrize("schedule_fn", SCHEDULES)
@pytest.mark.parametrize("warmup", [11, -1, -0.1, 1.5])
def test_a_warm_up_that_does_not_fit_is_refused(schedule_fn, warmup):
    with pytest.raises(ConfigurationError, match="warmup_steps"):
        schedule_fn(make(), 10, warmup_steps=warmup)


def test_warm_up_and_decay_must_fit_together():
    with pytest.raises(ConfigurationError, match="together"):
        warmup_stable_decay(make(), 10, warmup_steps=6, decay_steps=6)


@pytest.mark.parametrize("schedule_fn", SCHEDULES)
@pytest.mark.parametrize("total", [1, 2, 3])
def test_short_runs_and_steps_beyond_the_end_are_finite(schedule_fn, total):
    optimizer = make()
    schedule = schedule_fn(optimizer, total)
    for _ in range(total + 3):
        assert 0 <= optimizer.param_groups[0]["lr"] <= 1
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("schedule_fn", SCHEDULES)
def test_groups_and_tensor_rates(schedule_fn):
    def two_groups(wrap):
        groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": wrap(lr)} for lr in (1.0, 0.25)]
        return torch.optim.SGD(groups, lr=1.0)

    plain = rates(schedule_fn, 10, two_groups(float))
    assert rates(schedule_fn, 10, two_groups(float), group=1) == [rate / 4 for rate in plain]
    tensors = two_groups(lambda lr: torch.tensor(lr, dtype=torch.float64))
    rate = tensors.param_groups[0]["lr"]
    assert rates(schedule_fn, 10, tensors) == plain
    assert tensors.param_groups[0]["lr"] is rate  # the very tensor, as a compiled step needs


@pytest.mark.parametrize("schedule_fn", SCHEDULES)
def test_resume_is_exact_and_state_is_plain(schedule_fn, tmp_path):
    expected = rates(schedule_fn, 12, warmup_steps=3)
    optimizer = make()
    schedule = schedule_fn(optimizer, 12, warmup_steps=3)
    for _ in range(7):
        optimizer.step()
        schedule.step()
    torch.save([optimizer.state_dict(), schedule.state_dict()], tmp_path / "state")
    resumed = make()
    again = schedule_fn(resumed, 12, warmup_steps=3)
    saved = torch.load(tmp_path / "state", weights_only=True)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    found = []
    for _ in range(7, 12):
        found.append(resumed.param_groups[0]["lr"])
        assert again.get_last_lr() == [resumed.param_groups[0]["lr"]]
        resumed.step()
        again.step()
    assert found == expected[7:]


@pytest.mark.parametrize("schedule_fn", [cosine, linear_decay, onecycle, warmup_stable_decay])
def test_resume_with_another_length_takes_its_shape_at_once(schedule_fn):
    optimizer = make()
    schedule = schedule_fn(optimizer, 10)
    for _ in range(9):
        optimizer.step()
        schedule.step()
    resumed = make()
    again = schedule_fn(resumed, 20)
    resumed.load_state_dict(optimizer.state_dict())
    again.load_state_dict(schedule.state_dict())
    assert resumed.param_groups[0]["lr"] == rates(schedule_fn, 20)[9] != optimizer.param_groups[0]["lr"]


def test_momentum_is_cycled_in_betas_and_refused_where_there_is_none():
    adam = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], betas=(0.9, 0.99))
    schedule = onecycle(adam, 10, warmup_steps=1, cycle_momentum=True)
    assert adam.param_groups[0]["betas"] == (0.95, 0.99)
    adam.step()
    schedule.step()
    assert adam.param_groups[0]["betas"] == pytest.approx((0.85, 0.99))
    with pytest.raises(ConfigurationError, match="momentum"):
        onecycle(torch.optim.Adagrad([nn.Parameter(torch.zeros(1))]), 10, cycle_momentum=True)


def test_a_schedule_scales_both_parts_of_a_combined_optimizer():
    model = nn.ModuleDict({"hidden": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    optimizer = Muon(model.named_parameters(), lr=0.2, adamw_lr=0.1)
    schedule = linear_decay(optimizer, 4)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.15, 0.075])


def test_a_schedule_drives_sophia_with_a_tensor_rate():
    w = nn.Parameter(torch.ones(3))
    optimizer = SophiaH([w], lr=torch.tensor(0.5), weight_decay=0.0)  # type: ignore[arg-type]
    optimizer.param_groups[0]["step"] = 1  # no estimate due
    schedule = linear_decay(optimizer, 2)
    moved = []
    for _ in range(2):
        before = w.detach().clone()
        w.grad = torch.ones(3)
        optimizer.step()
        schedule.step()
        moved.append((before - w.detach()).tolist())
    assert moved == [[0.5] * 3, [0.25] * 3]


@pytest.mark.parametrize("schedule_fn", SCHEDULES)
def test_the_card(schedule_fn):
    card = traits_of(schedule_fn)
    assert card.rule
    schedule_fn(make(), 10, **card.example)
