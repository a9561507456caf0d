"""On this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

from lightrail import Launch
from lightrail.launch import Job, JobState, Order
from lightrail.launch.node import is_held

__all__ = ["Here"]


class Here(Launch):
    """Carries runs out on this machine: a single one in the very process, each of a sweep in a process of its own.

    A process of its own, since process groups, CUDA contexts, loggers and seeds leak from run to run within one. The
    jobs of a sweep go on when whoever started them is gone.

    Args:
        parallel: Jobs of a sweep at a time, at least 1.
        restarts: How often a job that died without making progress is started again, at least 0.
    """

    in_this_process: ClassVar[bool] = True

    def __init__(self, *, parallel: int = 1, restarts: int = 2) -> None:
        super().__init__(parallel=parallel, restarts=restarts)

    def start(self, order: Order) -> Job:
        """Starts the order's supervisor in a session of its own; what it prints goes to ``launch/output.log``."""
        with open(order.workspace / "output.log", "ab") as output:
            process = subprocess.Popen(
                [*order.command, "--restarts", str(self.restarts)],
                cwd=order.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self.job(order, str(process.pid), host=socket.gethostname(), born=_born(process.pid))

    def state(self, job: Job) -> JobState:
        """Running while its supervisor, or the run that survived it, lives."""
        if is_held(job.folder) or self._lives(job):
            return JobState("running")
        where = "" if job.known["host"] == socket.gethostname() else f" of {job.known['host']}"
        return JobState("lost", f"process {job.number}{where} is gone and left no word")

    def cancel(self, job: Job) -> None:
        """Signals the supervisor, which signals the run."""
        if self._lives(job):
            os.kill(int(job.number), signal.SIGTERM)

    def _lives(self, job: Job) -> bool:
        born = _born(int(job.number))
        return job.known["host"] == socket.gethostname() and born is not None and born == job.known["born"]


def _born(process: int) -> Any:
    """When a process was started, which tells it from a later one of the same number; ``None`` where it is gone."""
    if sys.platform != "linux":
        try:
            os.kill(process, 0)
        except OSError:
            return None
        return 0
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])
