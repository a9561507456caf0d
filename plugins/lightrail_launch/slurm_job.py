"""The supervisor of a run under SLURM: ``python -m lightrail_launch.slurm_job FOLDER``, the end of a batch script.

The ranks are tasks of one ``srun``: SLURM announces preemption to those, and to nobody else.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightrail.files import replace_file
from lightrail.launch.job import JobState, clear_outcome
from lightrail.launch.node import HELD, PASSED_ON, Supervisor, progress_of
from lightrail_launch.slurm_queries import SlurmRefusal, ask, shown_job
from lightrail_launch.slurm_task import ENDS, End, ends_in

__all__ = ["CANCELLED", "DEATHS", "SlurmSupervisor", "main"]

CANCELLED = "cancelled"
DEATHS = "deaths.json"
PATIENCE = 120.0


class SlurmSupervisor(Supervisor):
    """Carries out the order in a run folder, as the batch script of a job.

    A run that was asked to stop goes back into the queue, unless its user asked, or SLURM has put it there itself.
    Starts that died without getting on are counted from job to job, so that what is queued again for ever ends.

    Args:
        folder: The run folder.
        restarts: How often a run that died without making progress is started again.
    """

    def __init__(self, folder: Path, restarts: int = 2) -> None:
        super().__init__(folder, restarts)
        self.number = os.environ["SLURM_JOB_ID"]
        self.tasks = int(os.environ["SLURM_NNODES"]) * int(os.environ["SLURM_NTASKS_PER_NODE"])
        self.times_requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self._first: End | None = None
        self._is_out_of_time = False

    def carry_out(self) -> int:
        """Runs it to its end, or puts it back into the queue; see :meth:`Supervisor.carry_out`."""
        status = super().carry_out()
        if status == HELD:
            # Whoever is at it may yet die: then this job goes on.
            self._give_back()
        return status

    def _acquire(self, lock: int) -> bool:
        until = time.monotonic() + PATIENCE
        while not super()._acquire(lock):
            if time.monotonic() > until:
                return False
            time.sleep(0.5)
        return True

    def _former_outcome(self) -> JobState | None:
        former = super()._former_outcome()
        if former is not None and former.phase == "stopped" and self.times_requeued and not self._is_cancelled():
            clear_outcome(self.folder)
            return None
        return former

    def _is_cancelled(self) -> bool:
        return (self.order.workspace / CANCELLED).exists()

    def _run_until_over(self, lock: int) -> int:
        self.fruitless = self._deaths_before()
        if self.fruitless > self.restarts:
            reason = f"died {self.fruitless} times in a row without getting on, the last time with its whole job"
            return self._ended(-signal.SIGKILL, reason)
        return super()._run_until_over(lock)

    def _start(self, lock: int) -> int:
        if self.asked_to_stop is not None:
            return 128 + self.asked_to_stop
        self._note_start()
        # Counted before it begins: where all dies at once, nobody is left to count.
        self._keep_deaths(self.fruitless + 1)
        shutil.rmtree(self.order.workspace / ENDS, ignore_errors=True)
        (self.order.workspace / ENDS).mkdir()
        self._child = subprocess.Popen(self._step(), cwd=self.order.directory)
        if self.asked_to_stop is not None:
            self._child.send_signal(signal.SIGUSR1)
        return self._judged(self._child.wait())

    def _step(self) -> list[str]:
        task = [sys.executable, "-m", "lightrail_launch.slurm_task", str(self.folder)]
        processors = os.environ.get("SLURM_CPUS_PER_TASK")
        # Lightning's ranks find each other without MPI; what a step is given of the job has to be said again.
        options = [f"--ntasks={self.tasks}", "--kill-on-bad-exit=1", "--unbuffered", "--mpi=none", "--input=none"]
        return ["srun", *options, *([f"--cpus-per-task={processors}"] if processors else []), *task]

    def _pass_on(self, number: int, _frame: Any) -> None:
        self.asked_to_stop = number
        # Preemption is announced to the ranks; this is the warning that launch.grace asks for.
        self._is_out_of_time = number == signal.SIGUSR1
        if self._child is not None:
            # srun hands this one on; a SIGTERM it would take for itself, and kill the ranks.
            self._child.send_signal(signal.SIGUSR1)

    def _judged(self, status: int) -> int:
        """What the step's end says of the run: 0, an exit status, or -N where signal N killed a rank."""
        ends = ends_in(self.order.workspace)
        # Where a node fails, srun may end with 0: only the ranks' own word counts.
        if status == 0 and len(ends) == self.tasks and not any(end.status for end in ends):
            return 0
        failed = [end for end in ends if end.status != 0]
        self._first = next((end for end in failed if end.was_killed), failed[0] if failed else None)
        asked = -status if status < 0 else status - 128
        if self._first is not None:
            self.asked_to_stop = self.asked_to_stop or self._first.asked
        elif asked in PASSED_ON or self._is_taken_away():
            self.asked_to_stop = self.asked_to_stop or signal.SIGTERM
        return -signal.SIGKILL if self._first is None else self._first.status

    def _is_taken_away(self) -> bool:
        """Whether SLURM has ended this job, so that nothing can be started in it again."""
        try:
            job = shown_job(self.number, PATIENCE) or {}
        except SlurmRefusal:
            return False
        return job.get("JobState") != "RUNNING" or int(job.get("Restarts", "0")) > self.times_requeued

    def _death(self, status: int) -> str:
        if self._first is None:
            return "the step ended, and no rank left a word"
        return f"rank {self._first.rank} on {self._first.host}: {super()._death(status)}"

    def _ended(self, status: int, reason: str = "") -> int:
        if status == 0 or self.asked_to_stop is None:
            return super()._ended(status, reason)
        if self._is_cancelled():
            return super()._ended(status, "cancelled")
        if self._has_got_on():
            self.fruitless = 0
        elif self._is_out_of_time:
            self.fruitless += 1
        self._keep_deaths(self.fruitless)
        if self.fruitless > self.restarts:
            self.asked_to_stop = None
            times = f"{self.fruitless} times in a row"
            return super()._ended(status, f"its time was over {times} before it had got on; raise launch.time")
        refusal = self._give_back()
        return super()._ended(status, refusal) if refusal else 128 + self.asked_to_stop

    def _give_back(self) -> str:
        """Puts the job back into the queue.

        Returns:
            Why that was refused; nothing where it is in the queue again.
        """
        try:
            job = shown_job(self.number, PATIENCE) or {}
            if int(job.get("Restarts", "0")) > self.times_requeued:
                return ""
            if job.get("JobState") != "RUNNING":
                return "SLURM ended the job: it was cancelled, or its time was over before it had saved"
            ask("scontrol", "requeue", self.number, patience=PATIENCE)
        except SlurmRefusal as refusal:
            return f"it could not be put back into the queue: {refusal}"
        print("saved; the job goes back into the queue", file=sys.stderr, flush=True)
        return ""

    def _has_got_on(self) -> bool:
        return progress_of(self.folder) != self._kept_deaths()["progress"]

    def _deaths_before(self) -> int:
        return 0 if self._has_got_on() else int(self._kept_deaths()["count"])

    def _kept_deaths(self) -> dict[str, Any]:
        """How many starts were in vain, and how far the run was then."""
        try:
            return json.loads((self.order.workspace / DEATHS).read_bytes())
        except OSError:
            return {"progress": None, "count": 0}

    def _keep_deaths(self, count: int) -> None:
        content = {"progress": progress_of(self.folder), "count": count}
        replace_file(self.order.workspace / DEATHS, json.dumps(content).encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """Carries out the order in the folder that is named, as the job that this process is part of."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m lightrail_launch.slurm_job")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--restarts", type=int, default=2)
    options = parser.parse_args(arguments)
    from lightrail.command import reporting_errors

    with reporting_errors() as outcome:
        outcome.status = SlurmSupervisor(options.folder, options.restarts).carry_out()
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
