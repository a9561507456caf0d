"""How long a launch takes to start a run and to start it again, and what two processes do beside one."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from lightrail.bench.table import Table, Tables
from lightrail.errors import PluginError
from lightrail.launch.job import Job

__all__ = ["add_arguments", "measure"]

LAUNCHES = ("here", "torchrun", "slurm", "ray")
_WORK = "lightrail.bench.launch_work"
_MARKS = "marks.txt"
_PATIENCE = 300.0
_COMMON = (
    f"task._target_={_WORK}.Convolutions",
    f"data._target_={_WORK}.Pictures",
    f"callback=[{_WORK}.Marks]",
    "logger=null",
    "optimizer=sgd",
    "schedule=null",
    "trainer.max_epochs=-1",
    "trainer.accelerator=cpu",
)
# Steps of a few milliseconds, so that what is measured is not the work.
_SMALL = ("task.channels=2", "task.pause=0.01", "data.batch_size=4", "data.count=64", "trainer.max_steps=100000000")
_LEFT_OUT = 10  # first steps that are no measure of the others
_LEAST_EFFICIENCY = 0.9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this bench."""
    parser.add_argument("--launches", nargs="*", default=list(LAUNCHES), metavar="NAME", help=" ".join(LAUNCHES))
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="steps of the runs of one and two processes")


def measure(options: argparse.Namespace) -> Tables:
    """Measures every launch that is there, and one process beside two.

    Args:
        options: As :func:`add_arguments` describes, and ``rounds``: how often each is measured, taking turns.
    """
    found = Tables()
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in options.launches}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        for number in range(options.rounds):
            for name in list(taken):
                try:
                    taken[name].append(_launched(name, Path(scratch) / f"{name}{number}"))
                except PluginError as error:
                    found.left_out.append(f"left out: launch={name}: {error.found}")
                    del taken[name]
        found.tables += [_latency(column, taken) for column in _COLUMNS if any(taken.values())]
        found.tables.append(_efficiency(options, Path(scratch)))
    return found


_COLUMNS = {
    "submission": "until the order is written and handed over, and the terminal is free; new process each time",
    "start": "from typing the command until the first step of the run is done",
    "restart": "from kill -9 of the run until the next step, from its last checkpoint, with nobody's help",
}


def _latency(column: str, taken: Mapping[str, Sequence[Mapping[str, float]]]) -> Table:
    table = Table(f"{column} latency", "s ", _COLUMNS[column])
    names = [name for name, rounds in taken.items() if rounds]
    for name in names:
        peer = "here" if name != "here" and "here" in names else None
        table.add(name, [each[column] for each in taken[name]], peer)
    return table


def _launched(name: str, folder: Path) -> dict[str, float]:
    """One run under a launch, from the command to the first step, and from its sudden death to the next."""
    folder.mkdir(parents=True)
    run = folder / "run"
    words = [*_COMMON, *_SMALL, "trainer.checkpoint_every=20", f"launch={name}"]
    began = time.time()
    _run([sys.executable, "-m", _WORK, *words, f"run.root={folder}", "run.name=run"], name)
    handed_over = time.time()
    job = Job.of(run)
    assert job is not None
    try:
        first, process = _waited(lambda: next(iter(_marks(run)), None), job, "its first step")
        _waited((run / "checkpoints" / "last.ckpt").exists, job, "its first checkpoint")
        killed = time.time()
        os.kill(process, signal.SIGKILL)
        again = _waited(lambda: next((mark for mark in _marks(run) if mark[1] != process), None), job, "its restart")
    finally:
        _end(job)
    return {"submission": handed_over - began, "start": first - began, "restart": again[0] - killed}


def _run(command: Sequence[str], name: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode:
        lines = [line for line in finished.stderr.splitlines() if line.strip()]
        raise PluginError(
            f"{name} cannot be measured",
            found="; ".join(line.strip() for line in lines[:2])[:200] or "no reason",
            allowed="a launch that carries out a run on this machine",
            remedy="Start its service, or measure the others with --launches.",
        )


def _marks(run: Path) -> list[tuple[float, int]]:
    try:
        lines = (run / _MARKS).read_text().splitlines()
    except OSError:
        return []
    whole = [line.split() for line in lines if len(line.split()) == 2]
    return [(float(when), int(process)) for when, process in whole]


def _waited(found: Callable[[], Any], job: Job, what: str) -> Any:
    end = time.monotonic() + _PATIENCE
    while not (answer := found()):
        state = job.state()
        if state.is_over or time.monotonic() > end:
            raise PluginError(
                f"launch={job.launch} does not come to {what}",
                found=f"{state.phase}: {state.reason or f'nothing after {_PATIENCE:g} s'}",
                allowed="a launch that carries out a run on this machine",
                remedy="Measure the others with --launches.",
            )
        time.sleep(0.02)
    return answer


def _end(job: Job) -> None:
    from lightrail.launch.choice import launch_of

    if not job.state().is_over:
        launch_of(job).cancel(job)
    end = time.monotonic() + _PATIENCE
    while not job.state().is_over and time.monotonic() < end:
        time.sleep(0.1)


def _efficiency(options: argparse.Namespace, folder: Path) -> Table:
    """Both take turns, so that whatever else the machine does falls on both."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(options.rounds):
        for processes in (1, 2) if number % 2 == 0 else (2, 1):
            rates[processes].append(_steps_per_second(processes, options.steps, folder / f"{processes}_{number}"))
    table = Table(
        "DDP: steps a second, at the same batch a process",
        "/s",
        f"three convolutions of 32 channels, 32 pictures of 32 x 32 a process, one core each, {os.cpu_count()} cores; "
        f"the median step of {options.steps}; a ratio of 1 is twice the work in the same time, "
        f"{_LEAST_EFFICIENCY} was aimed at",
    )
    table.add("one process", rates[1])
    table.add("two processes", rates[2], "one process")
    return table


def _steps_per_second(processes: int, steps: int, folder: Path) -> float:
    words = [*_COMMON, "data.batch_size=32", "launch=here", f"run.root={folder}", "run.name=run"]
    words += [f"trainer.max_steps={steps + _LEFT_OUT}", f"trainer.devices={processes}"]
    words += ["trainer=ddp"] if processes > 1 else []
    _run([sys.executable, "-m", "lightrail.train", *words], f"DDP of {processes}")
    times = [when for when, _ in _marks(folder / "run")][_LEFT_OUT:]
    return 1 / median(after - before for before, after in pairwise(times))
