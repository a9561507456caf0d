"""The contract of the kind `sweep`: which configuration is tried next, knowing how the former ones fared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightrail.options import at_least

__all__ = ["Choices", "Dimension", "Goal", "Interval", "SweepMethod"]


@dataclass(frozen=True)
class Interval:
    """All numbers from ``low`` to ``high``.

    Args:
        low: The least.
        high: The greatest, above ``low``.
        log: Whether their logarithms are what is spread evenly; ``low`` is then above 0.
        whole: Whether they are whole numbers.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Choices:
    """A few values, as they are typed on the command line, without an order among them."""

    values: tuple[str, ...]


Dimension = Interval | Choices


@dataclass(frozen=True)
class Goal:
    """What a sweep is after.

    Args:
        metric: The metric's name, among those of validation.
        mode: Whether less of it is better, or more.
    """

    metric: str
    mode: Literal["min", "max"]


class SweepMethod(ABC):
    """Proposes configurations out of a space, and judges trials that are under way.

    What it knows lies in ``folder``, which every job of the sweep can read and write, so that a sweep that was killed
    goes on with what it had learned, and a job can ask from any machine whether it is still worth its time.

    Args:
        space: What each key may be, by the key as it is typed.
        folder: The sweep's own folder.
        goal: What it is after.
        trials: How many configurations are tried, at least 1.
    """

    def __init__(self, space: Mapping[str, Dimension], folder: Path, goal: Goal, *, trials: int = 20) -> None:
        at_least(1, trials=trials)
        self.space = dict(space)
        self.folder = folder
        self.goal = goal
        self.trials = trials

    @abstractmethod
    def ask(self, number: int) -> dict[str, str]:
        """The values of a trial, by key, as they would be typed. Asked again for a number, it answers the same.

        Args:
            number: The trial, from 0.
        """

    @abstractmethod
    def tell(self, number: int, value: float | None) -> None:
        """How a trial ended; telling it twice changes nothing.

        Args:
            number: The trial.
            value: The best value that it reached; ``None`` where it failed, or reached none that is finite.
        """

    def is_hopeless(self, number: int, step: int, value: float) -> bool:
        """Whether a trial that is under way had better stop; its job asks after each validation.

        Args:
            number: The trial.
            step: Optimizer steps so far.
            value: Of the metric now.
        """
        return False
