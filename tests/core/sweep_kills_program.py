"""A sweep of tiny jobs whose controller is killed again and again; prints how often, and how each job fared.

Usage: sweep_kills_program.py FOLDER JOBS KILLS SEED
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from lightrail import Launch
from lightrail.launch import Job, JobState, Order, read_order
from lightrail.launch.job import outcome_of
from lightrail.launch.node import Supervisor, is_held
from lightrail.sweep.control import Controller
from lightrail.sweep.ledger import Ledger


@dataclass(frozen=True)
class Tiny(Order):
    @property
    def rank_command(self) -> list[str]:
        return ["/bin/sh", "-c", f"echo ran >> '{self.folder}/ran'; sleep 0.0{int(self.folder.name) % 6}"]


class Forked(Launch):
    """The platform's own supervisor around a job that is nothing, in a fork: a start costs milliseconds."""

    in_this_process = True

    def start(self, order: Order) -> Job:
        process = os.fork()
        if process == 0:
            os.setsid()
            os.closerange(3, 64)
            supervisor = Supervisor(order.folder)
            supervisor.order = Tiny(order.folder, {"directory": "/"}, "")
            os._exit(supervisor.carry_out())
        return self.job(order, str(process), host=socket.gethostname())

    def state(self, job: Job) -> JobState:
        return JobState("running") if _lives(int(job.number)) or is_held(job.folder) else JobState("lost", "is gone")

    def cancel(self, job: Job) -> None:
        os.kill(int(job.number), signal.SIGTERM)


class Silent:
    def over(self, trial: object, state: JobState) -> None: ...
    def standing(self, over: int, running: int, planned: int) -> None: ...
    def said(self, sentence: str) -> None: ...


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def written(folder: Path, jobs: int) -> Ledger:
    for number in range(jobs):
        place = folder / "jobs" / str(number)
        (place / "launch").mkdir(parents=True)
        (place / "launch" / "order.json").write_text("{}")
        (place / "trial.json").write_text(json.dumps({"number": number, "values": {"seed": str(number)}}))
    return Ledger(folder).write(planned=jobs, goal={"metric": "val_loss", "mode": "min"})


def controller(ledger: Ledger) -> int:
    """A new process that carries the sweep on."""
    process = os.fork()
    if process == 0:
        with ledger.held():
            os._exit(Controller(ledger, Forked(parallel=4), Silent()).run())
    return process


def main(folder: Path, jobs: int, kills: int, seed: int) -> None:
    draw = random.Random(seed)
    ledger = written(folder, jobs)
    killed = 0
    while killed < kills:
        process = controller(ledger)
        time.sleep(draw.uniform(0.01, 0.12))
        os.kill(process, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(process, 0)[1])
        if all(outcome_of(trial.folder) for trial in ledger.trials()):
            break
    over = sum(outcome_of(trial.folder) is not None for trial in ledger.trials())
    status = os.waitstatus_to_exitcode(os.waitpid(controller(ledger), 0)[1])
    folders = [folder / "jobs" / str(number) for number in range(jobs)]
    print(json.dumps({
        "killed": killed,
        "over_then": over,
        "status": status,
        "phases": [getattr(outcome_of(each), "phase", None) for each in folders],
        "starts": [len((each / "launch" / "starts.jsonl").read_text().splitlines()) for each in folders],
        "runs": [len((each / "ran").read_text().splitlines()) for each in folders],
        "orders": [read_order(each).folder.name for each in folders],
    }))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
