"""``lightrail jobs``: the runs that a launch was handed, and how they fare."""

from __future__ import annotations

import argparse
import codecs
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from lightrail.errors import ConfigurationError, UserError, closest
from lightrail.launch.job import Job, JobState, jobs_under

__all__ = ["main"]

_COLOURS = {"finished": "32", "running": "36", "failed": "31", "lost": "31", "stopped": "33"}
_LOOK, _ASK = 0.2, 2.0  # seconds between looks at the log, and between questions to the launch


def main(arguments: Sequence[str]) -> int:
    """Lists jobs, shows one, follows or cancels it.

    Args:
        arguments: The words after ``lightrail jobs``.

    Returns:
        0; with ``--follow`` 1 where the job did not finish.
    """
    options = _parser().parse_args(list(arguments))
    found = jobs_under(Path(options.root))
    if options.job is None:
        if options.follow or options.cancel:
            raise ConfigurationError(
                "no job is named",
                found="--follow" if options.follow else "--cancel",
                allowed="lightrail jobs JOB --follow, lightrail jobs JOB --cancel",
                remedy="Name the job by its number or its folder; `lightrail jobs` lists them.",
            )
        states = [(job, _state(job)) for job in found]
        print(json.dumps([_object(*each) for each in states], indent=2) if options.json else _table(states))
        return 0
    job = _named(options.job, found, options.root)
    if options.cancel:
        return _cancel(job)
    if options.follow:
        return _follow(job)
    state = _state(job)
    print(json.dumps(_object(job, state), indent=2) if options.json else _card(job, state))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightrail jobs",
        description="The runs that `train launch=…` and `train -m` handed over: where, and how they fare.",
    )
    parser.add_argument("job", nargs="?", metavar="JOB", help="show one: its number, or its run folder")
    parser.add_argument("--root", default="runs", metavar="FOLDER", help="where run folders are (default: runs)")
    shown_as = parser.add_mutually_exclusive_group()
    shown_as.add_argument("--follow", action="store_true", help="print what the job prints until it ends")
    shown_as.add_argument("--cancel", action="store_true", help="ask it to save and stop")
    shown_as.add_argument("--json", action="store_true", help="for programs")
    return parser


def _named(word: str, found: Sequence[Job], root: str) -> Job:
    """The job of a number or a folder; the newest where a number was given to several."""
    for job in reversed(found):
        if job.number == word:
            return job
    job = Job.of(Path(word).resolve()) if Path(word).is_dir() else None
    if job is not None:
        return job
    numbers = [job.number for job in found]
    raise ConfigurationError(
        f"there is no job '{word}'",
        found=f"{len(found)} jobs under {root}" + (", that folder was handed to nobody" if Path(word).is_dir() else ""),
        allowed=", ".join(numbers[-10:]) or "the number of a job, or its run folder",
        remedy=f"{closest(word, numbers)}`lightrail jobs` lists them; --root FOLDER says where runs are.",
    )


def _state(job: Job) -> JobState:
    """How it fares; one whose launch cannot be asked is still listed."""
    try:
        return job.state()
    except UserError as error:
        return JobState("unknown", error.what)


def _object(job: Job, state: JobState) -> dict[str, Any]:
    return {
        "launch": job.launch,
        "number": job.number,
        "phase": state.phase,
        "reason": state.reason,
        "submitted": job.submitted,
        "folder": str(job.folder),
        "log": str(_log(job)),
        "options": dict(job.options),
        "known": dict(job.known),
    }


def _log(job: Job) -> Path:
    return Path(job.known.get("log") or job.folder / "launch" / "output.log")


