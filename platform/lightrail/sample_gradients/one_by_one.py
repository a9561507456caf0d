"""The slow way that is right for any model: every sample evaluated alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightrail.sample_gradients.gradients import SampleGradients
from lightrail.sample_gradients.paths import take
from lightrail.sample_gradients.pieces import Piece
from lightrail.step.batches import leading_size

__all__ = ["gradients_one_by_one"]


def gradients_one_by_one(
    evaluate: Callable[[Any], Tensor], params: Sequence[Tensor], batch: Any, divisor: float = 1.0
) -> SampleGradients:
    """The gradients of samples that were evaluated in batches of one.

    Args:
        evaluate: The loss of a batch.
        params: The parameters.
        batch: Samples along the leading axis.
        divisor: What ``evaluate`` divides each loss by.

    Returns:
        Their gradients: as many copies of the model as there are samples.
    """
    count = leading_size(batch) or 0
    found = [torch.zeros(count, *p.shape, dtype=p.dtype, device=p.device) for p in params]
    for i in range(count):
        with torch.enable_grad():
            gradients = torch.autograd.grad(evaluate(take(batch, [i])), list(params), allow_unused=True)
        for kept, gradient in zip(found, gradients, strict=True):
            if gradient is not None:
                kept[i] = gradient
    return SampleGradients(params, [[Piece(p, each)] for p, each in zip(params, found, strict=True)], divisor)
