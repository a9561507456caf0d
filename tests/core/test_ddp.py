"""Two processes on halves of each batch end where one process on whole batches does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent


def test_two_processes_equal_one(tmp_path: Path) -> None:
    folders = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
        subprocess.run(
            [sys.executable, str(HERE / "ddp_program.py"), str(folder), str(devices)],
            env=environment,
            check=True,
            capture_output=True,
            timeout=300,
        )
        folders.append(folder)
    assert len(list(folders[0].glob("refused-*.txt"))) == 1
    assert [p.read_text().splitlines()[0] for p in sorted(folders[1].glob("refused-*.txt"))] == [
        "the loss became nan at step 3"
    ] * 2
    compared = sorted(folders[0].glob("*.pt"))
    assert len(compared) == 6
    for one in compared:
        left, right = torch.load(one), torch.load(folders[1] / one.name)
        for key in left:
            torch.testing.assert_close(left[key], right[key], rtol=1e-4, atol=1e-6, msg=f"{one.name} {key}")
