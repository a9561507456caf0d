"""A straight line to zero."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrail.options import between
from lightrail.traits import Traits
from lightrail_schedules.horizon import Horizon
from lightrail_schedules.multiplied import Multiplied, declares

__all__ = ["linear_decay", "linear_multiplier"]


def linear_multiplier(t: int, horizon: Horizon, final: float) -> float:
    """``1 - (1-final) s``, with s the part of the run after the warm-up that is over."""
    if t < horizon.warmup:
        return horizon.warm(t)
    return 1 - (1 - final) * horizon.progress(t)


@declares(
    Traits(
        rule="lr_t = lr (1 - t/T)",
        paper=(
            "Defazio, Cutkosky, Mehta, Mishchenko, 2023, Optimal Linear Decay Learning Rate Schedules and Further "
            "Refinements, arXiv:2310.07831"
        ),
        example={"warmup_steps": 0.1},
    )
)
def linear_decay(
    optimizer: Optimizer, total_steps: int, *, warmup_steps: int | float = 0, final: float = 0.0
) -> LRScheduler:
    """A straight line from the learning rate to zero, after a linear warm-up.

    ``lr_t = lr (1 - (t-W)/(T-W))`` for t = W, …, T-1; ``lr (t+1)/(W+1)`` before.

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
        The paper's schedule has no warm-up and ``final=0``, which are the defaults.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = linear_decay(optimizer, 4)
        >>> optimizer.step(); schedule.step(); schedule.get_last_lr()
        [0.75]

    Reference:
        Defazio et al., 2023, arXiv:2310.07831.
    """
    horizon = Horizon.of(total_steps, warmup_steps)
    between(0.0, 1.0, closed="both", final=final)

    def multiplier(t: int) -> float:
        return linear_multiplier(t, horizon, final)

    return Multiplied(optimizer, multiplier)
