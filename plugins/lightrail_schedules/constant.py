"""The schedule that stays."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrail.traits import Traits
from lightrail_schedules.horizon import Horizon
from lightrail_schedules.multiplied import Multiplied, declares

__all__ = ["constant"]


@declares(Traits(rule="lr_t = lr", example={"warmup_steps": 0.1}))
def constant(optimizer: Optimizer, total_steps: int, *, warmup_steps: int | float = 0) -> LRScheduler:
    """The learning rate itself, after a linear warm-up.

    ``lr_t = lr · min(1, (t+1)/(W+1))``.

    Args:
        optimizer: Any torch optimizer.
        total_steps: Optimizer steps of the run, >= 1.
        warmup_steps: W, in steps, or as a fraction of the run below 1.

    Returns:
        A scheduler, stepped once an optimizer step.

    Raises:
        ConfigurationError: The run has no step, or the warm-up does not fit into it.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> constant(optimizer, 100, warmup_steps=3).get_last_lr()
        [0.25]
    """
    return Multiplied(optimizer, Horizon.of(total_steps, warmup_steps).warm)
