"""What has been measured so far, in a file: a run that is stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from lightrail.bench.claims.outcome import Trial
from lightrail.files import replacing

__all__ = ["Measured", "read_record", "write_record"]


@dataclass(frozen=True)
class Measured:
    """One method on one problem.

    Args:
        kind: Of the method.
        problem: The name of the problem.
        method: Its name.
        options: Options other than the learning rate.
        source: What the code of method and problem was, as a digest.
        rate: The learning rate that the trials found; ``None`` for a method that sets its own step size.
        trials: One a seed.
        refused: Why the method could not work on the problem.
        behind: The optimizer behind a method that is none: ``{"optimizer": name, **options}``.
        tuned: Whether learning rates are tried; ``None`` where the method decides.
    """

    kind: str
    problem: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    rate: float | None = None
    trials: tuple[Trial, ...] = ()
    refused: str = ""
    behind: Mapping[str, Any] = field(default_factory=dict)
    tuned: bool | None = None

    @property
    def key(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in sorted(self.options.items()))
        behind = "".join(f",{name}={value}" for name, value in sorted(self.behind.items()))
        rate = "" if self.tuned is None else f",tuned={self.tuned}"
        return f"{self.kind}/{self.problem}/{self.method}({options}{behind}{rate})@{self.source}"

    @property
    def lr(self) -> float | None:
        """The learning rate that was used: found, or given; ``None`` for a method that sets its own step size."""
        given = self.options.get("lr", self.behind.get("lr"))
        return given if self.rate is None and given is not None else self.rate

    @property
    def mean(self) -> float:
        return mean(trial.final for trial in self.trials)


def read_record(path: Path) -> dict[str, Measured]:
    """What a file holds; nothing where there is none."""
    if not path.exists():
        return {}
    found = (_measured(each) for each in json.loads(path.read_text()))
    return {each.key: each for each in found}


def _measured(plain: Mapping[str, Any]) -> Measured:
    trials = tuple(Trial(tuple(each["passes"]), tuple(each["merits"]), each.get("outcome")) for each in plain["trials"])
    return Measured(**{**plain, "trials": trials})


def write_record(path: Path, record: Mapping[str, Measured]) -> None:
    """Writes all that was measured, in a stable order, curves to five digits."""
    plain = [_plain(record[key]) for key in sorted(record)]
    with replacing(path) as temporary:
        temporary.write_text("[\n" + ",\n".join(json.dumps(each) for each in plain) + "\n]\n")


def _plain(measured: Measured) -> dict[str, Any]:
    plain = asdict(measured)
    for trial in plain["trials"]:
        for name in ("passes", "merits"):
            trial[name] = [float(f"{value:.5g}") for value in trial[name]]
        if trial["outcome"] is None:
            del trial["outcome"]
    return {name: value for name, value in plain.items() if name not in ("behind", "tuned") or value not in ({}, None)}
