"""Whether a method's update grows with the gradient: what decides how its learning rate goes with the batch size."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.optim import Optimizer

from lightrail.step.closure import Closure
from lightrail.step.transform import CombinedOptimizer, TransformedOptimizer
from lightrail.traits import traits_of

__all__ = ["scales_with_gradient"]


def scales_with_gradient(optimizer: Optimizer) -> bool:
    """Whether doubling every gradient doubles the update, as for SGD; for Adam and sign methods it does not.

    What the optimizer's traits say; where they say nothing, one made with the same options is tried on a scratch
    parameter.

    Args:
        optimizer: Any torch optimizer, or one of ours around it.

    Example:
        >>> w = [torch.nn.Parameter(torch.ones(2))]
        >>> scales_with_gradient(torch.optim.SGD(w, lr=0.1)), scales_with_gradient(torch.optim.AdamW(w, lr=0.1))
        (True, False)
    """
    while isinstance(optimizer, TransformedOptimizer):
        optimizer = optimizer.optimizer
    if isinstance(optimizer, CombinedOptimizer):
        optimizer = optimizer.optimizers[0]
    declared = traits_of(type(optimizer)).scales_with_gradient
    return _measured(optimizer) if declared is None else declared


def _measured(optimizer: Optimizer) -> bool:
    accepted = inspect.signature(type(optimizer)).parameters
    options = {k: v for k, v in optimizer.defaults.items() if k in accepted and k not in ("params", "weight_decay")}
    try:
        small, large = (_moved(type(optimizer), options, size) for size in (1e-3, 1.0))
    except Exception:  # a method that needs more than this has said nothing of itself: take it for a normalised one
        return False
    return large > 100 * small


def _moved(cls: type[Optimizer], options: dict[str, Any], size: float) -> float:
    with torch.random.fork_rng(devices=[]):
        p = torch.nn.Parameter(torch.ones(3, 3))
        slope = size * torch.linspace(-1.0, 1.0, 9).view(3, 3)
        optimizer = cls([p], **options)
        for _ in range(2):
            optimizer.step(Closure(lambda: (slope * p).sum(), [p]))  # type: ignore[arg-type]
        return float((p.detach() - 1).abs().max())
