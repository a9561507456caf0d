"""Submitting to a real SLURM: what is refused before anything is written, where jobs run, how they are stopped."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from slurm_runs import RUN, Submitted, slurm, train, wait_until

from lightrail.launch import JobState
from lightrail.run.checkpoint import load_checkpoint


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["launch.nodes=99"], ("too few nodes", "99 nodes", "6 nodes of 4 processors and 0 graphics cards")),
        (["launch.gpus_per_node=2"], ("too few nodes", "2 graphics cards")),
        (["launch.partition=urgnt"], ("no partition 'urgnt'", "normal, urgent", "Did you mean 'urgent'?")),
        (["launch.time=2", "launch.grace=120"], ("nothing before the grace", "120 s", "HH:MM:SS")),
        (["launch.time=soon"], ("no limit that SLURM knows", "time=soon")),
        (["launch.extra={nodelist: moon}"], ("refuses the job: Invalid node name", "nodelist=moon")),
        (["launch.extra={signal: 9}"], ("an option of sbatch that lightrail sets itself: signal",)),
        (["launch.nodes=2", "trainer.devices=3", "launch.processes_per_node=2"], ("do not agree on trainer.devices",)),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_the_cluster_cannot_start_is_refused(
    slurm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: tuple[str, ...]
) -> None:
    assert train(*RUN[:1], f"run.root={tmp_path}/runs", "launch=slurm", *options) == 2
    error = capsys.readouterr().err
    assert all(each in error for each in (*said, "found:", "allowed:", "remedy:")), error
    assert list(tmp_path.iterdir()) == []
    assert slurm("squeue", "--noheader") == ""


def test_what_is_not_installed_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    monkeypatch.setattr(shutil, "which", lambda name, **_: f"/usr/bin/{name}")
    assert train(*RUN[:1], f"run.root={tmp_path}/runs", "launch=slurm") == 2
    assert "pip install 'lightrail[slurm]'" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "which", lambda name, **_: None)
    assert train(*RUN[:1], f"run.root={tmp_path}/runs", "launch=slurm") == 2
    assert "SLURM is not on this machine\n  found:   no sbatch" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_controller_that_is_away_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, slurm_folder: Path
) -> None:
    away = tmp_path / "away.conf"
    away.write_text((slurm_folder / "slurm.conf").read_text().replace("SlurmctldPort=", "MessageTimeout=1\n#"))
    monkeypatch.setenv("SLURM_CONF", str(away))
    assert train(*RUN[:1], f"run.root={tmp_path}/runs", "launch=slurm") == 2
    assert "SLURM does not answer" in capsys.readouterr().err


def test_a_rank_that_is_killed_takes_the_others_along_and_all_go_on(slurm_folder: Path, tmp_path: Path) -> None:
    run = Submitted.of(
        tmp_path, "node[1-2]", "logger=[csv]", "launch.nodes=2", "launch.setup=['export MASTER_ADDR=127.0.0.1']"
    )
    run.under_way(2)
    ranks = {entry["rank"]: entry["process"] for entry in run.diary()}
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[1], signal.SIGKILL)
    wait_until(lambda: len(run.processes()) == 4, f"both ranks are there again; {run.log()}")
    run.release()
    assert run.ended() == "finished", run.log()
    assert "killed by SIGKILL; the run goes on from its last checkpoint" in run.log()
    assert "rank 1 on" in run.log()
    assert "Restarts=0" in slurm("scontrol", "show", "job", run.number)
    assert load_checkpoint(run.folder / "checkpoints" / "last.ckpt")["lightrail"]["steps"] == 60
    assert run.left_behind() == []


def test_a_job_that_is_cancelled_saves_and_goes_on_when_it_is_resumed(slurm_folder: Path, tmp_path: Path) -> None:
    waiting = Submitted.of(tmp_path, "node3", "launch.extra={nodelist: node3, begin: now+1hour}")
    assert waiting.job.state() == JobState("pending", "waits for BeginTime")
    run = Submitted.of(tmp_path, "node4", "logger=[csv]")
    run.under_way(1)
    run.cancel()
    waiting.cancel()
    assert waiting.job.outcome() == JobState("stopped", "cancelled")
    assert run.ended() == "stopped"
    assert run.job.outcome() == JobState("stopped", "cancelled")
    assert "Restarts=0" in slurm("scontrol", "show", "job", run.number)
    run.release()
    former = run.number
    assert train(f"run.resume={run.folder}", "launch=slurm") == 0
    assert run.number != former
    assert run.ended() == "finished", run.log()
    steps = [entry["step"] for entry in run.diary()]
    assert steps == list(range(120))


def test_a_run_folder_that_a_node_does_not_see_is_named(slurm_folder: Path, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    elsewhere = f"mount -t tmpfs none {hidden}"
    if subprocess.run(["unshare", "--mount", "sh", "-c", elsewhere], capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no mount of one's own, so that every node sees the same files")
    daemon = int((slurm_folder / "slurmd_node6.pid").read_text())
    os.kill(daemon, signal.SIGTERM)
    wait_until(lambda: not Path(f"/proc/{daemon}").exists(), "node6 is down")
    daemon_there = f"{elsewhere} && exec slurmd -f {slurm_folder}/slurm.conf -N node6"
    slurm("unshare", "--mount", "sh", "-c", daemon_there)
    wait_until(lambda: slurm("sinfo", "-hn", "node6", "-o", "%t").startswith("idle"), "node6 is up")

    two = Submitted.of(hidden, "node[5-6]", "launch.nodes=2")
    order = two.folder / "launch" / "order.json"
    assert two.ended() == "failed"
    assert two.job.state() == JobState("failed", f"the run folder is not shared: {order} is not there on node6")
    one = Submitted.of(hidden, "node6")
    assert one.ended() == "failed"
    assert one.job.state().reason == "the run folder is not shared: the log could not be written on node6"
