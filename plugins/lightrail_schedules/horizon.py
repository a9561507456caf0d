"""The horizon of a schedule, and the linear warm-up that every schedule may begin with."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightrail.errors import ConfigurationError

__all__ = ["Horizon"]


@dataclass(frozen=True)
class Horizon:
    """Steps ``0 … total-1``, of which the first ``warmup`` warm up.

    Args:
        total: Optimizer steps of the run.
        warmup: Steps of linear warm-up.
    """

    total: int
    warmup: int

    @classmethod
    def of(cls, total_steps: int, warmup_steps: int | float = 0) -> Horizon:
        """Checks both and turns a fraction into steps.

        Args:
            total_steps: Optimizer steps of the run, >= 1.
            warmup_steps: Steps, or a fraction of the run below 1.

        Raises:
            ConfigurationError: There is no step, or the warm-up does not fit.

        Example:
            >>> Horizon.of(200, 0.1)
            Horizon(total=200, warmup=20)
        """
        if isinstance(total_steps, bool) or not math.isfinite(total_steps) or total_steps != int(total_steps):
            _refuse_total(total_steps)
        if total_steps < 1:
            _refuse_total(total_steps)
        return cls(int(total_steps), part_of(int(total_steps), warmup_steps=warmup_steps))

    def progress(self, t: int) -> float:
        """The part of what follows the warm-up that is over at step ``t``: 0 at its first step, 1 at ``total``."""
        return min(1.0, max(0.0, (t - self.warmup) / max(1, self.total - self.warmup)))

    def warm(self, t: int) -> float:
        """``min(1, (t+1) / (warmup+1))``: above 0 at the first step, 1 at the first step after the warm-up.

        Example:
            >>> [Horizon(total=10, warmup=3).warm(t) for t in range(5)]
            [0.25, 0.5, 0.75, 1.0, 1.0]
        """
        return min(1.0, (t + 1) / (self.warmup + 1))


def part_of(total: int, **option: int | float) -> int:
    """A part of the run in steps, given in steps or as a fraction below 1; the option is named in the error."""
    ((name, value),) = option.items()
    fraction = isinstance(value, float) and 0 < value < 1
    steps = round(value * total) if fraction else value
    if isinstance(value, bool) or not math.isfinite(value) or value < 0 or steps != int(steps) or steps > total:
        raise ConfigurationError(
            f"{name} does not fit into the run",
            found=f"{name}={value}, in a run of {total} steps",
            allowed=f"a whole number of steps from 0 to {total}, or a fraction of the run below 1",
            remedy=f"Lower {name}, or train longer.",
        )
    return int(steps)


def _refuse_total(total_steps: object) -> None:
    raise ConfigurationError(
        "a schedule needs the length of the run",
        found=f"total_steps={total_steps}",
        allowed="a whole number of steps, at least 1",
        remedy="Set trainer.max_epochs or trainer.max_steps to a positive number.",
    )
