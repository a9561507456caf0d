"""Processes of their own: one that is killed without a word, and ranks that do not agree."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

from lightrail.run.checkpoint import load_checkpoint

HERE = Path(__file__).parent
RUN = [
    "model=mlp",
    "model.dropout=0.2",
    "logger=[csv]",
    "trainer.max_epochs=3",
    "trainer.accelerator=cpu",
    "trainer.checkpoint_every=7",
    "+transform=[run_plugins.LooksTwice]",
]


def train(folder: Path, *overrides: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), **variables}
    return subprocess.run(
        [sys.executable, "-m", "lightrail.train", *overrides],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_killed_run_that_is_resumed_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    whole = train(tmp_path, *RUN, "run.name=whole")
    assert whole.returncode == 0, whole.stderr
    step = random.randrange(8, 119)
    killed = train(
        tmp_path,
        *RUN,
        "run.name=killed",
        "callback=[run_plugins.Signals]",
        f"callback.Signals.step={step}",
        f"callback.Signals.number={int(signal.SIGKILL)}",
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "runs/killed/summary.json").exists()
    resumed = train(tmp_path, "run.resume=latest", "callback.Signals.step=-1")
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "runs/killed/metrics.csv").read_bytes() == (tmp_path / "runs/whole/metrics.csv").read_bytes(), (
        step
    )
    left, right = (load_checkpoint(tmp_path / "runs" / n / "checkpoints" / "last.ckpt") for n in ("whole", "killed"))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
        assert str(left[key]) == str(right[key]), (step, key)
    summaries = [json.loads((tmp_path / "runs" / n / "summary.json").read_text()) for n in ("whole", "killed")]
    assert summaries[0]["metrics"] == summaries[1]["metrics"]


def test_ranks_that_composed_different_configurations_are_refused(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "from lightrail.train import main\n"
        "size = 8 if os.environ.get('LOCAL_RANK') == '1' else 16\n"
        "sys.exit(main([*sys.argv[1:], f'data.batch_size={size}']))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    refused = subprocess.run(
        [
            sys.executable,
            str(program),
            "model=mlp",
            "logger=[csv]",
            "trainer=ddp",
            "trainer.devices=2",
            "trainer.accelerator=cpu",
            "trainer.max_steps=2",
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "composed different configurations" in refused.stderr
    assert len(list((tmp_path / "runs").iterdir())) == 1
