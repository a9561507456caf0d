"""The supervisor of a job: ``python -m lightrail.launch.node FOLDER``, on the machine that carries it out.

It costs no torch. It makes sure that an order is carried out by one at a time and not again after its end, hands
signals on to the run, starts a run again that died without a word, and writes down how it ended.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightrail.errors import LOST_RANK

if TYPE_CHECKING:
    from lightrail.launch.job import JobState

__all__ = ["Supervisor", "is_held", "main", "progress_of", "reason_of", "signals_held_back"]

HELD = 75  # the exit status of one that found the order in other hands
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Supervisor:
    """Carries out the order in a run folder.

    Args:
        folder: The run folder.
        restarts: How often a run that died without making progress is started again.
    """

    def __init__(self, folder: Path, restarts: int = 2) -> None:
        from lightrail.launch.order import read_order

        self.order = read_order(folder)
        self.folder = self.order.folder
        self.restarts = restarts
        self.asked_to_stop: int | None = None
        self.fruitless = 0
        self._child: subprocess.Popen[bytes] | None = None

    def carry_out(self) -> int:
        """Runs it to its end.

        Returns:
            0 where it finished, now or before; 75 where somebody else is at it; else the status of the run.
        """
        with open(self.order.workspace / "lock", "a") as lock:
            if not self._acquire(lock.fileno()):
                print(f"{self.folder} is being carried out already", file=sys.stderr)
                return HELD
            former = self._former_outcome()
            if former is not None:
                print(f"{self.folder} has {former.phase} already", file=sys.stderr)
                return 0 if former.phase == "finished" else 1
            for number in PASSED_ON:
                signal.signal(number, self._pass_on)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
            return self._run_until_over(lock.fileno())

    def _acquire(self, lock: int) -> bool:
        # Whoever asks whether somebody holds it takes it for an instant.
        return any(_taken(lock) or time.sleep(0.1) for _ in range(10))

    def _former_outcome(self) -> JobState | None:
        """How it ended before, where it is not to go on."""
        from lightrail.launch.job import outcome_of

        return outcome_of(self.folder)

    def _run_until_over(self, lock: int) -> int:
        while True:
            before = progress_of(self.folder)
            status = self._start(lock)
            self._child = None
            if (status >= 0 and status != LOST_RANK) or self.asked_to_stop is not None:
                return self._ended(status)
            self.fruitless = 0 if progress_of(self.folder) != before else self.fruitless + 1
            death = self._death(status)
            if self.fruitless > self.restarts:
                return self._ended(status, f"{death}, {self.fruitless} times in a row without getting on")
            print(f"{death}; the run goes on from its last checkpoint", file=sys.stderr, flush=True)

    def _death(self, status: int) -> str:
        return "a rank was lost" if status == LOST_RANK else f"killed by {signal.Signals(-status).name}"

    def _start(self, lock: int) -> int:
        """One start of the run: 0, its exit status, or -N where signal N killed it."""
        self._note_start()
        # The lock is the run's too, so that it holds should the supervisor be killed.
        self._child = subprocess.Popen(self.order.rank_command, cwd=self.order.directory, pass_fds=(lock,))
        if self.asked_to_stop is not None:
            self._child.send_signal(signal.SIGTERM)
        return self._child.wait()

    def _note_start(self) -> None:
        entry = {"time": time.time(), "host": socket.gethostname(), "process": os.getpid()}
        with open(self.order.workspace / "starts.jsonl", "a") as starts:
            starts.write(json.dumps(entry) + "\n")

    def _pass_on(self, number: int, _frame: Any) -> None:
        self.asked_to_stop = number
        if self._child is not None:
            self._child.send_signal(signal.SIGTERM)

    def _ended(self, status: int, reason: str = "") -> int:
        from lightrail.launch.job import JobState, write_outcome

        stopped = self.asked_to_stop is not None and status != 0
        phase = "finished" if status == 0 else "stopped" if stopped else "failed"
        write_outcome(self.folder, JobState(phase, reason or reason_of(self.folder, status)), status=status)
        return status if status >= 0 else 128 - status


@contextmanager
def signals_held_back() -> Iterator[None]:
    """A process that is started inside gets signals when it can answer them; until then one would kill it."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_held(folder: Path) -> bool:
    """Whether a process of this machine, or of one that shares the file system's locks, carries the order out."""
    try:
        with open(folder / "launch" / "lock", "a") as lock:
            return not _taken(lock.fileno())
    except OSError:
        return False


def progress_of(folder: Path) -> object:
    """Changes whenever the run saves."""
    try:
        status = (folder / "checkpoints" / "last.ckpt").stat()
        return [status.st_mtime_ns, status.st_ino]
    except OSError:
        return None


def reason_of(folder: Path, status: int) -> str:
    """The error that the run wrote down, else what its status says."""
    if status == 0:
        return ""
    try:
        return (folder / "launch" / "error.txt").read_text().strip()
    except OSError:
        if status < 0:
            return f"killed by {signal.Signals(-status).name}"
        return (
            f"stopped by {signal.Signals(status - 128).name}" if status - 128 in PASSED_ON else f"exit status {status}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Carries out the order in the folder that is named."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m lightrail.launch.node")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--restarts", type=int, default=2)
    options = parser.parse_args(arguments)
    from lightrail.command import reporting_errors

    with reporting_errors() as outcome:
        outcome.status = Supervisor(options.folder, options.restarts).carry_out()
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
