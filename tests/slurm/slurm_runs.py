"""Runs under a real SLURM, as the tests disturb and examine them."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightrail.launch import Job
from lightrail.launch.choice import launch_of
from lightrail.run.checkpoint import load_checkpoint
from lightrail.train import main

RUN = [
    "model=mlp",
    "model.dropout=0.2",
    "logger=[csv,wandb]",
    "trainer.max_epochs=3",
    "trainer.accelerator=cpu",
    "trainer.checkpoint_every=7",
    "callback=[slow_batches.SlowBatches]",
]
# A machine that does other things as well.
PATIENCE = 240.0


def train(*overrides: str) -> int:
    """Runs the command in this process, which has imported everything already."""
    return main(list(overrides))


def slurm(*command: str) -> str:
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def wait_until(holds: Callable[[], Any], what: str) -> Any:
    until = time.monotonic() + PATIENCE
    while not (answer := holds()):
        assert time.monotonic() < until, f"never happened: {what}"
        time.sleep(0.1)
    return answer


def _title(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode().replace("\0", " ")
    except OSError:
        return ""


@dataclass
class Submitted:
    """A run in the queue, on a node of its own."""

    folder: Path
    node: str

    @classmethod
    def of(cls, root: Path, node: str, *overrides: str) -> Submitted:
        """Submits a run; its name is that of its node."""
        name = node.replace("[", "").rstrip("]")
        words = [*RUN, f"run.root={root}/runs", f"run.name={name}", f"callback.SlowBatches.diary={root}/{name}.diary"]
        assert train(*words, "launch=slurm", f"launch.extra={{nodelist: '{node}'}}", *overrides) == 0
        return cls(root / "runs" / name, node)

    @property
    def job(self) -> Job:
        job = Job.of(self.folder)
        assert job is not None
        return job

    @property
    def number(self) -> str:
        return self.job.number

    def diary(self) -> list[dict[str, int]]:
        """Every batch that was begun, in order."""
        path = self.folder.parent.parent / f"{self.folder.name}.diary"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def processes(self) -> list[int]:
        """Of every start that came as far as a batch, in order."""
        return list(dict.fromkeys(entry["process"] for entry in self.diary()))

    def under_way(self, starts: int) -> int:
        """Waits until a start is among the slow batches with something saved; which process that is."""

        def process() -> int | None:
            assert self.job.outcome() is None, self.log()
            seen = self.diary()
            own = [entry for entry in seen if entry["process"] == self.processes()[-1]]
            is_slow = bool(own) and own[-1]["step"] >= 15 and len(own) > 2
            return own[-1]["process"] if is_slow and len(self.processes()) == starts else None

        return wait_until(process, f"start {starts} of {self.node} under way; {self.log()}")

    def release(self) -> None:
        (self.folder.parent.parent / f"{self.folder.name}.released").touch()

    def ended(self) -> str:
        """Waits for the end; the phase of it, as the outcome says."""
        state = wait_until(lambda: (state := self.job.state()).is_over and state, f"{self.node} is over; {self.log()}")
        wait_until(lambda: not slurm("squeue", "--noheader", "--jobs", self.number), "SLURM is done with it")
        return state.phase

    def cancel(self) -> None:
        launch_of(self.job).cancel(self.job)

    def log(self) -> str:
        try:
            return (self.folder / "launch" / "output.log").read_text()
        except OSError:
            return "no log"

    def keepers(self) -> list[int]:
        """SLURM's own processes around those of the job."""
        titles = [f"slurmstepd: [{self.number}.{step}" for step in ("batch", "0", "1")]
        found = subprocess.run(["pgrep", "-f", "slurmstepd: "], capture_output=True, text=True, check=False)
        processes = [int(word) for word in found.stdout.split()]
        return [each for each in processes if _title(each).startswith(tuple(titles))]

    def left_behind(self) -> list[str]:
        """Processes of the job that live, files half written."""
        own = f"SLURM_JOB_ID={self.number}\0".encode()
        living = []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            try:
                if own in environment.read_bytes():
                    living.append(environment.parent.name)
            except OSError:
                continue
        return living + [str(path) for path in self.folder.rglob("*.tmp")]

    def wandb_ids(self) -> set[str]:
        return {path.name.rpartition("-")[2] for path in (self.folder / "wandb").glob("offline-run-*")}


def assert_same_end(found: Path, wanted: Path) -> None:
    """Two runs ended with the same weights and the same state, bit for bit, and logged the same."""
    left, right = (load_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (found, wanted))
    assert left["state_dict"].keys() == right["state_dict"].keys()
    for name, weight in left["state_dict"].items():
        assert torch.equal(weight, right["state_dict"][name]), name
    for key in ("optimizer_states", "lr_schedulers", "loops"):
        assert str(left[key]) == str(right[key]), key
    assert (found / "metrics.csv").read_bytes() == (wanted / "metrics.csv").read_bytes()
