"""What a private run releases: Gaussian sums over Poisson batches, told in integers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from lightrail.errors import ConfigurationError
from lightrail.options import at_least, non_negative

__all__ = ["Event", "joined", "merged", "steps_per_epoch"]


@dataclass(frozen=True)
class Event:
    r"""Releases of one kind: each a sum over a Poisson batch, with Gaussian noise.

    .. math:: s = \sum_{i \in S} v_i + z \Delta \, \mathcal{N}(0, I), \qquad P(i \in S) = q = B / n

    with the sensitivity :math:`\Delta \ge \|v_i\|_2` in units of the sum.

    Args:
        noise: Noise multiplier z: the standard deviation of the noise over the sensitivity, at least 0; with 0
            nothing is private.
        steps: Number of releases, at least 0.
        batch: Expected batch size B, from 1 to ``records``; with B = n every record takes part in every release.
        records: Number of records n, at least 1.

    Raises:
        ConfigurationError: A value is out of range.

    Example:
        >>> event = Event(noise=1.1, steps=450, batch=64, records=1437)
        >>> event.rate
        Fraction(64, 1437)
        >>> Event.from_dict(event.to_dict()) == event
        True
    """

    noise: float
    steps: int
    batch: int
    records: int

    def __post_init__(self) -> None:
        non_negative(noise=self.noise)
        at_least(0, steps=self.steps)
        at_least(1, batch=self.batch, records=self.records)
        if self.batch > self.records:
            raise ConfigurationError(
                "a batch is larger than the data",
                found=f"batch={self.batch}, records={self.records}",
                allowed=f"a batch of 1 to {self.records} records",
                remedy="Lower the batch size; with as many as there are records every step sees everything.",
            )

    @property
    def rate(self) -> Fraction:
        """The probability q with which each record takes part in a release, exact."""
        return Fraction(self.batch, self.records)

    def to_dict(self) -> dict[str, Any]:
        """The event as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Event:
        """The event that :meth:`to_dict` told.

        Args:
            values: What :meth:`to_dict` returned, also after JSON.

        Raises:
            ConfigurationError: Something else.
        """
        names = ("noise", "steps", "batch", "records")
        if not isinstance(values, Mapping) or set(values) != set(names):
            raise ConfigurationError(
                "an event of a privacy ledger cannot be read",
                found=str(values)[:120],
                allowed=f"a mapping of {', '.join(names)}",
                remedy="Take the ledger from an intact privacy.json or checkpoint.",
            )
        non_negative(noise=values["noise"])
        for name in names[1:]:
            at_least(0, **{name: values[name]})
        return cls(float(values["noise"]), *(int(values[name]) for name in names[1:]))


def merged(*noises: float) -> float:
    r"""The noise multiplier of several Gaussian releases on the same batch, taken as one.

    .. math:: z^{-2} = \sum_k z_k^{-2}

    Args:
        noises: The noise multipliers :math:`z_k`, at least 0; infinity for a release that uses no data.

    Returns:
        z; infinity where nothing is released.

    Raises:
        ConfigurationError: One is negative or not a number.

    Example:
        >>> round(merged(1.0012523, 20.0), 6)
        1.0
        >>> merged(1.0, 0.0)
        0.0
    """
    for noise in noises:
        if noise != math.inf:
            non_negative(noise=noise)
    if not all(noises):
        return 0.0
    # Scaled by the smallest, whose square could otherwise vanish.
    smallest = min(noises, default=math.inf)
    return smallest if smallest == math.inf else smallest / math.sqrt(sum((smallest / z) ** 2 for z in noises))


def joined(events: Iterable[Event]) -> list[Event]:
    """Neighbours of one kind as one event, and no events without steps.

    Args:
        events: In the order of release.

    Returns:
        The same releases, in the same order.

    Example:
        >>> joined([Event(1.0, 3, 8, 64), Event(1.0, 4, 8, 64), Event(2.0, 1, 8, 64)])
        [Event(noise=1.0, steps=7, batch=8, records=64), Event(noise=2.0, steps=1, batch=8, records=64)]
    """
    kept: list[Event] = []
    for event in events:
        if kept and replace(kept[-1], steps=event.steps) == event:
            kept[-1] = replace(event, steps=kept[-1].steps + event.steps)
        elif event.steps:
            kept.append(event)
    return kept


def steps_per_epoch(batch: int, records: int) -> int:
    r"""How many Poisson batches take every record once on average: :math:`n / B`, rounded, at least 1.

    Args:
        batch: Expected batch size B.
        records: Number of records n.

    Example:
        >>> steps_per_epoch(64, 1437), steps_per_epoch(1, 93)
        (22, 93)
    """
    at_least(1, batch=batch, records=records)
    return max(1, (2 * records + batch) // (2 * batch))
