"""``lightrail sweep``: what a sweep came to, or how it fares."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["main"]


def main(arguments: Sequence[str]) -> int:
    """Prints the table of a sweep and writes its report.

    Args:
        arguments: The words after ``lightrail sweep``.
    """
    from lightrail.sweep.ledger import find_sweep
    from lightrail.sweep.results import rows_of

    options = _parser().parse_args(list(arguments))
    ledger = find_sweep(options.sweep, Path(options.root))
    rows = rows_of(ledger)
    if options.json:
        print(json.dumps(_object(ledger, rows), indent=2))
        return 0
    from lightrail.sweep.report import write_sweep_report
    from lightrail.sweep.table import ending

    print(f"{ledger.folder}\n{ledger.content.get('command', '')}\n")
    print(ending(ledger, rows))
    print(f"\n{write_sweep_report(ledger, rows)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightrail sweep",
        description="The trials of a sweep, the best first, with the command that runs it again; mean ± sd over seeds; "
        "and report.html in its folder, with every trial across the keys that vary and how much each key mattered.",
    )
    parser.add_argument("sweep", nargs="?", default="latest", metavar="FOLDER", help="the sweep's folder, or latest")
    parser.add_argument("--root", default="runs", metavar="FOLDER", help="where run folders are (default: runs)")
    parser.add_argument("--json", action="store_true", help="for programs; writes no report")
    return parser


def _object(ledger: Any, rows: Sequence[Any]) -> dict[str, Any]:
    from lightrail.sweep.importance import importance_of
    from lightrail.sweep.method import Goal
    from lightrail.sweep.results import best_of, groups_over_seeds, sorted_rows
    from lightrail.sweep.table import command_again

    goal = Goal(**ledger.content["goal"])
    best = best_of(rows, goal)
    importance = importance_of([row for row in rows if row.value is not None])
    trials = [
        {
            "number": row.trial.number,
            "values": row.values,
            "phase": row.state.phase,
            "reason": row.state.reason,
            "status": row.status,
            "value": row.value,
            "metrics": {key: _finite(value) for key, value in (row.summary.get("metrics") or {}).items()},
            "folder": str(row.trial.folder),
        }
        for row in sorted_rows(rows, goal)
    ]
    return {
        "folder": str(ledger.folder),
        "planned": ledger.planned,
        "goal": ledger.content["goal"],
        "trials": trials,
        "best": None if best is None else {"number": best.trial.number, "command": command_again(best)},
        "over_seeds": [
            {"values": group.values, "count": group.count, "mean": group.mean, "deviation": _finite(group.deviation)}
            for group in groups_over_seeds(rows, goal)
        ],
        "importance": None
        if importance is None
        else {"shares": dict(zip(importance.keys, importance.shares, strict=True)), "how": importance.how},
    }


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
