"""Jobs of a real SLURM that are preempted, killed, drained, failed and timed out: each ends as an undisturbed run.

All are under way at once, each on a node of its own, since most of their time is waiting for SLURM.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from slurm_runs import RUN, Submitted, assert_same_end, slurm, train, wait_until

from lightrail.launch import JobState
from lightrail_launch.slurm_queries import fields_of


def preempted(run: Submitted) -> None:
    """By another job, three times; SLURM says so sixty seconds before it takes the node away."""
    for start in (1, 2, 3):
        run.under_way(start)
        urgent = ["sbatch", "--parsable", "--partition=urgent", f"--nodelist={run.node}", "--exclusive"]
        number = slurm(*urgent, "--output=/dev/null", "--wrap=true").strip()
        wait_until(lambda: "COMPLETED" in slurm("scontrol", "show", "job", number), "the urgent job")  # noqa: B023
    run.under_way(4)


def killed(run: Submitted) -> None:
    """The process of the run alone, without a word."""
    os.kill(run.under_way(1), signal.SIGKILL)
    run.under_way(2)


def drained(run: Submitted) -> None:
    """The node is to be mended: nothing new starts there, and its administrator sends the job back into the queue."""
    run.under_way(1)
    slurm("scontrol", "update", f"NodeName={run.node}", "State=DRAIN", "Reason=fan")
    slurm("scontrol", "requeue", run.number)
    wait_until(lambda: run.job.state().phase == "pending", "the job waits")
    slurm("scontrol", "update", f"NodeName={run.node}", "State=RESUME")
    run.under_way(2)


def failed(run: Submitted) -> None:
    """The node loses its power, and comes back."""
    run.under_way(1)
    configuration = Path(os.environ["SLURM_CONF"])
    daemon = int(configuration.with_name(f"slurmd_{run.node}.pid").read_text())
    for process in (daemon, *run.keepers(), *map(int, run.left_behind())):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    slurm("scontrol", "update", f"NodeName={run.node}", "State=DOWN", "Reason=power")
    wait_until(lambda: run.job.state().phase == "pending", "the job waits")
    slurm("slurmd", "-f", str(configuration), "-N", run.node)
    slurm("scontrol", "update", f"NodeName={run.node}", "State=RESUME")
    run.under_way(2)


def timed_out(run: Submitted) -> None:
    """Its time is nearly over; SLURM, which looks twice a minute, says so before."""
    run.under_way(1)
    hours, minutes, _ = fields_of(slurm("scontrol", "show", "job", run.number))["RunTime"].split(":")
    slurm("scontrol", "update", f"JobId={run.number}", f"TimeLimit={60 * int(hours) + int(minutes) + 2}")
    wait_until(lambda: "Restarts=1" in slurm("scontrol", "show", "job", run.number), "it was queued again")
    slurm("scontrol", "update", f"JobId={run.number}", "TimeLimit=60")
    run.under_way(2)


HOW: dict[Callable[[Submitted], None], list[str]] = {
    preempted: [],
    timed_out: ["launch.time=1:00:00", "launch.grace=100"],
    failed: [],
    drained: [],
    killed: [],
}


@pytest.fixture(scope="module")
def root(slurm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chaos")


@pytest.fixture(scope="module")
def disturbed(root: Path, request: pytest.FixtureRequest) -> Iterator[dict[Any, tuple[Submitted, Future[None]]]]:
    """The runs that are going to be examined, each in the hands of who disturbs it."""
    collected: list[Any] = request.session.items
    wanted = {item.callspec.params["how"] for item in collected if item.name.startswith("test_ends_as")}
    with ThreadPoolExecutor(len(HOW)) as pool:
        started = {}
        for node, (how, options) in enumerate(HOW.items(), 1):
            if how in wanted:
                run = Submitted.of(root, f"node{node}", *options)
                started[how] = (run, pool.submit(how, run))
        yield started


@pytest.fixture(scope="module")
def undisturbed(root: Path, disturbed: object) -> Path:
    (root / "undisturbed.released").touch()
    names = [f"callback.SlowBatches.diary={root}/undisturbed.diary", f"run.root={root}/runs", "run.name=undisturbed"]
    assert train(*RUN, "logger=[csv]", *names) == 0
    return root / "runs" / "undisturbed"


@pytest.mark.parametrize("how", reversed(HOW), ids=lambda how: how.__name__)
def test_ends_as_an_undisturbed_run(how: Any, disturbed: dict[Any, Any], undisturbed: Path) -> None:
    run, end = disturbed[how]
    end.result()
    run.release()
    assert run.ended() == "finished", run.log()
    assert run.job.outcome() == JobState("finished")
    assert_same_end(run.folder, undisturbed)
    assert len(run.wandb_ids()) == 1
    assert run.left_behind() == []
    diary = run.diary()
    again = [
        (before["step"], after["step"]) for before, after in pairwise(diary) if before["process"] != after["process"]
    ]
    # Whoever is told beforehand loses nothing; the others what came after the last of every seven steps.
    most = 7 if how in (killed, failed) else 0
    assert len(again) >= (3 if how is preempted else 1)
    assert all(before - most <= after <= before + 1 for before, after in again), again
    # One after the other, never two at once.
    assert len(run.processes()) == len(again) + 1


def test_a_run_that_dies_again_and_again_fails_with_the_reason(root: Path) -> None:
    run = Submitted.of(
        root, "node6", "logger=[csv]", "callback=[slow_batches.SlowBatches,slow_batches.Dies]", "launch.restarts=1"
    )
    assert run.ended() == "failed"
    assert "SIGKILL, 2 times in a row without getting on" in run.job.state().reason
    assert len(run.processes()) == 2
    assert run.left_behind() == []
