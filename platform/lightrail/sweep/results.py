"""What the trials of a sweep came to, read from their folders."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightrail.errors import UserError
from lightrail.launch.job import Job, JobState, outcome_of
from lightrail.sweep.ledger import Ledger, Trial
from lightrail.sweep.method import Goal

__all__ = ["Group", "Row", "best_of", "groups_over_seeds", "rows_of", "short_reason", "sorted_rows", "value_of"]

SEED = "seed"


@dataclass(frozen=True)
class Row:
    """One trial of a sweep, and what it came to.

    Args:
        trial: The trial.
        state: How it fares.
        summary: The contents of its ``summary.json``; empty where there is none.
        value: The best value of the sweep's metric that is finite; ``None`` where there is none.
    """

    trial: Trial
    state: JobState
    summary: Mapping[str, Any] = field(default_factory=dict)
    value: float | None = None

    @property
    def values(self) -> dict[str, str]:
        """What it gives to each key that varies."""
        return {key.lstrip("+"): value for key, value in self.trial.values.items()}

    @property
    def status(self) -> str:
        """Its state in words; that of a trial that was given up early says so."""
        said = str(self.summary.get("status", ""))
        return said if self.state.phase == "finished" and said else self.state.phase


@dataclass(frozen=True)
class Group:
    """Trials that differ in nothing but their seed.

    Args:
        values: What they give to the other keys.
        count: How many have a value.
        mean: Of the sweep's metric.
        deviation: Its standard deviation among them, with one degree of freedom for the mean; NaN for a single one.
    """

    values: Mapping[str, str]
    count: int
    mean: float
    deviation: float


def value_of(folder: Path, goal: Goal) -> float | None:
    """The best finite value of a metric that a run reached.

    Args:
        folder: The run folder.
        goal: Which metric, and whether less of it is better.
    """
    summary = _summary(folder)
    monitor = summary.get("monitor")
    if isinstance(monitor, Mapping) and (monitor.get("name"), monitor.get("mode")) == (goal.metric, goal.mode):
        found = [monitor.get("best")]
    else:
        found = [*_curve(folder, goal.metric), (summary.get("metrics") or {}).get(goal.metric)]
    finite = [float(each) for each in found if isinstance(each, int | float) and math.isfinite(each)]
    return (min if goal.mode == "min" else max)(finite, default=None)


def _curve(folder: Path, metric: str) -> list[float]:
    from lightrail.report.metrics import read_metrics

    try:
        return [value for _, value in read_metrics(folder / "metrics.csv").get(metric, ())]
    except (OSError, UserError):
        return []


def _summary(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "summary.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def rows_of(ledger: Ledger, state: Callable[[Trial], JobState] | None = None) -> list[Row]:
    """Every trial that is written, by number.

    Args:
        ledger: The sweep's.
        state: How a trial fares; asked of its folder and its launch by default.
    """
    goal = Goal(**ledger.content["goal"])
    rows = []
    for trial in ledger.trials():
        fares = (state or state_of)(trial)
        summary = _summary(trial.folder)
        # One that failed or still runs may have a value on its way, which is no result.
        value = value_of(trial.folder, goal) if fares.phase == "finished" else None
        rows.append(Row(trial, fares, {**summary, "folder": str(trial.folder)} if summary else {}, value))
    return rows


def state_of(trial: Trial) -> JobState:
    """How a trial fares: its outcome, what its launch says, or that it waits."""
    outcome = outcome_of(trial.folder)
    if outcome is not None:
        return outcome
    job = Job.of(trial.folder)
    if job is None:
        return JobState("pending", "not started")
    try:
        return job.state()
    except UserError as error:
        return JobState("unknown", error.what)


def sorted_rows(rows: Sequence[Row], goal: Goal) -> list[Row]:
    """The best first; those without a value after them, by number."""
    sign = 1 if goal.mode == "min" else -1
    return sorted(rows, key=lambda row: (row.value is None, sign * (row.value or 0.0), row.trial.number))


def best_of(rows: Sequence[Row], goal: Goal) -> Row | None:
    """The trial with the best value; ``None`` where none has any."""
    return next((row for row in sorted_rows(rows, goal) if row.value is not None), None)


def groups_over_seeds(rows: Sequence[Row], goal: Goal) -> list[Group]:
    """Mean and standard deviation over the seeds, the best mean first; empty where no seed varies.

    Args:
        rows: The trials.
        goal: What the sweep is after.
    """
    found: dict[tuple[tuple[str, str], ...], list[float]] = {}
    if not any(SEED in row.values for row in rows):
        return []
    for row in rows:
        if row.value is not None:
            others = tuple((key, value) for key, value in row.values.items() if key != SEED)
            found.setdefault(others, []).append(row.value)
    groups = [
        Group(dict(key), len(each), statistics.fmean(each), statistics.stdev(each) if len(each) > 1 else math.nan)
        for key, each in found.items()
    ]
    return sorted(groups, key=lambda group: group.mean, reverse=goal.mode == "max")


def short_reason(reason: str) -> str:
    """The line of an error that says most: the first, or the last of a traceback.

    Example:
        >>> short_reason("Traceback (most recent call last):\\n  ...\\nValueError: no"), short_reason("no\\n  found: 3")
        ('ValueError: no', 'no')
    """
    lines = [line for line in reason.strip().splitlines() if line.strip()]
    if not lines:
        return ""
    return lines[-1].strip() if lines[0].startswith("Traceback") else lines[0].strip()
