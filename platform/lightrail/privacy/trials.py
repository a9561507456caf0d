"""What several runs spend together of the privacy of the data that they share: a sweep's trials, say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightrail.errors import UserError
from lightrail.privacy.ledger import Ledger, composed
from lightrail.privacy.ledger_file import read_json

__all__ = ["spent_together"]

FILE = "privacy.json"


def spent_together(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the trials of a sweep spend together, in words, for each data set that they were trained on.

    A trial that failed counts with what it had released by then. One without an account of it is named, as nothing is
    known of what it released; so is one that was trained without privacy.

    Args:
        summaries: Of all trials that were started; a summary that is empty is of one that left nothing.

    Returns:
        Lines to show.
    """
    trials: dict[str, list[Mapping[str, Any]]] = {}
    for summary in summaries:
        trials.setdefault(_data_of(summary), []).append(summary)
    lost = trials.pop("", [])
    lines = [_line(data, group) for data, group in trials.items() if any("privacy" in each for each in group)]
    if lost:
        lines.append(f"{_count(len(lost), 'trial')} left no account: whatever was released there is not in this.")
    if lines:
        lines.append(
            "Each trial has read the same records: whatever is chosen among them is promised no more than this."
        )
    return lines


def _line(data: str, summaries: Sequence[Mapping[str, Any]]) -> str:
    from lightrail.report.privacy import CONDITIONAL, spending

    open_ones = sum("privacy" not in each for each in summaries)
    ledgers, unknown = [], 0
    for summary in summaries:
        if summary.get("privacy"):
            try:
                ledgers.append(Ledger.from_dict(read_json(Path(summary["folder"], FILE))))
            except UserError:
                unknown += 1
    start = f"privacy  {_count(len(summaries), 'trial')} on {data} together: "
    if open_ones:
        return f"{start}NOT private: {_count(open_ones, 'trial')} trained without privacy"
    if unknown:
        return f"{start}not known: the account of {_count(unknown, 'trial')} cannot be read"
    if not ledgers:
        return f"{start}nothing was released"
    try:
        total = composed(ledgers)
        epsilon = total.epsilon()
    except UserError as error:
        return f"{start}not known: {error.what}"
    conditions = [line for line in total.assumptions if line.startswith(CONDITIONAL)]
    values = {
        "epsilon": epsilon,
        "delta": total.delta,
        "accountant": total.accountant,
        "noise": 0.0 if any(e.noise == 0 for e in total.events) else None,
        "is_private": total.is_private,
        "assumptions": conditions,
    }
    return start + spending(values)


def _data_of(summary: Mapping[str, Any]) -> str:
    """The name of the data that a trial was trained on; empty where nothing says so."""
    try:
        lock = json.loads(Path(summary["folder"], "lock.json").read_text(encoding="utf-8"))
        return next(str(each["name"]) for each in lock["plugins"] if each["kind"] == "data")
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return ""


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
