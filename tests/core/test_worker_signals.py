"""A signal to every process of a run, as a cluster sends it: the loaders go on until the run has saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from lightrail.run.worker_signals import shielded

WORDS = ("model=mlp", "data.num_workers=2", "logger=[csv]", "trainer.max_steps=800", "trainer.accelerator=cpu")


def begun(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lightrail.train", *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_run_whose_workers_are_signalled_too_saves_and_goes_on(tmp_path: Path) -> None:
    whole = begun(tmp_path, *WORDS, "run.name=whole")
    run = begun(tmp_path, *WORDS, "run.name=all", "trainer.checkpoint_every=7")
    saved = tmp_path / "runs" / "all" / "checkpoints" / "last.ckpt"
    until = time.monotonic() + 240
    while not saved.exists() and run.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGTERM)
    said, _ = run.communicate(timeout=240)
    assert run.returncode == 128 + signal.SIGTERM, said
    assert "saved; resume with" in said
    resumed = begun(tmp_path, "run.resume=runs/all")
    for each in (resumed, whole):
        said, _ = each.communicate(timeout=240)
        assert each.returncode == 0, said
    ends = [
        torch.load(tmp_path / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("all", "whole")
    ]
    assert [end["global_step"] for end in ends] == [800, 800]
    for name, value in ends[0]["state_dict"].items():
        assert torch.equal(value, ends[1]["state_dict"][name])


@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_a_worker_ends_for_its_own_process_alone(context: str) -> None:
    loader = DataLoader(range(8), num_workers=1, persistent_workers=True, multiprocessing_context=context)  # type: ignore[arg-type]
    batches = iter(shielded(loader))
    next(batches)
    worker = batches._workers[0]  # type: ignore[attr-defined]
    try:
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
        worker.join(1)
        assert worker.is_alive()
        assert next(batches).tolist() == [1]
        worker.terminate()
        worker.join(30)
        assert not worker.is_alive()
    finally:
        worker.kill()
