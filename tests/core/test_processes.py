"""Processes that somebody else starts are one run, and one that is lost is named by the others."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import processes_program
import pytest

from lightrail.errors import ConfigurationError
from lightrail.run.processes import Processes, fitted_trainer, refuse_many, started_processes, take_rank
from lightrail.train import main

HERE = Path(__file__).parent
RUN = [
    *processes_program.RUN,
    "data.processes=2",
]


@pytest.fixture(autouse=True)
def rank_of_these_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test says of its rank is forgotten after it."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 0)


def environment(**variables: str) -> dict[str, str]:
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables}


def mpirun(rank: int) -> dict[str, str]:
    """What Open MPI says to each of two processes on one machine."""
    values = {"RANK": rank, "SIZE": 2, "LOCAL_RANK": rank, "LOCAL_SIZE": 2}
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        # What Lightning's own launcher sets for the processes that it starts.
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2", "NODE_RANK": "0"}, None),
        (mpirun(1), Processes(1, 2, 1, 2, "mpirun")),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
         Processes(3, 4, 1, 2, "mpiexec")),
        # One process a machine, as Kubernetes operators start them.
        ({"RANK": "1", "WORLD_SIZE": "2"}, Processes(1, 2, 0, 1, "torchrun")),
        # A batch script is no step, however many tasks its job has.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, None),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
          "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, Processes(2, 4, 0, 2, "srun")),
        # srun speaks the protocol of MPICH's mpiexec, without saying who shares a machine.
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0", "PMI_RANK": "1",
          "PMI_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"},
         Processes(1, 2, 1, 2, "srun")),
        # torchrun that was started by srun, once a machine: torchrun's word counts.
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x",
          "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Processes(1, 2, 1, 2, "torchrun")),
    ],
)  # fmt: skip
def test_who_this_is_among_those_that_were_started(variables: dict[str, str], expected: Processes | None) -> None:
    assert started_processes(variables) == expected
    take_rank(expected, variables)
    assert started_processes(variables) == expected  # said again in torchrun's words, it is the same


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2"),
        ({**mpirun(1), "OMPI_COMM_WORLD_SIZE": "3"}, "rank 1 of 3, on its machine 1 of 2"),
        # Dealt out to the machines in turn: rank 1 is the first on the second machine.
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, "rank 1 of 4"),
        ({"PMIX_RANK": "0"}, "PMIX_RANK"),
    ],
)
def test_variables_that_cannot_be_are_refused(variables: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        started_processes(variables)
    assert said in refused.value.found


def test_a_trainer_is_fitted_where_it_was_left_open_and_refused_where_it_contradicts() -> None:
    four = Processes(2, 4, 0, 2, "torchrun")
    fitted, notes = fitted_trainer({"devices": 1, "strategy": "auto", "precision": "32-true"}, [], four)
    assert fitted == {"devices": 2, "strategy": "ddp", "num_nodes": 2, "precision": "32-true"}
    assert notes == ["4 processes by torchrun: trainer.devices=2 trainer.strategy=ddp trainer.num_nodes=2"]
    assert fitted_trainer({"devices": [0, 1], "strategy": "fsdp", "num_nodes": 2}, [], four)[1] == []
    for trainer, typed, said in (
        ({"devices": 4}, [], "trainer.devices=4, with 2 processes on each of 2 machines"),
        ({"devices": 1}, ["trainer.devices=1"], "trainer.devices=1"),
        ({"devices": "auto", "num_nodes": 3}, [], "trainer.num_nodes=3"),
        ({"devices": "auto", "strategy": "ddp_spawn"}, [], "trainer.strategy=ddp_spawn"),
    ):
        with pytest.raises(ConfigurationError) as refused:
            fitted_trainer(trainer, typed, four)
        assert refused.value.found.startswith(said)
    # Lightning would start a second process itself, which torchrun knows nothing of.
    with pytest.raises(ConfigurationError, match=r"trainer\.devices contradicts"):
        fitted_trainer({"devices": 2}, [], Processes(0, 1, 0, 1, "torchrun"))


def test_several_processes_do_not_each_start_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_many("train -m")
    for name, value in mpirun(1).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match="each of those started here would do so"):
        refuse_many("train -m")


def test_two_processes_are_one_run_and_one_that_stands_still_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = [sys.executable, str(HERE / "processes_program.py"), str(tmp_path / "runs")]
    ranks = [
        subprocess.Popen(program, cwd=tmp_path, env=environment(**mpirun(rank)), stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        monkeypatch.chdir(tmp_path)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert main([*RUN, "data.processes=1", "run.name=one"]) == 0
        said = ranks[0].communicate(timeout=240)[1]
        assert ranks[1].wait(30) == -signal.SIGKILL  # it was stopped, and did not even outlive the run
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    # The first run: one folder, and the end that one process comes to with the same batches.
    assert sorted(folder.name for folder in (tmp_path / "runs").iterdir()) == ["one", "stopped", "two"]
    one, two = (json.loads((tmp_path / "runs" / name / "summary.json").read_text()) for name in ("one", "two"))
    assert two["metrics"]["train_loss"] == pytest.approx(one["metrics"]["train_loss"], rel=1e-5)
    assert two["metrics"]["val_loss"] == pytest.approx(one["metrics"]["val_loss"], rel=1e-5)
    assert (one["steps"], two["steps"]) == (8, 8)
    assert "2 processes by mpirun: trainer.devices=2 trainer.strategy=ddp" in two["notes"]
    # The second: rank 1 was stopped in it.
    assert ranks[0].returncode == 69, said
    assert "rank 1 is lost" in said
    assert re.search(rf"rank 1 \(process {ranks[1].pid} on {socket.gethostname()}\): silent for \d+ s", said), said
    assert "last seen at step 3, at processes_program.py" in said


def test_a_rank_whose_launcher_is_killed_says_so_and_ends(tmp_path: Path) -> None:
    words = [*processes_program.RUN, "data.processes=1", "run.name=killed", "trainer=ddp", "trainer.devices=2"]
    fault = ["callback=[processes_program.Fault]", "callback.Fault.rank=0"]
    output = tmp_path / "output.txt"
    with open(output, "w") as stream:
        first = subprocess.Popen(
            [sys.executable, "-m", "lightrail.train", *words, "trainer.accelerator=cpu", *fault],
            cwd=tmp_path,
            env=environment(),
            stderr=stream,
            stdout=stream,
            start_new_session=True,
        )
        try:
            assert first.wait(240) == -signal.SIGKILL
            # Its group is empty once the rank that it started has ended as well.
            end = time.monotonic() + 60
            while _is_there(first.pid) and time.monotonic() < end:
                time.sleep(0.2)
            assert not _is_there(first.pid), "rank 1 goes on for ever"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(first.pid, signal.SIGKILL)
    said = output.read_text()
    assert "rank 0 is lost" in said, said
    assert f"process {first.pid} on {socket.gethostname()}" in said
    assert "last seen at step 3" in said


def _is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
