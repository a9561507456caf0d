"""Times given one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from lightrail.errors import ConfigurationError
from lightrail.generation import Grid, NoisePath, TimeGrid
from lightrail.traits import Traits

__all__ = ["Explicit"]


class Explicit(TimeGrid):
    """The times that are listed, in falling order; ``sampler.steps`` must be one less than their number.

    Args:
        times: At least two times on the path, falling; the last may be the data's own.

    Raises:
        ConfigurationError: There are too few times, or when the run starts: they do not fall, leave the path, or do not
            match ``sampler.steps``.

    Example:
        >>> from lightrail.generation import LinearFlow
        >>> [level.t for level in Explicit(times=[0.9, 0.5, 0.0]).grid(LinearFlow(), 2)]
        [0.9, 0.5, 0.0]
    """

    traits: ClassVar[Traits] = Traits(rule="t_i as listed", example={"times": [0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05]})

    def __init__(self, times: Sequence[float]) -> None:
        super().__init__(end="minimum")
        if len(times) < 2:
            raise ConfigurationError(
                "a time grid needs a start and an end",
                found=f"time_grid.times={list(times)}",
                allowed="two times or more, falling",
                remedy="List them from noise to data: time_grid.times=[0.999,0.5,0.1,0].",
            )
        self.listed = tuple(float(t) for t in times)

    def times(self, path: NoisePath, start: float, stop: float, count: int) -> np.ndarray:
        if count != len(self.listed):
            raise ConfigurationError(
                "the listed times do not make that many steps",
                found=f"{len(self.listed)} times, {count - 1} steps",
                allowed="one time more than there are steps",
                remedy=f"Set sampler.steps={len(self.listed) - 1}, or list {count} times.",
            )
        return np.array(self.listed)

    def grid(self, path: NoisePath, steps: int, *, finite: bool = True) -> Grid:
        # What is listed is taken as it is; a sampler that cannot start there says so.
        return super().grid(path, steps, finite=False)
