"""Warm-up, a plateau, and a decay at the end."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrail.errors import ConfigurationError
from lightrail.options import between, one_of
from lightrail.traits import Traits
from lightrail_schedules.horizon import Horizon, part_of
from lightrail_schedules.multiplied import Multiplied, declares

__all__ = ["warmup_stable_decay", "warmup_stable_decay_multiplier"]


def warmup_stable_decay_multiplier(t: int, horizon: Horizon, decay: int, final: float, shape: str) -> float:
    """1 until the decay begins, then ``final + (1-final) (1-s)`` or ``(1-sqrt(s))``, s the part of it that is over."""
    begin = horizon.total - decay
    if t < begin or decay == 0:
        return horizon.warm(t)
    s = min(1.0, (t - begin) / decay)
    return final + (1 - final) * (1 - (math.sqrt(s) if shape == "sqrt" else s))


@declares(
    Traits(
        rule="lr_t = lr, then lr (1 - s) over the last steps",
        paper=(
            "Hu et al., 2024, MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training "
            "Strategies, arXiv:2404.06395"
        ),
        example={"warmup_steps": 0.1, "decay_steps": 0.2},
    )
)
def warmup_stable_decay(
    optimizer: Optimizer,
    total_steps: int,
    *,
    warmup_steps: int | float = 0,
    decay_steps: int | float = 0.2,
    final: float = 0.0,
    shape: str = "linear",
) -> LRScheduler:
    """Linear warm-up, a plateau at the learning rate, and a decay over the last steps.

    ``lr_t = lr (final + (1-final) (1 - s))`` with ``s = (t - (T-D)) / D`` over the last D steps, ``lr`` before them,
    ``lr (t+1)/(W+1)`` in the warm-up. Since the plateau does not know the length of the run, a run can be prolonged
    from any checkpoint on it.

    Args:
        optimizer: Any torch optimizer.
        total_steps: T, optimizer steps of the run, >= 1.
        warmup_steps: W, in steps, or as a fraction of the run below 1.
        decay_steps: D, in steps, or as a fraction of the run below 1.
        final: What is left at T, as a fraction of the learning rate, in [0, 1].
        shape: ``linear``; ``sqrt`` for ``1 - sqrt(s)``, which falls fast at first.

    Returns:
        A scheduler, stepped once an optimizer step.

    Raises:
        ConfigurationError: The run has no step, warm-up and decay do not fit into it together, or an option is out of
            range.

    Deviations:
        The paper decays exponentially; the two shapes here are those of Hägele et al., 2024, arXiv:2405.18392.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = warmup_stable_decay(optimizer, 8, warmup_steps=1, decay_steps=4)
        >>> rates = schedule.get_last_lr()
        >>> for _ in range(7):
        ...     optimizer.step(); schedule.step(); rates += schedule.get_last_lr()
        >>> rates
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]

    Reference:
        Hu et al., 2024, arXiv:2404.06395, section 4.
    """
    horizon = Horizon.of(total_steps, warmup_steps)
    decay = part_of(horizon.total, decay_steps=decay_steps)
    between(0.0, 1.0, closed="both", final=final)
    one_of(("linear", "sqrt"), shape=shape)
    if horizon.warmup + decay > horizon.total:
        raise ConfigurationError(
            "warm-up and decay do not fit into the run together",
            found=f"{horizon.warmup} and {decay} steps, in a run of {horizon.total}",
            allowed=f"at most {horizon.total} steps for both",
            remedy="Lower schedule.warmup_steps or schedule.decay_steps, or train longer.",
        )

    def multiplier(t: int) -> float:
        return warmup_stable_decay_multiplier(t, horizon, decay, final, shape)

    return Multiplied(optimizer, multiplier)
