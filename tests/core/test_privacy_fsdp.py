"""Private steps with parameters that are sharded over two processes are those of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from privacy_runs import told

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What one process and two leave behind."""
    found = {}
    for devices in (1, 2):
        folder = found[devices] = tmp_path_factory.mktemp(f"{devices}")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
        program = [sys.executable, str(HERE / "privacy_fsdp_program.py"), str(folder), str(devices)]
        done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
    return found


@pytest.mark.parametrize("clip", ["flat", "per_layer"])
def test_shards_are_updated_as_whole_parameters_are(folders: dict[int, Path], clip: str) -> None:
    one, two = (torch.load(folders[devices] / f"{clip}.pt") for devices in (1, 2))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-5, atol=1e-7, msg=f"{clip} {key}")


def test_ranks_without_samples_keep_step_with_the_others(folders: dict[int, Path]) -> None:
    """With one record expected in twelve steps on each of two ranks, some batches are empty on one rank or on both."""
    weights = torch.load(folders[2] / "small_batches.pt")
    assert all(torch.isfinite(each).all() for each in weights.values())
    (run,) = (folders[2] / "small_batches").iterdir()
    ledger = told(run)
    assert sum(event["steps"] for event in ledger["events"]) == 12
    assert ledger["is_private"] is True
