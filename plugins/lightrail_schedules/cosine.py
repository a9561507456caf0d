"""Half a cosine."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrail.options import between
from lightrail.traits import Traits
from lightrail_schedules.horizon import Horizon
from lightrail_schedules.multiplied import Multiplied, declares

__all__ = ["cosine", "cosine_multiplier"]


def cosine_multiplier(t: int, horizon: Horizon, final: float) -> float:
    """``final + (1-final) (1 + cos(pi s)) / 2``, with s the part of the run after the warm-up that is over."""
    if t < horizon.warmup:
        return horizon.warm(t)
    return final + (1 - final) * (1 + math.cos(math.pi * horizon.progress(t))) / 2


@declares(
    Traits(
        rule="lr_t = lr (final + (1-final) (1 + cos(pi t/T)) / 2)",
        paper="Loshchilov, Hutter, 2017, SGDR: Stochastic Gradient Descent with Warm Restarts, arXiv:1608.03983",
        example={"warmup_steps": 0.1, "final": 0.1},
    )
)
def cosine(optimizer: Optimizer, total_steps: int, *, warmup_steps: int | float = 0, final: float = 0.0) -> LRScheduler:
    """Half a cosine from the learning rate down to a fraction of it, after a linear warm-up.

    ``lr_t = lr (final + (1-final) (1 + cos(pi (t-W)/(T-W))) / 2)`` for t >= W; ``lr (t+1)/(W+1)`` before.

    Args:
        optimizer: Any torch optimizer.
        total_steps: T, optimizer steps of the run, >= 1.
        warmup_steps: W, in steps, or as a fraction of the run below 1.
        final: What is left at T, as a fraction of the learning rate, in [0, 1].

    Returns:
        A scheduler, stepped once an optimizer step.

    Raises:
        ConfigurationError: The run has no step, the warm-up does not fit into it, or ``final`` is out of range.

    Deviations:
        One cycle: no restarts.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = cosine(optimizer, 4)
        >>> for _ in range(2):
        ...     optimizer.step(); schedule.step()
        >>> [round(lr, 6) for lr in schedule.get_last_lr()]
        [0.5]

    Reference:
        Loshchilov and Hutter, 2017, arXiv:1608.03983, equation 5.
    """
    horizon = Horizon.of(total_steps, warmup_steps)
    between(0.0, 1.0, closed="both", final=final)

    def multiplier(t: int) -> float:
        return cosine_multiplier(t, horizon, final)

    return Multiplied(optimizer, multiplier)
