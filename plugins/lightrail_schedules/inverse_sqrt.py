"""One over the square root of the step."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrail.traits import Traits
from lightrail_schedules.horizon import Horizon
from lightrail_schedules.multiplied import Multiplied, declares

__all__ = ["inverse_sqrt", "inverse_sqrt_multiplier"]


def inverse_sqrt_multiplier(t: int, horizon: Horizon) -> float:
    """``min((t+1)/(W+1), sqrt((W+1)/(t+1)))``: up along a line, down as one over the square root."""
    return min(horizon.warm(t), math.sqrt((horizon.warmup + 1) / (t + 1)))


@declares(
    Traits(
        rule="lr_t = lr min((t+1)/(W+1), sqrt((W+1)/(t+1)))",
        paper=(
            "Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin, 2017, Attention Is All You Need, "
            "arXiv:1706.03762"
        ),
        example={"warmup_steps": 0.2},
        exceptions={
            "honours_total_steps": "without warm-up it is one over the square root of the step, however long the run"
        },
    )
)
def inverse_sqrt(optimizer: Optimizer, total_steps: int, *, warmup_steps: int | float = 0.04) -> LRScheduler:
    """One over the square root of the step, after a linear warm-up whose length sets the scale.

    ``lr_t = lr · min((t+1)/(W+1), sqrt((W+1)/(t+1)))``: the learning rate is the peak, reached at step W; after four
    times as many steps half of it is left. A run can be prolonged from any checkpoint, given the same W in steps.

    Args:
        optimizer: Any torch optimizer.
        total_steps: Optimizer steps of the run, >= 1; only a warm-up that is a fraction depends on them.
        warmup_steps: W, in steps, or as a fraction of the run below 1. The default is that of the paper: 4000 steps
            of 100 000.

    Returns:
        A scheduler, stepped once an optimizer step.

    Raises:
        ConfigurationError: The run has no step, or the warm-up does not fit into it.

    Deviations:
        The paper sets the learning rate itself, ``d^-1/2 min(n^-1/2, n w^-3/2)`` with steps n counted from 1: this is
        the same curve at ``w = W+1`` and ``lr = (d w)^-1/2``.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = inverse_sqrt(optimizer, 100, warmup_steps=1)
        >>> rates = schedule.get_last_lr()
        >>> for _ in range(7):
        ...     optimizer.step(); schedule.step(); rates += schedule.get_last_lr()
        >>> rates[0], rates[1], rates[7]
        (0.5, 1.0, 0.5)

    Reference:
        Vaswani et al., 2017, arXiv:1706.03762, equation 3.
    """
    horizon = Horizon.of(total_steps, warmup_steps)
    return Multiplied(optimizer, lambda t: inverse_sqrt_multiplier(t, horizon))
