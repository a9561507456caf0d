"""``lightrail jobs``: what was handed over is listed, followed and stopped from any other process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightrail.command import main
from lightrail.launch import Job, JobState, jobs_under
from lightrail.launch.job import write_outcome

SUPERVISOR = """
import sys
from pathlib import Path
from lightrail.launch.node import Supervisor

class Sleeping(Supervisor):
    def carry_out(self):
        object.__setattr__(self.order, "content", {"directory": "/"})
        type(self.order).rank_command = property(lambda order: ["/bin/sh", "-c", sys.argv[2]])
        return super().carry_out()

sys.exit(Sleeping(Path(sys.argv[1])).carry_out())
"""


def begun(folder: Path, script: str) -> tuple[Job, subprocess.Popen[bytes]]:
    """A job of `launch=here` whose run is a shell's."""
    (folder / "launch").mkdir(parents=True)
    (folder / "launch" / "order.json").write_text("{}")
    with open(folder / "launch" / "output.log", "wb") as log:
        process = subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(folder), script], stdout=log, stderr=log)
    born = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])
    known = {"host": os.uname().nodename, "born": born}
    return Job(folder, "here", str(process.pid), known=known).keep(), process


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Runs that have ended: one finished in a sweep, one lost."""
    for place, number, submitted in (("a", "4000001", 1.0), ("s/jobs/0", "4000002", 2.0)):
        (tmp_path / place / "launch").mkdir(parents=True)
        Job(tmp_path / place, "here", number, submitted=submitted, known={"host": "gone", "born": 1}).keep()
    (tmp_path / "s/jobs/0/launch/output.log").write_bytes("é: end\n".encode())
    write_outcome(tmp_path / "s/jobs/0", JobState("finished"))
    return tmp_path


def test_the_list(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jobs", "--root", str(root)]) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["launch", "job", "phase", "since", "folder", "reason"]
    assert first.split()[:3] == ["here", "4000001", "lost"]
    assert "of gone is gone and left no word" in first
    assert second.split()[:3] == ["here", "4000002", "finished"]
    assert main(["jobs", "--root", str(root), "--json"]) == 0
    assert [each["phase"] for each in json.loads(capsys.readouterr().out)] == ["lost", "finished"]


def test_one_that_is_over_is_shown_followed_and_left_alone(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jobs", "4000002", "--root", str(root), "--follow"]) == 0
    assert capsys.readouterr().out == "é: end\nhere job 4000002 finished\n"
    assert main(["jobs", str(root / "a"), "--follow"]) == 1
    assert main(["jobs", "4000002", "--root", str(root), "--cancel"]) == 0
    assert "has finished already" in capsys.readouterr().out
    assert main(["jobs", str(root / "s/jobs/0")]) == 0
    assert "here job 4000002  finished" in capsys.readouterr().out


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds a process in /proc")
def test_one_that_runs_is_followed_to_its_end_and_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job, process = begun(tmp_path / "b", "trap 'echo saved; exit 9' TERM; echo begun; sleep 60 & wait")
    assert [each.number for each in jobs_under(tmp_path)] == [job.number]
    log = tmp_path / "b" / "launch" / "output.log"
    end = time.monotonic() + 60
    while b"begun" not in log.read_bytes():
        assert time.monotonic() < end
        time.sleep(0.02)
    assert job.state() == JobState("running")
    assert main(["jobs", job.number, "--root", str(tmp_path), "--cancel"]) == 0
    assert main(["jobs", job.number, "--root", str(tmp_path), "--follow"]) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[0].endswith("goes on with")
    assert told[-3:-1] == ["begun", "saved"]
    assert f"here job {job.number} stopped" in told[-1]
    process.wait()


@pytest.mark.parametrize(("words", "what"), [
    (["nobody"], "there is no job 'nobody'"), (["--follow"], "no job is named"), (["--cancel"], "no job is named"),
])  # fmt: skip
def test_what_is_not_there(words: list[str], what: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jobs", *words, "--root", str(root)]) == 2
    told = capsys.readouterr().err
    assert what in told
    assert "remedy:" in told


def test_no_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jobs", "--root", str(tmp_path)]) == 0
    assert "no run under this folder" in capsys.readouterr().out


def test_jobs_side_by_side_share_cards_and_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightrail.launch import Order
    from lightrail_launch.share import share_of_machine

    def order(devices: object, accelerator: str = "auto") -> Order:
        trainer = {"devices": devices, "accelerator": accelerator}
        return Order(tmp_path / "jobs" / "3", {"composition": {"config": {"trainer": trainer}}}, "")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name, card, host in (("0", "4", os.uname().nodename), ("1", "5", "elsewhere"), ("2", "6", os.uname().nodename)):
        (tmp_path / "jobs" / name / "launch").mkdir(parents=True)
        known = {"host": host, "share": {"CUDA_VISIBLE_DEVICES": card}}
        Job(tmp_path / "jobs" / name, "here", name, known=known).keep()
    write_outcome(tmp_path / "jobs" / "2", JobState("finished"))
    assert share_of_machine(order(1), 2) == {"CUDA_VISIBLE_DEVICES": "5"}
    assert share_of_machine(order(2), 2) == {"CUDA_VISIBLE_DEVICES": "5,6"}
    assert (
        share_of_machine(order([0]), 2) == share_of_machine(order(1, "cpu"), 2) == share_of_machine(order(1), 1) == {}
    )
    monkeypatch.delenv("OMP_NUM_THREADS")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    assert share_of_machine(order(1, "cpu"), 2) == {"OMP_NUM_THREADS": str(max(cores // 2, 1))}


@pytest.mark.parametrize(
    ("script", "phase", "reason"),
    [
        ("exit 0", "finished", ""),
        ("exit 3", "failed", "exit status 3"),
        ("exit 143", "failed", "stopped by SIGTERM"),
        ("echo no disk > {folder}/launch/error.txt; exit 1", "failed", "no disk"),
        ("kill -9 $$", "failed", "killed by SIGKILL, 3 times in a row without getting on"),
    ],
)
def test_how_a_run_ended_is_said(script: str, phase: str, reason: str, tmp_path: Path) -> None:
    job, process = begun(tmp_path / "run", script.format(folder=tmp_path / "run"))
    process.wait(60)
    assert job.outcome() == JobState(phase, reason)
