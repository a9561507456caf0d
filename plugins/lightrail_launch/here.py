"""On this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import ClassVar

from lightrail import Launch
from lightrail.launch import Job, JobState, Order
from lightrail.launch.liveness import birth_of, is_alive
from lightrail.launch.node import is_held, signals_held_back
from lightrail_launch.share import share_of_machine

__all__ = ["Here"]


class Here(Launch):
    """Carries runs out on this machine: a single one in the very process, each of a sweep in a process of its own.

    A process of its own, since process groups, CUDA contexts, loggers and seeds leak from run to run within one. The
    jobs of a sweep go on when whoever started them is gone. Where several run at a time, each gets its part of the
    machine: graphics cards that no other of them uses, as long as there are any, and threads so that together they have
    as many as there are cores (``CUDA_VISIBLE_DEVICES`` bounds the cards; ``OMP_NUM_THREADS``, where set, is kept).

    Args:
        parallel: Jobs of a sweep at a time, at least 1.
        restarts: How often a job that died without making progress is started again, at least 0.
    """

    in_this_process: ClassVar[bool] = True

    def __init__(self, *, parallel: int = 1, restarts: int = 2) -> None:
        super().__init__(parallel=parallel, restarts=restarts)
        # Kept so that those that end are reaped as long as this process lives.
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, order: Order) -> Job:
        """Starts the order's supervisor in a session of its own; what it prints goes to ``launch/output.log``."""
        self._started = [process for process in self._started if process.poll() is None]
        share = share_of_machine(order, self.parallel or 1)
        with open(order.workspace / "output.log", "ab") as output, signals_held_back():
            process = subprocess.Popen(
                [*order.command, "--restarts", str(self.restarts)],
                cwd=order.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **share},
            )
        self._started.append(process)
        known = {
            "host": socket.gethostname(),
            "born": birth_of(process.pid),
            "log": str(order.workspace / "output.log"),
        }
        return self.job(order, str(process.pid), **known, share=share)

    def state(self, job: Job) -> JobState:
        """Running while its supervisor, or the run that survived it, lives."""
        # Asked in this order: who asks whether the lock is held takes it for a moment, which must not be in the way of
        # a supervisor that is about to begin.
        if self._lives(job) or is_held(job.folder):
            return JobState("running")
        where = "" if job.known["host"] == socket.gethostname() else f" of {job.known['host']}"
        return JobState("lost", f"process {job.number}{where} is gone and left no word")

    def cancel(self, job: Job) -> None:
        """Signals the supervisor, which signals the run."""
        if self._lives(job):
            os.kill(int(job.number), signal.SIGTERM)
        elif (process := _holder(job.folder)) is not None:
            os.kill(process, signal.SIGTERM)

    def _lives(self, job: Job) -> bool:
        return job.known["host"] == socket.gethostname() and is_alive(int(job.number), job.known["born"])


def _holder(folder: Path) -> int | None:
    """The process that carries the order out though another one was asked to; ``None`` where there is none here."""
    try:
        last = json.loads((folder / "launch" / "starts.jsonl").read_text().splitlines()[-1])
    except (OSError, IndexError):
        return None
    is_here = last["host"] == socket.gethostname() and birth_of(last["process"]) is not None
    return last["process"] if is_here and is_held(folder) else None
