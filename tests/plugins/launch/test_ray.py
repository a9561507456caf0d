"""launch=ray on a real cluster of one machine."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lightrail.errors import ConfigurationError
from lightrail.launch import Job
from lightrail.launch.node import is_held
from lightrail.testing import LaunchSuite
from lightrail_launch.ray import Ray

CORE = Path(__file__).parents[2] / "core"
pytest.importorskip("ray", reason="needs lightrail[ray]")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CORE), "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = str(Path(sys.executable).parent / "ray")
    # Nobody else is to find it; and the name of a socket cannot be long.
    own = tempfile.mkdtemp(prefix="ray-")
    words = ["start", "--head", f"--port={port}", "--num-cpus=2", "--object-store-memory=80000000", f"--temp-dir={own}"]
    # Its services inherit what it prints to, so that a pipe would never end.
    log = open(tmp_path_factory.mktemp("ray") / "log", "w")  # noqa: SIM115
    began = subprocess.Popen(
        [script, *words, "--include-dashboard=false", "--block"], env=ENVIRONMENT, stdout=log, stderr=log
    )
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        import ray  # pyright: ignore[reportMissingImports]

        ray.shutdown()
        began.terminate()
        began.wait(60)
        log.close()
        shutil.rmtree(own, ignore_errors=True)


def train(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    run = ["task=run_plugins.OwnOptimizer", "data=run_plugins.Points", "model=null", "logger=[csv]"]
    trainer = ["trainer.accelerator=cpu", "trainer.max_epochs=2", "trainer.checkpoint_every=2"]
    return subprocess.run(
        [sys.executable, "-m", "lightrail.train", *run, *trainer, "launch=lightrail_launch.ray.Ray", *overrides],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def test_a_job_is_handed_over_found_again_and_carried_out(address: str, tmp_path: Path) -> None:
    too_much = train(tmp_path, f"launch.address={address}", "launch.cpus=3")
    assert too_much.returncode == 2
    assert "CPU: 3 for each of 1 processes" in too_much.stderr
    assert not (tmp_path / "runs").exists()
    handed = train(tmp_path, f"launch.address={address}", "run.name=pair", "launch.processes=2")
    assert handed.returncode == 0, handed.stderr
    # Another process than that which handed it over.
    job = Job.of(tmp_path / "runs" / "pair")
    assert job is not None
    end = time.monotonic() + 400
    while not (state := job.state()).is_over and time.monotonic() < end:
        time.sleep(1)
    log = (job.folder / "launch" / "output.log").read_text()
    assert state.phase == "finished", log
    assert "trainer.num_nodes=2" in log
    assert not is_held(job.folder)


class TestRayOnACluster(LaunchSuite):
    plugin: ClassVar[Any] = Ray
    options: Any = None

    @pytest.fixture(autouse=True)
    def _at(self, address: str) -> None:
        self.options = {"address": address}


def test_a_cluster_of_this_machine_that_is_gone_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(ConfigurationError) as refused:
        Ray().check({"accelerator": "cpu"})
    assert "no `ray start` was made" in refused.value.found
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")
    with pytest.raises(ConfigurationError) as refused:
        Ray().check({"accelerator": "cpu"})
    assert "launch.address=auto, which is 127.0.0.1:9: " in refused.value.found


def test_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no Ray cluster answers") as refused:
        Ray(address="127.0.0.1:9").check({"accelerator": "cpu"})
    assert "127.0.0.1:9" in refused.value.found
    gone = Job(tmp_path, "lightrail_launch.ray.Ray", "ray-1", known={"address": "127.0.0.1:9"})
    assert gone.state().phase == "lost"
