"""What methods that set their own step size, by a rule or a search, say of a schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from lightrail.errors import ConfigurationError

__all__ = ["refuse_schedule"]


def refuse_schedule(optimizer: Optimizer, group: Mapping[str, Any], remedy: str = "Leave the schedule out.") -> None:
    """Raises where one of torch's schedules governs a group, which it marks with ``initial_lr``."""
    if "initial_lr" in group:
        name = type(optimizer).__name__
        raise ConfigurationError(
            f"{name} sets its own step size, and a schedule would fight it",
            found="a learning rate schedule over its parameter groups",
            allowed="no schedule",
            remedy=remedy,
        )
