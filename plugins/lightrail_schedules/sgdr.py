"""Half cosines, one after the other, with warm restarts."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrail.options import at_least, between
from lightrail.traits import Traits
from lightrail_schedules.horizon import Horizon, part_of
from lightrail_schedules.multiplied import Multiplied, declares

__all__ = ["sgdr", "sgdr_multiplier"]


def sgdr_multiplier(t: int, horizon: Horizon, starts: list[int], final: float) -> float:
    """``final + (1-final) (1 + cos(pi T_cur/T_i)) / 2``, T_cur being the steps since the last restart.

    Args:
        t: The step, from 0.
        horizon: Of which the warm-up counts.
        starts: The step at which each cycle begins, and at last the one at which the last cycle is over.
        final: Where each cycle ends, as a fraction of the learning rate.
    """
    if t < horizon.warmup:
        return horizon.warm(t)
    cycle = min(bisect_right(starts, t), len(starts) - 1)
    begin, end = starts[cycle - 1], starts[cycle]
    return final + (1 - final) * (1 + math.cos(math.pi * min(1.0, (t - begin) / (end - begin)))) / 2


def _lengths(room: int, cycles: int, first: int | None, multiplier: float) -> list[float]:
    """How long each cycle is: those that fill the room, or those that begin in it where the first is given."""
    if first is None:
        shares = [multiplier ** (i + 1 - cycles) for i in range(cycles)]
        return [room * share / sum(shares) for share in shares]
    lengths = [float(first)]
    while sum(lengths) < room:
        lengths.append(lengths[-1] * multiplier)
    return lengths


def _starts_of(horizon: Horizon, lengths: list[float]) -> list[int]:
    """Where each cycle begins, and at last where the last one is over, in whole steps."""
    starts = [horizon.warmup]
    for over in itertools.accumulate(lengths):
        # A run may have fewer steps than cycles: one without a step is left out.
        if horizon.warmup + round(over) > starts[-1]:
            starts.append(horizon.warmup + round(over))
    return starts if len(starts) > 1 else [horizon.warmup, horizon.warmup + 1]


@declares(
    Traits(
        rule="lr_t = lr (final + (1-final) (1 + cos(pi T_cur/T_i)) / 2), T_{i+1} = multiplier T_i",
        paper="Loshchilov, Hutter, 2017, SGDR: Stochastic Gradient Descent with Warm Restarts, arXiv:1608.03983",
        example={"cycles": 2, "final": 0.1},
    )
)
def sgdr(
    optimizer: Optimizer,
    total_steps: int,
    *,
    warmup_steps: int | float = 0,
    cycles: int = 3,
    multiplier: float = 2.0,
    first_cycle: int | float | None = None,
    final: float = 0.0,
) -> LRScheduler:
    """Half cosines from the learning rate down to a fraction of it, each followed by a restart at the top.

    ``lr_t = lr (final + (1-final) (1 + cos(pi T_cur/T_i)) / 2)``: T_cur are the steps since the last restart; the
    next comes when T_cur = T_i, and the cycle after it is ``T_{i+1} = multiplier · T_i`` steps long. By default three
    cycles of one, two and four sevenths fill the run.

    Args:
        optimizer: Any torch optimizer.
        total_steps: T, optimizer steps of the run, >= 1.
        warmup_steps: W, in steps, or as a fraction of the run below 1; only before the first cycle.
        cycles: How many fill what follows the warm-up, >= 1; the run ends with the last of them.
        multiplier: How many times longer each cycle is than the one before, from 1 to 100.
        first_cycle: T_0, in steps, or as a fraction of the run below 1; in place of ``cycles``, which it overrides.
            The last cycle may then be cut off by the end of the run.
        final: Where each cycle ends, as a fraction of the learning rate, in [0, 1].

    Returns:
        A scheduler, stepped once an optimizer step.

    Raises:
        ConfigurationError: The run has no step, warm-up or first cycle do not fit into it, or an option is out of
            range.

    Guarantees:
        Equal to torch's ``CosineAnnealingWarmRestarts(T_0=first_cycle, T_mult=multiplier)`` at whole multipliers.
        Beyond the last cycle it stays where that cycle ends.

    Deviations:
        A cycle begins at a whole step. The paper measures T_i in epochs, and moves T_cur at every batch as is done
        here: weights are worth evaluating at the end of a cycle only.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = sgdr(optimizer, 6, first_cycle=2)
        >>> rates = schedule.get_last_lr()
        >>> for _ in range(5):
        ...     optimizer.step(); schedule.step(); rates += schedule.get_last_lr()
        >>> [round(rate, 6) for rate in rates]
        [1.0, 0.5, 1.0, 0.853553, 0.5, 0.146447]

    Reference:
        Loshchilov and Hutter, 2017, arXiv:1608.03983, equation 5.
    """
    horizon = Horizon.of(total_steps, warmup_steps)
    first = None if first_cycle is None else part_of(horizon.total, first_cycle=first_cycle)
    if first is not None:
        at_least(1, first_cycle=first)
    at_least(1, cycles=cycles)
    between(1.0, 100.0, closed="both", multiplier=multiplier)
    between(0.0, 1.0, closed="both", final=final)
    starts = _starts_of(horizon, _lengths(horizon.total - horizon.warmup, cycles, first, multiplier))
    return Multiplied(optimizer, lambda t: sgdr_multiplier(t, horizon, starts, final))
