"""How far a schedule has turned the learning rate, for whatever else is to follow it."""

from __future__ import annotations

from torch.optim import Optimizer

__all__ = ["LearningRateShare"]


class LearningRateShare:
    """The learning rate over the one that training began with, of an optimizer's first group.

    Example:
        >>> import torch
        >>> share, optimizer = LearningRateShare(), torch.optim.SGD([torch.zeros(1)], lr=0.4)
        >>> share.watch(optimizer)
        >>> optimizer.param_groups[0]["lr"] = 0.1
        >>> share.now()
        0.25
    """

    def __init__(self) -> None:
        self._optimizer: Optimizer | None = None
        self._start = 0.0

    def watch(self, optimizer: Optimizer) -> None:
        """Takes the present rate for the start; where a schedule has moved it already, the one that it marked."""
        group = optimizer.param_groups[0]
        self._optimizer = optimizer
        self._start = float(group.get("initial_lr", group.get("lr", 0.0)))

    def now(self) -> float:
        """The share at this moment; 1 where nothing is watched or the rate began at 0."""
        # Not the group itself: loading a checkpoint replaces it.
        if self._optimizer is None or self._start == 0:
            return 1.0
        return float(self._optimizer.param_groups[0]["lr"]) / self._start
