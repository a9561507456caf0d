"""launch=torchrun: processes that are started again, on one machine and on several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightrail.errors import ConfigurationError
from lightrail.launch import Job
from lightrail_launch.torchrun import Torchrun

CORE = Path(__file__).parents[2] / "core"
LAUNCH = "launch=lightrail_launch.torchrun.Torchrun"
RUN = [
    "task=processes_program.Plain",
    "data=processes_program.Share",
    "data.processes=2",
    "model=null",
    "logger=[csv]",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=2",
    "trainer.checkpoint_every=2",
    "+trainer.use_distributed_sampler=false",
]


def train(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lightrail.train", *overrides],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CORE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_process_that_is_killed_is_started_again_on_the_checkpoint(tmp_path: Path) -> None:
    once = ["callback=[processes_program.Fault]", "callback.Fault.once=fallen", "callback.Fault.step=5"]
    run = train(tmp_path, *RUN, LAUNCH, "launch.processes=2", "run.name=fallen_once", *once)
    said = run.communicate(timeout=300)[0]
    assert run.returncode == 0, said
    assert (tmp_path / "fallen").exists()
    folder = tmp_path / "runs" / "fallen_once"
    job = Job.of(folder)
    assert job is not None
    assert job.state().phase == "finished"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 8)
    # It went on, rather than from the beginning.
    assert summary["resumed_from"] == str(folder / "checkpoints" / "last.ckpt")
    assert "rank 1 is lost" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rendezvous": "node1"}, "rendezvous=node1"),
        ({"processes": 0}, "processes=0"),
        ({"grace": 0.0}, "grace=0.0"),
    ],
)
def test_options_out_of_range(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        Torchrun(**options)  # type: ignore[arg-type]
    assert said in refused.value.found


def test_what_contradicts_the_trainer_or_has_no_place_to_meet_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="need a place to meet"):
        Torchrun(nodes=2, processes=1).check({"accelerator": "cpu"})
    with pytest.raises(ConfigurationError, match=r"trainer\.devices contradicts"):
        Torchrun(processes=2).check({"accelerator": "cpu", "devices": 4})
    Torchrun(processes=2).check({"accelerator": "cpu", "devices": 1, "strategy": "auto"})
