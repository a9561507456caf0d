"""Time grids: which levels of noise a solver visits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lightrail.errors import ConfigurationError
from lightrail.generation.noise_path import Level, NoisePath
from lightrail.options import at_least, one_of
from lightrail.traits import Traits

__all__ = ["ENDS", "Grid", "TimeGrid"]

ENDS = ("zero", "minimum", "denoise")


@dataclass(frozen=True)
class Grid(Sequence[Level]):
    """The levels that a solver visits, from noise to data; it reads them in turn and never works one out again.

    Args:
        path: The noise path.
        levels: At least two, each with less noise than the one before.
        denoises_last: Whether the data predicted at the last level are what is returned.
    """

    path: NoisePath
    levels: tuple[Level, ...]
    denoises_last: bool = False

    def __post_init__(self) -> None:
        for here, there in zip(self.levels, self.levels[1:], strict=False):
            if not there.lam > here.lam:
                raise ConfigurationError(
                    "the time grid does not fall",
                    found=f"t={here.t:.6g} (λ={here.lam:.6g}), then t={there.t:.6g} (λ={there.lam:.6g})",
                    allowed="times that each hold less noise than the one before, none twice",
                    remedy="Take fewer sampler.steps, another time_grid, or a list without repetitions.",
                )

    @property
    def steps(self) -> int:
        return len(self.levels) - 1

    def __len__(self) -> int:
        return len(self.levels)

    def __getitem__(self, index: int) -> Level:  # type: ignore[override]
        return self.levels[index]

    def reversed(self) -> tuple[Level, ...]:
        """From data to noise."""
        return self.levels[::-1]


class TimeGrid(ABC):
    """Spaces the times at which a solver visits a path.

    Args:
        start: Where sampling starts; ``None`` for the noisy end of the path.
        stop: The last time at which the network is asked; ``None`` for the path's own.
        end: What follows it. ``zero``: a last step to the data, σ = 0. ``minimum``: nothing, some noise stays in.
            ``denoise``: as ``minimum``, and the data predicted at the last level are returned, for one more evaluation.
    """

    traits: ClassVar[Traits] = Traits()
    # Whether the spacing itself reaches σ = 0, so that `zero` needs no extra jump.
    reaches_zero: ClassVar[bool] = False

    def __init__(self, start: float | None = None, stop: float | None = None, end: str = "zero") -> None:
        one_of(ENDS, end=end)
        self.start = start
        self.stop = stop
        self.end = end

    @abstractmethod
    def times(self, path: NoisePath, start: float, stop: float, count: int) -> np.ndarray:
        """``count`` times from ``start`` down to ``stop``, both included, in double precision."""

    def grid(self, path: NoisePath, steps: int, *, finite: bool = True) -> Grid:
        """The levels of a run.

        Args:
            path: The noise path.
            steps: How many steps, at least 1.
            finite: Whether the first level must have α > 0, for solvers that divide by it.

        Raises:
            ConfigurationError: A time lies outside the path, or the times do not fall.
        """
        at_least(1, steps=steps)
        start = min(self._start(path), path.t_finite) if finite else self._start(path)
        stop = path.t_min if self.stop is None else self.stop
        jumps = self.end == "zero" and not (self.reaches_zero and self.stop is None)
        if self.end == "zero" and not jumps:
            stop = path.t_zero
        count = steps if jumps else steps + 1
        times = [float(t) for t in self.times(path, start, stop, count)] if count > 1 else [start]
        self._check(path, times)
        if jumps:
            times.append(path.t_zero)
        levels = tuple(path.level(t) for t in times)
        return Grid(path, levels, denoises_last=self.end == "denoise")

    def _start(self, path: NoisePath) -> float:
        return path.t_max if self.start is None else self.start

    def _check(self, path: NoisePath, times: Sequence[float]) -> None:
        low, high = path.t_zero, path.t_max
        outside = [t for t in times if not low - 1e-9 <= t <= high * (1 + 1e-9)]
        if outside:
            raise ConfigurationError(
                "the time grid leaves the noise path",
                found=f"t={outside[0]:.6g}",
                allowed=f"times from {high:.6g} (noise) to {low:.6g} (data)",
                remedy="Set time_grid.start, time_grid.stop or the listed times within the path.",
            )
