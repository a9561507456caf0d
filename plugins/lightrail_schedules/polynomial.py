"""A power of what is left of the run."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrail.options import between, positive
from lightrail.traits import Traits
from lightrail_schedules.horizon import Horizon
from lightrail_schedules.multiplied import Multiplied, declares

__all__ = ["polynomial", "polynomial_multiplier"]


def polynomial_multiplier(t: int, horizon: Horizon, power: float, final: float) -> float:
    """``final + (1-final) (1-s)^power``, with s the part of the run after the warm-up that is over."""
    if t < horizon.warmup:
        return horizon.warm(t)
    return final + (1 - final) * (1 - horizon.progress(t)) ** power


@declares(
    Traits(
        rule="lr_t = lr (1 - t/T)^power",
        paper=(
            "Chen, Papandreou, Kokkinos, Murphy, Yuille, 2018, DeepLab: Semantic Image Segmentation with Deep "
            "Convolutional Nets, Atrous Convolution, and Fully Connected CRFs, arXiv:1606.00915"
        ),
        example={"warmup_steps": 0.1, "power": 2.0},
    )
)
def polynomial(
    optimizer: Optimizer,
    total_steps: int,
    *,
    warmup_steps: int | float = 0,
    power: float = 0.9,
    final: float = 0.0,
) -> LRScheduler:
    """The learning rate times a power of what is left of the run, after a linear warm-up.

    ``lr_t = lr (final + (1-final) (1 - (t-W)/(T-W))^power)`` for t = W, …, T-1; ``lr (t+1)/(W+1)`` before.

    Args:
        optimizer: Any torch optimizer.
        total_steps: T, optimizer steps of the run, >= 1.
        warmup_steps: W, in steps, or as a fraction of the run below 1.
        power: > 0: 1 is a straight line, 2 falls fast at first, 1/2 at the end.
        final: What is left at T, as a fraction of the learning rate, in [0, 1].

    Returns:
        A scheduler, stepped once an optimizer step.

    Raises:
        ConfigurationError: The run has no step, the warm-up does not fit into it, or an option is out of range.

    Guarantees:
        At ``power=1`` it is ``linear_decay``.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = polynomial(optimizer, 4, power=2)
        >>> optimizer.step(); schedule.step(); schedule.get_last_lr()
        [0.5625]

    Reference:
        Chen et al., 2018, arXiv:1606.00915, the learning rate policy "poly".
    """
    horizon = Horizon.of(total_steps, warmup_steps)
    positive(power=power)
    between(0.0, 1.0, closed="both", final=final)
    return Multiplied(optimizer, lambda t: polynomial_multiplier(t, horizon, power, final))
