"""The contract of the kind `sweep`: which configuration is tried next, knowing how the former ones fared."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from lightrail.errors import ConfigurationError
from lightrail.options import at_least, one_of

__all__ = ["Choices", "Dimension", "Goal", "Interval", "SweepMethod", "finite", "plain_space", "space_from"]


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

    def typed(self, number: float) -> str:
        """A number of it as one would type it, to six digits where that is still within.

        Example:
            >>> Interval(1e-5, 0.1, log=True).typed(0.0012345678), Interval(8, 128, whole=True).typed(16.0)
            ('0.00123457', '16')
        """
        number = min(max(number, self.low), self.high)
        if self.whole:
            return str(round(number))
        short = f"{number:.6g}"
        return short if self.low <= float(short) <= self.high else repr(float(number))

    def holds(self, text: str) -> bool:
        """Whether what was typed lies within.

        Example:
            >>> Interval(8, 128, whole=True).holds("16"), Interval(8, 128, whole=True).holds("16.5")
            (True, False)
        """
        try:
            number = float(text)
        except ValueError:
            return False
        return self.low <= number <= self.high and (not self.whole or text == str(int(number)))


@dataclass(frozen=True)
class Choices:
    """A few values, as they are typed on the command line, without an order among them."""

    values: tuple[str, ...]

    def holds(self, text: str) -> bool:
        """Whether what was typed is one of them."""
        return text in self.values


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

    @classmethod
    def of(cls, task: object) -> Goal:
        """What a task is after: its own word ``monitor``, or the least validation loss.

        Args:
            task: The task, or its class.

        Example:
            >>> class Classification:
            ...     monitor = ("val_accuracy", "max")
            >>> Goal.of(Classification), Goal.of(object)
            (Goal(metric='val_accuracy', mode='max'), Goal(metric='val_loss', mode='min'))
        """
        monitor: Any = getattr(task, "monitor", None)
        # On a class it may be a property, which only an instance can answer.
        name, mode = monitor if isinstance(monitor, tuple | list) else ("val_loss", "min")
        return cls(name, mode)


def plain_space(space: Mapping[str, Dimension]) -> dict[str, dict[str, Any]]:
    """A space as plain values, for a file of JSON; :func:`space_from` reads it."""
    return {key: asdict(dimension) for key, dimension in space.items()}


def space_from(plain: Mapping[str, Mapping[str, Any]]) -> dict[str, Dimension]:
    """The space that :func:`plain_space` wrote.

    Example:
        >>> space = {"lr": Interval(1e-4, 0.1, log=True), "optimizer": Choices(("adamw", "sophia"))}
        >>> space_from(plain_space(space)) == space
        True
    """
    return {
        key: Choices(tuple(entry["values"])) if "values" in entry else Interval(**entry) for key, entry in plain.items()
    }


class SweepMethod(ABC):
    """Proposes configurations out of a space, and judges trials that are under way.

    What it knows lies in ``folder``, which every job of the sweep can read and write, so that a sweep that was killed
    goes on with what it had learned, and a job can ask from any machine whether it is still worth its time. One process
    at a time asks and tells, with the trials numbered in the order in which they are asked for.

    Args:
        space: What each key may be, by the key as it is typed.
        folder: The sweep's own folder.
        goal: What the task is after, where the user says nothing else.
        trials: How many configurations are tried, at least 1.
        metric: Another metric to go by, among those of validation.
        direction: Whether less (``min``) or more (``max``) of the metric is better; needed with ``metric``.
    """

    def __init__(
        self,
        space: Mapping[str, Dimension],
        folder: Path,
        goal: Goal,
        *,
        trials: int = 20,
        metric: str | None = None,
        direction: str | None = None,
    ) -> None:
        at_least(1, trials=trials)
        self.space = dict(space)
        self.folder = Path(folder).resolve()
        self.goal = _goal(goal, metric, direction)
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

    def is_hopeless(self, number: int, validation: int, value: float) -> bool:
        """Whether a trial that is under way had better stop; its job asks after each validation.

        Args:
            number: The trial.
            validation: Which validation of the trial it was, from 1: trials are compared at the same one, since
                steps differ in size where the batch is part of the space.
            value: Of the metric now.
        """
        return False


def _goal(goal: Goal, metric: str | None, direction: str | None) -> Goal:
    if direction is not None:
        one_of(("min", "max"), direction=direction)
    elif metric not in (None, goal.metric):
        raise ConfigurationError(
            f"whether less or more of '{metric}' is better is not said",
            found=f"sweep.metric={metric}, with sweep.direction left out",
            allowed="sweep.direction=min or sweep.direction=max",
            remedy=f"Add sweep.direction=…; without sweep.metric the sweep goes by {goal.metric} ({goal.mode}).",
        )
    return Goal(metric or goal.metric, cast(Literal["min", "max"], direction or goal.mode))


def finite(value: float | None) -> float | None:
    """The value, or ``None`` for one that is infinite or not a number."""
    return value if value is not None and math.isfinite(value) else None
