"""Clients that Flower simulates in processes of Ray's have the numbers of clients in one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr")
pytest.importorskip("ray", reason="needs lightrail[flower-simulation]")

from lightrail.federated.rounds import ServerRounds
from lightrail.run import compose

RUN = [
    "+federated=scaffold", "federated.clients=3", "federated.fraction=0.7", "model=mlp", "logger=[]", "seed=3",
    "optimizer=sgd", "optimizer.momentum=0", "optimizer.lr=0.05",
]  # fmt: skip


@pytest.fixture
def outside_of_ray() -> Iterator[None]:
    import ray  # pyright: ignore[reportMissingImports]

    yield
    ray.shutdown()


def weights_by_round(*overrides: str) -> tuple[list[torch.Tensor], dict[str, float]]:
    run = compose([*RUN, "trainer.accelerator=cpu", *overrides])
    rounds = next(each for each in run.callbacks if isinstance(each, ServerRounds))
    found = []
    try:
        for _ in range(3):
            rounds.step()
            found.append(rounds.state["weights"].clone())
        return found, rounds.logged()
    finally:
        rounds.close()


def test_a_simulated_run_is_that_of_one_process(outside_of_ray: None) -> None:
    here, told_here = weights_by_round()
    simulated, told = weights_by_round("federated.engine=flower", "federated.processes=2")
    for one, other in zip(here, simulated, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert not torch.equal(here[0], here[-1])
    assert told["answers:used"] == told_here["answers:used"] == 2
    assert told["megabytes:received"] == told_here["megabytes:received"]


def test_a_run_whose_clients_are_simulated_is_saved_on_a_signal(tmp_path: Path) -> None:
    words = [*RUN, "trainer.accelerator=cpu", "federated.engine=flower", "federated.rounds=100000", "run.name=long"]
    run = subprocess.Popen(
        [sys.executable, "-m", "lightrail.train", *words, "trainer.checkpoint_every=5"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    saved = tmp_path / "runs" / "long" / "checkpoints" / "last.ckpt"
    until = time.monotonic() + 400
    while not saved.exists() and run.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    said, _ = run.communicate(timeout=400)
    assert run.returncode == 128 + signal.SIGTERM, said
    assert "saved; resume with" in said
