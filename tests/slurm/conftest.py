"""A SLURM of this session's own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
SCRIPT = HERE.parents[1] / "scripts" / "slurm-local"
NODES = 6


@pytest.fixture(scope="session")
def slurm_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a SLURM of several nodes, all of them this machine, has its state; ``SLURM_CONF`` names it."""
    is_there = shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") and shutil.which("sbatch")
    if not is_there and (os.getuid() != 0 or shutil.which("apt-get") is None):
        reason = "SLURM is not installed, and this is not root on a Debian, who could install it"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    # Short, since munge's socket lies in it, to which munge wants everybody to have a way.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    options = ["--folder", str(folder), "--nodes", str(NODES), "--cpus", "4", "--grace", "60", "--kill-wait", "20"]
    up = subprocess.run([SCRIPT, "up", "--install", *options], capture_output=True, text=True, timeout=300, check=False)
    if up.returncode:
        subprocess.run([SCRIPT, "down", "--folder", str(folder)], capture_output=True, timeout=60, check=False)
    if "the packages could not be installed" in up.stderr:
        pytest.skip(f"SLURM's packages cannot be had here: {up.stderr}")
    assert up.returncode == 0, up.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", up.stdout.strip().partition("=")[2])
        # What jobs inherit.
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])))
        yield folder
        down = subprocess.run([SCRIPT, "down", "--folder", str(folder)], capture_output=True, timeout=60, check=False)
    left = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True, check=False)
    assert (down.returncode, left.stdout) == (0, "")
    shutil.rmtree(folder)
