"""The account of a run: what it released of its data, what that costs, and under which assumptions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lightrail.errors import ConfigurationError
from lightrail.files import replace_file
from lightrail.options import between, one_of
from lightrail.privacy.accounting import checked_accountant, epsilon_of
from lightrail.privacy.delta import check_delta, default_delta
from lightrail.privacy.events import Event, joined
from lightrail.privacy.ledger_file import SCHEMA, read_json, unreadable

__all__ = ["ADD_OR_REMOVE", "ZERO_OUT", "Ledger", "check_delta", "composed", "default_delta", "plan_table", "read_json"]

ADD_OR_REMOVE = "add or remove one record"
ZERO_OUT = "zero out one record"
_SAMPLINGS = {
    "poisson": "Poisson: each record by its own coin",
    "full": "every record in every step",
    "shuffle": "shuffled, without amplification",
}


@dataclass
class Ledger:
    """What a run spends of its budget, and on which assumptions that rests.

    Args:
        delta: Target delta, in (0, 1).
        noise: Noise multiplier; ``None`` where releases differ in it.
        planned: The releases of the whole run.
        accountant: ``pld`` or ``rdp``.
        target_epsilon: What the noise was calibrated for; ``None`` where the noise was given.
        clip: How contributions are bounded, in words.
        adjacency: Which data sets are neighbours: :data:`ADD_OR_REMOVE` or :data:`ZERO_OUT`.
        sampling: ``poisson``, ``full`` (every record in every step) or ``shuffle``; only the first amplifies.
        is_private: False where the noise is deterministic or zero: then epsilon is infinite, whatever the events.
        assumptions: What the guarantee rests on, one sentence each.
        events: What was released so far, in order; neighbours of one kind are one event.
        guards: Budgets of guards of the validation, by name, as plain values.

    Raises:
        ConfigurationError: An option is out of range, or events claim amplification that the sampling does not give.

    Example:
        >>> ledger = Ledger(delta=1e-5, noise=8.0, planned=[Event(8.0, 100, 10, 10)], sampling="full")
        >>> for _ in range(3):
        ...     ledger.record(Event(8.0, 1, 10, 10))
        >>> ledger.events
        [Event(noise=8.0, steps=3, batch=10, records=10)]
        >>> round(ledger.epsilon(), 3), round(ledger.planned_epsilon, 3)
        (0.791, 5.68)
    """

    delta: float
    noise: float | None
    planned: list[Event]
    accountant: str = "pld"
    target_epsilon: float | None = None
    clip: str = ""
    adjacency: str = ADD_OR_REMOVE
    sampling: str = "poisson"
    is_private: bool = True
    assumptions: list[str] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    guards: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        between(0.0, 1.0, closed="neither", delta=self.delta)
        checked_accountant(self.accountant)
        one_of((ADD_OR_REMOVE, ZERO_OUT), adjacency=self.adjacency)
        one_of(_SAMPLINGS, sampling=self.sampling)
        self.planned, self.events = joined(self.planned), joined(self.events)
        for event in (*self.planned, *self.events):
            self._check(event)
        self.is_private = self.is_private and all(event.noise > 0 for event in (*self.planned, *self.events))

    def _check(self, event: Event) -> None:
        if self.sampling != "poisson" and event.rate != 1:
            raise ConfigurationError(
                f"batches that are not drawn by Poisson sampling do not amplify privacy (sampling={self.sampling})",
                found=f"an event at the rate {event.rate}",
                allowed="events in which every record takes part: one an epoch where batches are fixed",
                remedy="Take sampling=poisson, or account each epoch as one release of everything.",
            )

    def record(self, event: Event) -> None:
        """Adds a release.

        Args:
            event: What was released.
        """
        self._check(event)
        self.events = [*self.events[:-1], *joined([*self.events[-1:], event])]
        self.is_private = self.is_private and event.noise > 0

    def epsilon(self, interval: float = 1e-4) -> float:
        """What was spent so far, at :attr:`delta`; infinite where the run is not private.

        Args:
            interval: Width of the grid of privacy losses; see :func:`lightrail.privacy.accounting.epsilon_of`.
        """
        return self._cost(self.events, interval)

    @property
    def planned_epsilon(self) -> float:
        """What the whole run spends, at :attr:`delta`."""
        return self._cost(self.planned, 1e-4)

    def _cost(self, events: Sequence[Event], interval: float) -> float:
        if events and not self.is_private:
            return math.inf
        return epsilon_of(events, self.delta, self.accountant, interval)

    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` says of it: what was spent, of what, and whether the run is private at all."""
        return {
            "epsilon": self.epsilon() if self.is_private else None,
            "delta": self.delta,
            "target_epsilon": self.target_epsilon,
            "noise": self.noise,
            "private": self.is_private,
        }

    def to_dict(self) -> dict[str, Any]:
        """The ledger as plain values, for checkpoints and JSON."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Ledger:
        """The ledger that :meth:`to_dict` told; what :meth:`write` adds is not needed.

        Args:
            values: Plain values.

        Raises:
            CheckpointError: They are no ledger, or one of another version.
            ConfigurationError: A value is out of range.
        """
        if not isinstance(values, Mapping) or values.get("schema") != SCHEMA:
            raise unreadable("the ledger", f"schema {values.get('schema') if isinstance(values, Mapping) else values}")
        names = [each.name for each in fields(cls)]
        lacking = [name for name in names if name not in values]
        if lacking:
            raise unreadable("the ledger", f"no {', '.join(lacking)}")
        found = {name: values[name] for name in names}
        for name, kind in (("planned", list), ("events", list), ("assumptions", list), ("guards", dict)):
            if not isinstance(found[name], kind):
                raise unreadable("the ledger", f"{name}={found[name]}")
        for name in ("planned", "events"):
            found[name] = [Event.from_dict(each) for each in found[name]]
        found["assumptions"], found["guards"] = list(found["assumptions"]), dict(found["guards"])
        return cls(**found)

    def write(self, path: Path) -> None:
        """Writes ``privacy.json``: the ledger, and the epsilon that it comes to, spent and planned.

        Args:
            path: The file, in a folder that is there.

        Raises:
            RunFolderError: It cannot be written.
        """
        costs = {"epsilon": self.epsilon(), "planned_epsilon": self.planned_epsilon}
        # JSON knows no infinity.
        told = {name: value if math.isfinite(value) else None for name, value in costs.items()}
        replace_file(path, (json.dumps({**told, **self.to_dict()}, indent=2) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """Reads ``privacy.json``.

        Args:
            path: The file.

        Raises:
            CheckpointError: It is missing, truncated or foreign.
            ConfigurationError: A value in it is out of range.
        """
        return cls.from_dict(read_json(path))


def composed(ledgers: Sequence[Ledger]) -> Ledger:
    """The ledger of several runs on the same data, such as the trials of a sweep: what they spend adds up.

    Args:
        ledgers: One a run, at least one.

    Returns:
        A ledger of all their releases, at the smallest of their deltas.

    Raises:
        ConfigurationError: There is none, or they mean different things by neighbouring data.

    Example:
        >>> one = Ledger(delta=1e-5, noise=8.0, planned=[], events=[Event(8.0, 50, 10, 10)], sampling="full")
        >>> round(composed([one, one]).epsilon(), 3)
        5.68
    """
    adjacencies = sorted({each.adjacency for each in ledgers})
    if len(adjacencies) != 1:
        raise ConfigurationError(
            "these runs cannot be accounted together",
            found=" and ".join(f"'{each}'" for each in adjacencies) or "no runs",
            allowed="at least one run, all with the same notion of neighbouring data",
            remedy="Account the runs of each notion apart.",
        )
    if len(ledgers) == 1:
        return Ledger.from_dict(ledgers[0].to_dict())
    together = f"The {len(ledgers)} runs used the same records, and their releases add up."
    guards = {
        (name if sum(name in each.guards for each in ledgers) == 1 else f"{name} (run {number})"): dict(guard)
        for number, each in enumerate(ledgers, start=1)
        for name, guard in each.guards.items()
    }
    return Ledger(
        delta=min(each.delta for each in ledgers),
        noise=_common([each.noise for each in ledgers], None),
        planned=[event for each in ledgers for event in each.planned],
        accountant=_common([each.accountant for each in ledgers], "pld"),
        clip="; ".join(dict.fromkeys(each.clip for each in ledgers if each.clip)),
        adjacency=adjacencies[0],
        sampling=_common([each.sampling for each in ledgers], "poisson"),
        is_private=all(each.is_private for each in ledgers),
        assumptions=list(dict.fromkeys([*(line for each in ledgers for line in each.assumptions), together])),
        events=[event for each in ledgers for event in each.events],
        guards=guards,
    )


def _common(values: Sequence[Any], otherwise: Any) -> Any:
    return values[0] if all(value == values[0] for value in values) else otherwise


def plan_table(ledger: Ledger) -> list[tuple[str, str]]:
    """What the whole run will spend, as names and values to show.

    Args:
        ledger: Of a run that has been planned.

    Returns:
        ``(name, value)`` in the order of interest.

    Example:
        >>> ledger = Ledger(delta=1e-5, noise=2.0, planned=[Event(2.0, 440, 64, 1437)], accountant="rdp")
        >>> for name, value in plan_table(ledger)[1:5]:
        ...     print(f"{name:<18}{value}")
        delta             1e-5
        noise multiplier  2.000
        sampling rate     64/1437
        steps             440
    """
    from lightrail.report.wording import number

    target = "" if ledger.target_epsilon is None else f" (target {number(ledger.target_epsilon)})"
    kinds = list(dict.fromkeys((event.noise, event.batch, event.records) for event in ledger.planned))
    steps = [sum(e.steps for e in ledger.planned if (e.noise, e.batch, e.records) == kind) for kind in kinds]
    noises = _each([number(noise) for noise, _, _ in kinds], steps)
    rates = _each([f"{batch}/{records}" for _, batch, records in kinds], steps)
    rows = [
        ("epsilon", number(ledger.planned_epsilon) + target),
        ("delta", number(ledger.delta)),
        ("noise multiplier", noises if ledger.noise is None or not kinds else number(ledger.noise)),
        ("sampling rate", rates),
        ("steps", f"{sum(steps):,}"),
        ("sampling", _SAMPLINGS[ledger.sampling]),
        ("clipping", ledger.clip),
        ("neighbours", ledger.adjacency),
        ("accountant", ledger.accountant.upper()),
    ]
    if not ledger.is_private:
        rows.insert(0, ("private", "no: the noise is zero or can be foretold"))
    return [(name, value) for name, value in rows if value]


def _each(values: Sequence[str], steps: Sequence[int]) -> str:
    """One value, or each with the steps in which it holds."""
    if len(set(values)) <= 1:
        return values[0] if values else ""
    if len(values) > 4:
        return f"{values[0]} to {values[-1]}, in {len(values)} kinds of steps"
    return ", ".join(f"{value} ({count:,} steps)" for value, count in zip(values, steps, strict=True))
