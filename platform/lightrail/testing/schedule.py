"""Conformance of schedules: callables ``(optimizer, total_steps, **options)`` that return a torch LRScheduler."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrail.testing.building import accepts, check_is_documented, missing_options, refuses_unknown_options
from lightrail.testing.runs import saved_and_loaded
from lightrail.testing.suite import Check, NotApplicable, Suite, known_exceptions, name_of, require

__all__ = ["ScheduleSuite"]

Options = Mapping[str, Any]
BASE = 0.1


def _optimizer(*lrs: Any) -> Optimizer:
    return SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs or (BASE,)], lr=BASE, momentum=0.9)


def _rate(optimizer: Optimizer, group: int = 0) -> float:
    return float(optimizer.param_groups[group]["lr"])


def _rates(optimizer: Optimizer, scheduler: LRScheduler, count: int) -> list[float]:
    """The lr under which each of the next ``count`` optimizer steps is made."""
    rates = []
    for _ in range(count):
        rates.append(_rate(optimizer))
        optimizer.step()
        scheduler.step()
    return rates


def _curve(plugin: Any, options: Options, total_steps: int, count: int | None = None) -> list[float]:
    optimizer = _optimizer()
    return _rates(optimizer, plugin(optimizer, total_steps, **options), count or total_steps)


def _without_warmup(plugin: Any, options: Options) -> dict[str, Any]:
    return {**options, "warmup_steps": 0} if accepts(plugin, "warmup_steps") else dict(options)


def check_builds_from_options(plugin: Any, options: Options) -> None:
    """``plugin(optimizer, total_steps, **options)`` is a torch LRScheduler of that optimizer."""
    missing = missing_options(plugin, options, given=2)
    require(not missing, f"options without a default are not in traits.example: {missing}")
    optimizer = _optimizer()
    scheduler = plugin(optimizer, 20, **options)
    require(isinstance(scheduler, LRScheduler), f"it returns no torch LRScheduler but {type(scheduler).__name__}")
    require(scheduler.optimizer is optimizer, "the scheduler that it returns belongs to another optimizer")


def check_rejects_unknown_options(plugin: Any, options: Options) -> None:
    """An option that the signature lacks is an error."""
    refuses_unknown_options(lambda **given: plugin(_optimizer(), 20, **given), options)


def check_starts_above_zero(plugin: Any, options: Options) -> None:
    """The first step has an lr above zero, warm-up or not: otherwise it is spent on nothing."""
    first = _curve(plugin, options, 20)[0]
    require(first > 0, f"the first lr is {first:g}")
    if accepts(plugin, "warmup_steps"):
        first = _curve(plugin, {**options, "warmup_steps": 5}, 20)[0]
        require(first > 0, f"the first lr of a warm-up is {first:g}")


def check_is_finite_and_non_negative(plugin: Any, options: Options) -> None:
    """Every lr is finite and at least zero."""
    for step, rate in enumerate(_curve(plugin, options, 40)):
        require(math.isfinite(rate) and rate >= 0, f"the lr of step {step} is {rate}")


def check_honours_total_steps(plugin: Any, options: Options) -> None:
    """A horizon twice as long stretches the curve: other values on the way, about the same at the end."""
    options = _without_warmup(plugin, options)
    short, long = _curve(plugin, options, 50), _curve(plugin, options, 100)
    if max(long) - min(long) <= 1e-9 * BASE:
        raise NotApplicable("its lr is constant after warm-up")
    require(short != long[:50], "it goes the same way whatever total_steps is")
    top = max(long)
    for part in (0.25, 0.5, 0.75, 1.0):
        at_short, at_long = short[round(50 * part) - 1], long[round(100 * part) - 1]
        require(
            abs(at_short - at_long) <= 0.12 * top,
            f"after {part:.0%} of 50 steps lr is {at_short:.3g}, after {part:.0%} of 100 it is {at_long:.3g}",
        )


def check_keeps_the_ratio_of_groups(plugin: Any, options: Options) -> None:
    """Two groups with lr ten to one stay ten to one."""
    optimizer = _optimizer(BASE, BASE / 10)
    scheduler = plugin(optimizer, 20, **options)
    for step in range(20):
        first, second = _rate(optimizer, 0), _rate(optimizer, 1)
        require(
            abs(first - 10 * second) <= 1e-6 * BASE, f"at step {step} groups of ten to one are {first:g}, {second:g}"
        )
        optimizer.step()
        scheduler.step()


def check_takes_a_tensor_lr(plugin: Any, options: Options) -> None:
    """An lr that is a 0-d tensor stays one and takes the values of a number."""
    optimizer = _optimizer(torch.tensor(BASE, dtype=torch.float64))
    found = _rates(optimizer, plugin(optimizer, 20, **options), 20)
    require(isinstance(optimizer.param_groups[0]["lr"], torch.Tensor), "it replaced a tensor lr by a number")
    for step, (a, b) in enumerate(zip(found, _curve(plugin, options, 20), strict=True)):
        require(abs(a - b) <= 1e-9, f"at step {step} a tensor lr is {a:g} where a number is {b:g}")


def check_resumes_exactly(plugin: Any, options: Options) -> None:
    """Saved in mid-run and loaded, every later lr is the same number."""
    optimizer = _optimizer()
    scheduler = plugin(optimizer, 20, **options)
    _rates(optimizer, scheduler, 8)
    checkpoint = saved_and_loaded({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()})
    expected = _rates(optimizer, scheduler, 12)

    optimizer = _optimizer()
    scheduler = plugin(optimizer, 20, **options)
    scheduler.load_state_dict(checkpoint["scheduler"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    found = _rates(optimizer, scheduler, 12)
    require(found == expected, "the lr of a resumed run differs from that of the uninterrupted one")


def check_goes_beyond_its_horizon(plugin: Any, options: Options) -> None:
    """Steps after the last are made, with a finite lr of at least zero and no more than the largest before."""
    curve = _curve(plugin, options, 10, count=25)
    for step, rate in enumerate(curve[10:], start=10):
        require(math.isfinite(rate) and rate >= 0, f"beyond total_steps=10 the lr of step {step} is {rate}")
        require(rate <= max(curve[:10]) * (1 + 1e-6), f"beyond total_steps=10 the lr rises to {rate:g}")


def check_takes_a_single_step(plugin: Any, options: Options) -> None:
    """A run of one step is a run."""
    (rate,) = _curve(plugin, _without_warmup(plugin, options), 1)
    require(math.isfinite(rate) and rate >= 0, f"with total_steps=1 the lr is {rate}")


def check_warms_up(plugin: Any, options: Options) -> None:
    """``warmup_steps`` steps rise to the top, where the signature has it."""
    if not accepts(plugin, "warmup_steps"):
        raise NotApplicable("the signature has no 'warmup_steps'")
    curve = _curve(plugin, {**options, "warmup_steps": 10}, 50)
    rise = curve[:11]
    require(rise == sorted(rise), f"lr does not rise throughout ten steps of warm-up: {rise}")
    require(rise[0] <= 0.5 * max(curve), f"warm-up starts at {rise[0]:g}, the top is {max(curve):g}")
    require(
        max(rise) >= 0.98 * max(curve), f"after ten steps of warm-up lr is {max(rise):g}, the top is {max(curve):g}"
    )


CHECKS: tuple[Check, ...] = (
    check_is_documented,
    check_builds_from_options,
    check_rejects_unknown_options,
    check_starts_above_zero,
    check_is_finite_and_non_negative,
    check_honours_total_steps,
    check_keeps_the_ratio_of_groups,
    check_takes_a_tensor_lr,
    check_resumes_exactly,
    check_goes_beyond_its_horizon,
    check_takes_a_single_step,
    check_warms_up,
)


class ScheduleSuite(Suite):
    """Every check of a schedule."""

    kind: ClassVar[str] = "schedule"
    checks: ClassVar[tuple[Check, ...]] = (*CHECKS, known_exceptions(frozenset(map(name_of, CHECKS))))
