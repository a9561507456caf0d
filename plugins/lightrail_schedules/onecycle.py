"""One cycle: up to a large learning rate, then down to a very small one."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrail.errors import ConfigurationError
from lightrail.options import between
from lightrail.traits import Traits
from lightrail_schedules.horizon import Horizon
from lightrail_schedules.multiplied import Multiplied, declares

__all__ = ["onecycle", "onecycle_multiplier"]


def onecycle_multiplier(t: int, horizon: Horizon, initial: float, final: float) -> float:
    """Half a cosine from ``initial`` up to 1 over the warm-up, then one down to ``final`` at the last step."""
    if t < horizon.warmup:
        return _half_cosine(initial, 1.0, t / horizon.warmup)
    return _half_cosine(1.0, final, min(1.0, (t - horizon.warmup) / max(1, horizon.total - 1 - horizon.warmup)))


def _half_cosine(start: float, end: float, s: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * s)) / 2


class _Cycled(Multiplied):
    """Also moves the momentum, against the learning rate: from ``high`` to ``low`` at the peak, and back."""

    def __init__(self, optimizer: Optimizer, horizon: Horizon, initial: float, final: float, low: float, high: float):
        def multiplier(t: int) -> float:
            return onecycle_multiplier(t, horizon, initial, final)

        self._horizon, self._low, self._high = horizon, low, high
        super().__init__(optimizer, multiplier)

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        self._move_momentum()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._move_momentum()

    def _move_momentum(self) -> None:
        fraction = onecycle_multiplier(self.last_epoch, self._horizon, 0.0, 0.0)
        momentum = self._high - (self._high - self._low) * fraction
        for group in self.optimizer.param_groups:
            if "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            elif "momentum" in group:
                group["momentum"] = momentum


@declares(
    Traits(
        rule="lr_t: half a cosine from lr/25 up to lr, then one down to lr/250000",
        paper=(
            "Smith, Topin, 2018, Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates, "
            "arXiv:1708.07120"
        ),
        example={"warmup_steps": 0.3},
    )
)
def onecycle(
    optimizer: Optimizer,
    total_steps: int,
    *,
    warmup_steps: int | float = 0.3,
    initial: float = 1 / 25,
    final: float = 1 / 250_000,
    cycle_momentum: bool = False,
    low_momentum: float = 0.85,
    high_momentum: float = 0.95,
) -> LRScheduler:
    """One cycle whose peak is the optimizer's learning rate: half a cosine up, half a cosine down to almost nothing.

    From ``initial · lr`` at step 0 to ``lr`` at step W, then to ``final · lr`` at step T-1.

    Args:
        optimizer: Any torch optimizer.
        total_steps: T, optimizer steps of the run, >= 1.
        warmup_steps: W, the way up, in steps, or as a fraction of the run below 1.
        initial: Where the way up begins, as a fraction of the learning rate, in [0, 1].
        final: Where the way down ends, as a fraction of the learning rate, in [0, 1].
        cycle_momentum: Whether momentum (``momentum``, or the first of ``betas``) moves against the learning rate,
            from ``high_momentum`` to ``low_momentum`` at the peak, and back.
        low_momentum: In [0, 1).
        high_momentum: In [0, 1).

    Returns:
        A scheduler, stepped once an optimizer step.

    Raises:
        ConfigurationError: The run has no step, the way up does not fit into it, an option is out of range, or
            ``cycle_momentum`` for an optimizer that has no momentum.

    Deviations:
        The paper moves along straight lines; half cosines are common practice, and what torch's ``OneCycleLR`` does:
        this is equal to it at ``pct_start = (W+1)/T``.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = onecycle(optimizer, 5, warmup_steps=2)
        >>> rates = schedule.get_last_lr()
        >>> for _ in range(4):
        ...     optimizer.step(); schedule.step(); rates += schedule.get_last_lr()
        >>> [round(rate, 6) for rate in rates]
        [0.04, 0.52, 1.0, 0.500002, 4e-06]

    Reference:
        Smith and Topin, 2018, arXiv:1708.07120, section 4.
    """
    horizon = Horizon.of(total_steps, warmup_steps)
    between(0.0, 1.0, closed="both", initial=initial, final=final)
    between(0.0, 1.0, low_momentum=low_momentum, high_momentum=high_momentum)
    if cycle_momentum:
        if not all("betas" in group or "momentum" in group for group in optimizer.param_groups):
            raise ConfigurationError(
                "onecycle cannot cycle the momentum of an optimizer that has none",
                found=f"{type(optimizer).__name__} with options {', '.join(sorted(optimizer.defaults))}",
                allowed="an optimizer with the option momentum or betas",
                remedy="Set schedule.cycle_momentum=false, or choose another optimizer.",
            )
        return _Cycled(optimizer, horizon, initial, final, low_momentum, high_momentum)

    def multiplier(t: int) -> float:
        return onecycle_multiplier(t, horizon, initial, final)

    return Multiplied(optimizer, multiplier)
