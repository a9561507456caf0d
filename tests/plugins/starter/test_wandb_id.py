"""A run that is started again in its folder goes on as the same run of Weights & Biases."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lightrail_starter.loggers.wandb import Wandb

DIES = """
import os, signal, sys
from lightrail_starter.loggers.wandb import Wandb
Wandb(sys.argv[1], mode="offline").log_metrics({"loss": 1.0}, step=1)
os.kill(os.getpid(), signal.SIGKILL)
"""


def ids(folder: Path) -> set[str]:
    return {path.name.rpartition("-")[2] for path in (folder / "wandb").glob("offline-run-*")}


def test_a_run_that_died_before_its_first_checkpoint_goes_on_under_its_id(tmp_path: Path) -> None:
    # Not with the service of these tests, which it would leave with a run that is open.
    own = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
    died = subprocess.run([sys.executable, "-c", DIES, str(tmp_path)], timeout=120, check=False, env=own)
    assert died.returncode == -9
    before = ids(tmp_path)
    assert len(before) == 1
    again = Wandb(str(tmp_path), mode="offline")
    again.log_metrics({"loss": 0.5}, step=2)
    again.close()
    assert ids(tmp_path) == before == {again.version}


def test_the_id_in_a_checkpoint_wins_and_other_folders_have_their_own(tmp_path: Path) -> None:
    (tmp_path / "resumed").mkdir()
    (tmp_path / "resumed" / "wandb_id.txt").write_text("aaaaaaaa")
    resumed, new = Wandb(str(tmp_path / "resumed"), mode="offline"), Wandb(str(tmp_path / "new"), mode="offline")
    resumed.load_state_dict({"id": "bbbbbbbb"})
    for logger in (resumed, new):
        logger.log_metrics({"loss": 1.0}, step=1)
        logger.close()
    assert ids(tmp_path / "resumed") == {"bbbbbbbb"}
    assert (tmp_path / "resumed" / "wandb_id.txt").read_text() == "bbbbbbbb"
    assert ids(tmp_path / "new") == {new.version}
    assert new.version not in ("aaaaaaaa", "bbbbbbbb")
