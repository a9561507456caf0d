"""A signal to every process of a run, as a cluster sends it: the workers of the loaders die of it, the run saves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def test_a_run_whose_workers_are_signalled_too_saves_and_stops(tmp_path: Path) -> None:
    words = ["model=mlp", "data.num_workers=2", "logger=[csv]", "trainer.max_epochs=2000", "trainer.accelerator=cpu"]
    run = subprocess.Popen(
        [sys.executable, "-m", "lightrail.train", *words, "run.name=all", "trainer.checkpoint_every=7"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    saved = tmp_path / "runs" / "all" / "checkpoints" / "last.ckpt"
    until = time.monotonic() + 240
    while not saved.exists() and run.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGTERM)
    said, _ = run.communicate(timeout=240)
    assert run.returncode == 128 + signal.SIGTERM, said
    assert "saved; resume with" in said
