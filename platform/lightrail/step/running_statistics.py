"""What an evaluation moves besides gradients: running statistics and metrics. An extra evaluation must not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["Statistics"]


class Statistics:
    """The buffers (BatchNorm statistics and their like) and torchmetrics states inside a module.

    Args:
        module: The module whose forward pass moves them; ``None`` for nothing to keep.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with Statistics(norm).frozen():
        ...     _ = norm(torch.randn(4, 2) + 5)
        >>> norm.running_mean.tolist()
        [0.0, 0.0]
    """

    def __init__(self, module: nn.Module | None) -> None:
        modules = list(module.modules()) if module is not None else []
        # Without torchmetrics imported there can be no metric, and importing it only to find none is slow.
        metric_class = getattr(sys.modules.get("torchmetrics"), "Metric", ())
        self._metrics: list[Any] = [m for m in modules if isinstance(m, metric_class)]
        self._owners = [m for m in modules if m._buffers and not isinstance(m, metric_class)]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Whatever happens to them inside is undone on the way out."""
        buffers = [
            (owner, name, buffer, buffer.detach().clone())
            for owner in self._owners
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]
        metrics = [
            (metric, metric._copy_state_dict(), metric._update_count, metric._computed) for metric in self._metrics
        ]
        try:
            yield
        finally:
            with torch.no_grad():
                for owner, name, buffer, value in buffers:
                    # Back into the very tensor that was there: a module may have put a new one in its place.
                    buffer.copy_(value)
                    owner._buffers[name] = buffer
            for metric, state, update_count, computed in metrics:
                for name, value in state.items():
                    setattr(metric, name, value)
                metric._update_count = update_count
                metric._computed = computed
