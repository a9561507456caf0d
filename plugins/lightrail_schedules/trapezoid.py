"""Up along a line, along a plateau, down along a line."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrail.traits import Traits
from lightrail_schedules.multiplied import declares
from lightrail_schedules.warmup_stable_decay import warmup_stable_decay

__all__ = ["trapezoid"]


@declares(
    Traits(
        rule="lr_t = lr min(1, (t+1)/(W+1), (T-t)/D)",
        paper=(
            "Hägele, Bakouch, Kosson, Ben Allal, von Werra, Jaggi, 2024, Scaling Laws and Compute-Optimal Training "
            "Beyond Fixed Training Durations, arXiv:2405.18392"
        ),
        example={"warmup_steps": 0.1, "decay_steps": 0.3},
    )
)
def trapezoid(
    optimizer: Optimizer,
    total_steps: int,
    *,
    warmup_steps: int | float = 0.02,
    decay_steps: int | float = 0.2,
    final: float = 0.0,
) -> LRScheduler:
    """A straight line up, a plateau at the learning rate, and a straight line down over the last steps.

    ``lr_t = lr · min(1, (t+1)/(W+1), final + (1-final) (T-t)/D)``: ``warmup_stable_decay`` with straight sides, and
    with a warm-up by default.

    Args:
        optimizer: Any torch optimizer.
        total_steps: T, optimizer steps of the run, >= 1.
        warmup_steps: W, in steps, or as a fraction of the run below 1.
        decay_steps: D, the cool-down, in steps, or as a fraction of the run below 1.
        final: What is left at T, as a fraction of the learning rate, in [0, 1].

    Returns:
        A scheduler, stepped once an optimizer step.

    Raises:
        ConfigurationError: The run has no step, warm-up and cool-down do not fit into it together, or an option is out
            of range.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = trapezoid(optimizer, 8, warmup_steps=1, decay_steps=4)
        >>> rates = schedule.get_last_lr()
        >>> for _ in range(7):
        ...     optimizer.step(); schedule.step(); rates += schedule.get_last_lr()
        >>> rates
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]

    Reference:
        Hägele et al., 2024, arXiv:2405.18392, section 3; Zhai, Kolesnikov, Houlsby and Beyer, 2022, "Scaling Vision
        Transformers", arXiv:2106.04560, who found that a cool-down of one plateau serves runs of many lengths.
    """
    return warmup_stable_decay(
        optimizer, total_steps, warmup_steps=warmup_steps, decay_steps=decay_steps, final=final, shape="linear"
    )