def _table(states: Sequence[tuple[Job, JobState]]) -> str:
    from lightrail.sweep.results import short_reason

    if not states:
        return "no run under this folder was handed to a launch; --root FOLDER says where runs are"
    header = ("launch", "job", "phase", "since", "folder", "reason")
    rows = [
        (job.launch, job.number, state.phase, _since(job.submitted), _shown(job.folder), short_reason(state.reason))
        for job, state in states
    ]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    room = shutil.get_terminal_size((120, 24)).columns if sys.stdout.isatty() else 10_000
    lines = []
    for row in (header, *rows):
        text = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        text = text if len(text) <= room else f"{text[: room - 1]}…"
        start = widths[0] + widths[1] + 4
        phase = text[start : start + len(row[2])]
        lines.append(text[:start] + _styled(phase, _COLOURS.get(phase, "")) + text[start + len(phase) :])
    return "\n".join([_styled(lines[0], "1"), *lines[1:]])


def _styled(text: str, colour: str) -> str:
    if not colour or not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{colour}m{text}\x1b[0m"


def _since(moment: float) -> str:
    return datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M:%S")


def _shown(folder: Path) -> str:
    """As short as it can be typed from here."""
    here = Path.cwd()
    return str(folder.relative_to(here)) if folder.is_relative_to(here) else str(folder)


def _card(job: Job, state: JobState) -> str:
    lines = [
        f"{job.launch} job {job.number}  {_styled(state.phase, _COLOURS.get(state.phase, ''))}",
        f"  folder     {job.folder}",
        f"  submitted  {_since(job.submitted)}",
        f"  log        {_log(job)}",
    ]
    starts = _starts(job.folder)
    if starts:
        last = datetime.fromtimestamp(starts[-1]["time"]).strftime("%Y-%m-%d %H:%M:%S")
        lines.append(f"  started    {len(starts)} {'time' if len(starts) == 1 else 'times'}, last {last} "
                     f"on {starts[-1]['host']}")  # fmt: skip
    if status := _summary(job.folder).get("status"):
        lines.append(f"  run        {status} after {_summary(job.folder).get('steps', '?')} steps")
    if state.reason:
        lines += ["", *(f"  {line}" for line in state.reason.splitlines())]
    return "\n".join(lines)


def _starts(folder: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in (folder / "launch" / "starts.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return []


def _summary(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "summary.json").read_bytes())
    except (OSError, ValueError):
        return {}


def _cancel(job: Job) -> int:
    from lightrail.launch.choice import launch_of

    state = job.state()
    if state.is_over:
        print(f"{job.launch} job {job.number} has {state.phase} already")
        return 0
    launch_of(job).cancel(job)
    print(f"{job.launch} job {job.number} was asked to stop; it saves where it can, and goes on with\n"
          f"train run.resume={_shown(job.folder)}")  # fmt: skip
    return 0


def _follow(job: Job) -> int:
    """Prints the log as it grows; leaving it, by Ctrl-C, leaves the job alone."""
    log: BinaryIO | None = None
    text = codecs.getincrementaldecoder("utf-8")(errors="replace")
    asked, state, waits = 0.0, JobState("pending"), ""
    while True:
        # Asked before the last look at the log: whatever was printed until its end is then shown.
        if time.monotonic() - asked > _ASK or job.outcome() is not None:
            asked, state = time.monotonic(), job.state()
        if log is None and _log(job).exists():
            log = open(_log(job), "rb")  # noqa: SIM115  read until the job ends
        shown = _grown(log, text)
        if state.is_over and not shown:
            break
        if state.phase == "pending" and waits != state.reason:
            waits = state.reason
            print(f"pending: {waits}", file=sys.stderr, flush=True)
        if not shown:
            time.sleep(_LOOK)
    print(f"{job.launch} job {job.number} {state.phase}" + (f": {state.reason}" if state.reason else ""))
    return 0 if state.phase == "finished" else 1


def _grown(log: BinaryIO | None, text: codecs.IncrementalDecoder) -> bool:
    """Prints what was added to the log; whether anything was."""
    added = b"" if log is None else log.read(1 << 16)
    if added:
        sys.stdout.write(text.decode(added))
        sys.stdout.flush()
    return bool(added)
