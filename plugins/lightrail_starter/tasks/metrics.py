"""Means over an epoch."""

from __future__ import annotations

from torch import nn
from torchmetrics import MeanMetric

__all__ = ["means"]


def means(*names: str) -> nn.ModuleDict:
    """One running mean for each name under validation and test: ``val_loss``, ``test_loss``, ….

    Example:
        >>> sorted(means("loss"))
        ['test_loss', 'val_loss']
    """
    # By default a mean drops NaN with a warning, and a broken model would look well; here NaN stays NaN.
    return nn.ModuleDict(
        {f"{stage}_{name}": MeanMetric(nan_strategy=float("nan")) for stage in ("val", "test") for name in names}
    )
