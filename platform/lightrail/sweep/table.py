"""The table of a sweep on the terminal."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lightrail.report.wording import number
from lightrail.sweep.ledger import Ledger
from lightrail.sweep.method import Goal
from lightrail.sweep.results import Row, best_of, groups_over_seeds, short_reason, sorted_rows

__all__ = ["ending", "short_keys", "table"]

_METRICS_AT_MOST = 3
_REASON_LENGTH = 100
_OF_THE_SWEEP = ("launch=", "launch.", "sweep=", "sweep.", "run.name=")


def ending(ledger: Ledger, rows: Sequence[Row]) -> str:
    """All that is told of a sweep: the table, the best and how to run it again, seeds, what privacy was spent.

    Args:
        ledger: The sweep's.
        rows: Its trials.
    """
    goal = Goal(**ledger.content["goal"])
    parts = [table(rows, goal)]
    missing = ledger.planned - len(rows)
    if missing > 0:
        parts[0] += f"\n{missing} of {ledger.planned} trials were not proposed yet"
    if groups := seeds_table(rows, goal):
        parts.append(groups)
    if (best := best_of(rows, goal)) is not None:
        value = f"{goal.metric} {number(best.value)}"
        parts.append(f"best: {value} · {best.trial.folder}\n{command_again(best)}")
    if any("privacy" in row.summary for row in rows):
        from lightrail.privacy.trials import spent_together

        started = [row.summary for row in rows if row.state.phase != "pending"]
        parts.append("\n".join(spent_together(started)))
    return "\n\n".join(parts)


def table(rows: Sequence[Row], goal: Goal) -> str:
    """The trials, the best first and marked.

    Args:
        rows: The trials.
        goal: What the sweep is after.
    """
    metrics = _metrics(rows, goal)
    keys = short_keys(rows)
    is_private = any("privacy" in row.summary for row in rows)
    best = best_of(rows, goal)
    header = ["job", *keys.values(), goal.metric, *metrics, *(["epsilon"] if is_private else []), "state"]
    lines = [
        [
            str(row.trial.number),
            *(row.values.get(key, "-") for key in keys),
            _cell(row.value) + (" *" if row is best else ""),
            *(_cell((row.summary.get("metrics") or {}).get(name)) for name in metrics),
            *([_epsilon(row.summary)] if is_private else []),
            _state(row),
        ]
        for row in sorted_rows(rows, goal)
    ]
    marks = [row is best for row in sorted_rows(rows, goal)]
    return _aligned([header, *lines], [False, *marks])


def seeds_table(rows: Sequence[Row], goal: Goal) -> str:
    """Mean and standard deviation over seeds; empty where no seed varies."""
    groups = groups_over_seeds(rows, goal)
    if not any(group.count > 1 for group in groups):
        return ""
    keys = {key: short for key, short in short_keys(rows).items() if key != "seed"}
    header = [*keys.values(), "seeds", f"{goal.metric}, mean ± sd"]
    lines = [
        [
            *(group.values.get(key, "-") for key in keys),
            str(group.count),
            number(group.mean) + ("" if math.isnan(group.deviation) else f" ± {number(group.deviation)}"),
        ]
        for group in groups
    ]
    return _aligned([header, *lines], [False] * (len(lines) + 1))


def short_keys(rows: Sequence[Row]) -> dict[str, str]:
    """The keys that vary, each with the last part of it where that tells them apart.

    Args:
        rows: The trials.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    last = [key.rpartition(".")[2] for key in keys]
    return {key: short if last.count(short) == 1 else key for key, short in zip(keys, last, strict=True)}


def command_again(row: Row) -> str:
    """The command that runs a trial again, here, as a run of its own."""
    try:
        overrides = json.loads((row.trial.folder / "lock.json").read_bytes())["overrides"]
    except (OSError, ValueError, KeyError):
        return f"lightrail jobs {row.trial.folder}"
    kept = [each for each in overrides if not each.lstrip("+").startswith(_OF_THE_SWEEP)]
    return shlex.join(["train", *(each.removeprefix("++") for each in kept)])


def _state(row: Row) -> str:
    reason = short_reason(row.state.reason)
    reason = reason if len(reason) <= _REASON_LENGTH else f"{reason[: _REASON_LENGTH - 1]}…"
    return f"{row.status}: {reason}" if reason else row.status


def _cell(value: Any) -> str:
    return number(value) if isinstance(value, int | float) else "-"


def _epsilon(summary: Mapping[str, Any]) -> str:
    from lightrail.report.privacy import figure

    spent = summary.get("privacy") or {}
    if not spent:
        return "-"
    return figure(spent["epsilon"]) if spent["private"] else "not private"


def _metrics(rows: Sequence[Row], goal: Goal) -> list[str]:
    names = sorted({name for row in rows for name in row.summary.get("metrics") or ()})
    tests = [name for name in names if name.startswith("test")]
    chosen = tests or [name for name in names if name.startswith("val")]
    return [name for name in chosen if name != goal.metric][:_METRICS_AT_MOST]


def _aligned(lines: Sequence[Sequence[str]], bold: Sequence[bool]) -> str:
    is_live = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    room = shutil.get_terminal_size((120, 24)).columns if sys.stdout.isatty() else 10_000
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    shown = []
    for index, (line, is_bold) in enumerate(zip(lines, bold, strict=True)):
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        text = text if len(text) <= room else f"{text[: room - 1]}…"
        style = "\x1b[1;32m" if is_bold else "\x1b[1m" if index == 0 else ""
        shown.append(f"{style}{text}\x1b[0m" if is_live and style else text)
    return "\n".join(shown)
