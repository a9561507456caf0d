"""What came of one trial."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Trial"]


@dataclass(frozen=True)
class Trial:
    """What came of one trial.

    Args:
        passes: How many had been spent when the merit was looked at.
        merits: The merit then; infinite from where the loss was not finite.
        outcome: What the problem makes of them, where that is not the last.
    """

    passes: tuple[float, ...]
    merits: tuple[float, ...]
    outcome: float | None = None

    @property
    def final(self) -> float:
        return self.merits[-1] if self.outcome is None else self.outcome

    def passes_to(self, merit: float) -> float:
        """After how many passes the merit was first as low, between marks on a straight line; infinite if never."""
        before = None
        for spent, found in zip(self.passes, self.merits, strict=True):
            if found <= merit:
                if before is None or not math.isfinite(before[1]):
                    return spent
                return before[0] + (spent - before[0]) * (before[1] - merit) / max(before[1] - found, 1e-30)
            before = spent, found
        return math.inf
