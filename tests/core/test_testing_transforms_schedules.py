"""The suites of transforms and schedules can fail: each mistake fails its check, and the right ones pass all."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from lightrail import Closure, Traits, Transform
from lightrail.testing import ScheduleSuite, Suite, TransformSuite, examine
from lightrail.testing.suite import name_of


def failures(suite: type[Suite], plugin: Any) -> set[str]:
    return {name_of(check) for check in suite.checks if examine(check, plugin).state == "failed"}


class Halves(Transform):
    """Halves the gradient, and clips what is left."""

    traits: ClassVar[Traits] = Traits(paper="made up")

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        for p in params:
            if p.grad is not None:
                p.grad.mul_(0.5).clamp_(-0.1, 0.1)


class DoesNothing(Transform):
    """Edits a copy of the gradient."""

    traits: ClassVar[Traits] = Traits(paper="made up")

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        for p in params:
            if p.grad is not None:
                p.grad.clone().mul_(0.5)


class LooksAgain(Halves):
    """Evaluates once more than its traits say."""

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        super().before_step(params, closure)
        closure.gradient()


class WandersOff(Halves):
    """Leaves the parameters a little off."""

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        super().before_step(params, closure)
        for p in params:
            p.add_(1e3).sub_(1e3)


class ForgetsItsCount(Halves):
    """Changes with a count that no checkpoint holds."""

    count = 0

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        self.count += 1
        for p in params:
            if p.grad is not None:
                p.grad.mul_(1 / self.count)


class MovesStatistics(Halves):
    """Evaluates past its closure, with the masks and statistics that this moves."""

    def before_step(self, params: list[Tensor], closure: Any) -> None:
        super().before_step(params, closure)
        closure._loss_fn(*closure._batches[0])


class NeedsGradients(Halves):
    """Has not heard of missing gradients."""

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        for p in params:
            assert p.grad is not None
            p.grad.clamp_(-0.1, 0.1)


class SeesTheLastMicroBatch(Halves):
    """Scales by the loss of the last micro-batch."""

    def before_step(self, params: list[Tensor], closure: Any) -> None:
        with torch.no_grad():
            scale = float(closure._loss_fn(*closure._batches[-1]))
        for p in params:
            if p.grad is not None:
                p.grad.mul_(scale)


@pytest.mark.parametrize(
    ("plugin", "expected"),
    [
        (DoesNothing, {"changes_the_path"}),
        (LooksAgain, {"spends_the_evaluations_it_declares"}),
        (WandersOff, {"returns_to_the_point"}),
        (ForgetsItsCount, {"resumes_exactly"}),
        (MovesStatistics, {"moves_masks_and_statistics_once"}),
        (NeedsGradients, {"takes_any_parameters"}),
        (SeesTheLastMicroBatch, {"is_exact_under_accumulation"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_a_wrong_transform_fails_the_check_of_its_mistake(plugin: Any, expected: set[str]) -> None:
    assert expected <= failures(TransformSuite, plugin)


def test_a_right_transform_passes_everything() -> None:
    assert failures(TransformSuite, Halves) == set()


def straight(optimizer: Optimizer, total_steps: int, warmup_steps: int = 0) -> LambdaLR:
    """Straight down to zero, after a warm-up."""

    def factor(step: int) -> float:
        rise = (step + 1) / (warmup_steps + 1)
        return max(0.0, min(rise, (total_steps - step) / (total_steps - warmup_steps)))

    return LambdaLR(optimizer, factor)


def ignores_total_steps(optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """Halves every ten steps, whatever the horizon."""
    return LambdaLR(optimizer, lambda step: 0.5 ** (step // 10))


def starts_at_zero(optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """Rises from nothing."""
    return LambdaLR(optimizer, lambda step: step / total_steps)


def goes_below_zero(optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """Falls for ever."""
    return LambdaLR(optimizer, lambda step: 1 - 2 * step / total_steps)


def stops_at_its_horizon(optimizer: Optimizer, total_steps: int) -> OneCycleLR:
    """Raises where it has no more to say."""
    return OneCycleLR(optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=total_steps)


def sets_all_groups_alike(optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """Takes the lr of the first group for all."""
    first = optimizer.param_groups[0]["lr"]
    for group in optimizer.param_groups:
        group["lr"] = float(first)
    return straight(optimizer, total_steps)


def skips_its_warmup(optimizer: Optimizer, total_steps: int, warmup_steps: int = 0) -> LambdaLR:
    """Starts at the top."""
    return straight(optimizer, total_steps)


@pytest.mark.parametrize(
    ("plugin", "expected"),
    [
        (ignores_total_steps, {"honours_total_steps"}),
        (starts_at_zero, {"starts_above_zero"}),
        (goes_below_zero, {"is_finite_and_non_negative", "goes_beyond_its_horizon"}),
        (stops_at_its_horizon, {"goes_beyond_its_horizon"}),
        (sets_all_groups_alike, {"keeps_the_ratio_of_groups", "takes_a_tensor_lr"}),
        (skips_its_warmup, {"warms_up"}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_wrong_schedule_fails_the_check_of_its_mistake(plugin: Any, expected: set[str]) -> None:
    assert expected <= failures(ScheduleSuite, plugin)


def test_a_right_schedule_passes_everything() -> None:
    assert failures(ScheduleSuite, straight) == set()


def test_a_function_is_a_plugin_of_a_suite_too() -> None:
    class TestStraight(ScheduleSuite):
        plugin = straight

    assert all(outcome.state == "passed" for outcome in TestStraight.outcomes())
