"""``train -m``: one job after another, each in a process of its own.

Process groups, CUDA contexts, loggers and seeds leak from job to job within one process; a fresh one leaks nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["run_sweep"]

# Where a job writes its summary's path, for the table of the sweep.
OUTCOME_VARIABLE = "LIGHTRAIL_OUTCOME"


def run_sweep(overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> int:
    """Runs every combination that the overrides spell, and prints a table.

    Args:
        overrides: As typed, with sweeps such as ``seed=1,2``.
        config_dirs: Folders of the user's own configuration.

    Returns:
        0 where every job ended well, 1 otherwise.
    """
    from lightrail.configuration import compose, sweep

    jobs = sweep(list(overrides), config_dirs=config_dirs)
    for job in jobs:
        # A typo in one job is told before the first is run.
        compose(job, config_dirs=config_dirs)
    varying = _varying(jobs)
    rows: list[tuple[list[str], int, dict[str, Any]]] = []
    for number, job in enumerate(jobs, 1):
        print(f"job {number} of {len(jobs)}: {' '.join(_only(job, varying))}", file=sys.stderr, flush=True)
        status, summary = _run_job(job, config_dirs)
        rows.append((_only(job, varying), status, summary))
        if status in (130, 143):
            break
    _print_table(rows, len(jobs))
    if any("privacy" in summary for _, _, summary in rows):
        from lightrail.privacy.trials import spent_together

        print("\n" + "\n".join(spent_together([summary for _, _, summary in rows])))
    return 0 if len(rows) == len(jobs) and all(status == 0 for _, status, _ in rows) else 1


def _run_job(job: Sequence[str], config_dirs: Sequence[str]) -> tuple[int, dict[str, Any]]:
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        outcome = Path(scratch) / "outcome.json"
        command = [sys.executable, "-m", "lightrail.train"]
        for folder in config_dirs:
            command += ["--config-dir", str(folder)]
        environment = {**os.environ, OUTCOME_VARIABLE: str(outcome)}
        environment.pop("LIGHTRAIL_RUN_FOLDER", None)
        try:
            status = subprocess.run([*command, *job], env=environment, check=False).returncode
        except KeyboardInterrupt:
            status = 130
        summary = json.loads(outcome.read_text()) if outcome.exists() else {}
    return status, summary


def _varying(jobs: Sequence[Sequence[str]]) -> set[str]:
    values: dict[str, set[str]] = {}
    for job in jobs:
        for override in job:
            values.setdefault(override.partition("=")[0], set()).add(override)
    return {key for key, seen in values.items() if len(seen) > 1}


def _only(job: Sequence[str], keys: set[str]) -> list[str]:
    return [override.lstrip("+") for override in job if override.partition("=")[0] in keys]


def _print_table(rows: Sequence[tuple[list[str], int, dict[str, Any]]], planned: int) -> None:
    columns = _metric_columns([summary for _, _, summary in rows])
    is_private = any("privacy" in summary for _, _, summary in rows)
    header = ["job", *columns, *(["epsilon"] if is_private else []), "run folder"]
    table = [
        [
            " ".join(words) or "(the default)",
            *(f"{summary['metrics'][c]:.4f}" if c in summary.get("metrics", {}) else "-" for c in columns),
            *([_epsilon(summary)] if is_private else []),
            summary.get("folder", f"failed with status {status}"),
        ]
        for words, status, summary in rows
    ]
    widths = [max(len(line[i]) for line in [header, *table]) for i in range(len(header))]
    for line in [header, *table]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if len(rows) < planned:
        print(f"stopped: {planned - len(rows)} of {planned} jobs were not started")


def _epsilon(summary: Mapping[str, Any]) -> str:
    from lightrail.report.privacy import figure

    spent = summary.get("privacy") or {}
    if not spent:
        return "-"
    return figure(spent["epsilon"]) if spent["private"] else "not private"


def _metric_columns(summaries: Sequence[dict[str, Any]]) -> list[str]:
    names = sorted({name for summary in summaries for name in summary.get("metrics", {})})
    tests = [name for name in names if name.startswith("test")]
    return (tests or [name for name in names if name.startswith("val")])[:4]
