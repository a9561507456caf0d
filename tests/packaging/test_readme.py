"""The README is executed: every command and every piece of Python in it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MINE = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, TensorDataset


class MyModule(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def training_step(self, batch):
        return self.layer(batch[0]).square().mean()


class MyData(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(32, 3)), batch_size=8)
"""


def blocks(language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(README.read_text()) if found == language]


def commands() -> list[str]:
    lines = [line.partition(" #")[0].strip() for text in blocks("bash") for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("./scripts/")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    (folder / "mine.py").write_text(MINE)
    return folder


def run(folder: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    environment.pop("LIGHTRAIL_RUN_FOLDER", None)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def test_the_set_up_commands_stand_at_the_top() -> None:
    first = blocks("bash")[0]
    assert first.startswith("./scripts/train")
    assert "./scripts/test" in first
    assert README.read_text().index(first) < 60


@pytest.mark.parametrize("command", [c for c in commands() if not c.startswith("lightrail bench")])
def test_command(folder: Path, command: str) -> None:
    words = shlex.split(command)
    program = Path(sys.executable).with_name(words[0])
    if "run.resume=latest" in words:
        stopped = run(folder, [str(program), "trainer.max_epochs=1"])
        assert stopped.returncode == 0, stopped.stderr
    finished = run(folder, [str(program), *words[1:]])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    if words[0] == "train" and "--help" not in words:
        assert "run folder" in finished.stdout or "report.html" in finished.stdout
        assert "Traceback" not in finished.stderr


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_python(folder: Path, index: int) -> None:
    finished = run(folder, [sys.executable, "-c", blocks("python")[index]])
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_every_bench_is_there() -> None:
    from lightrail.bench import BENCHES

    named = {c.split()[2] for c in commands() if c.startswith("lightrail bench")}
    assert named == set(BENCHES)
