"""The README as commands and pieces of Python, for the tests that execute them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from itertools import chain
from pathlib import Path

from warm_process import run_warm  # type: ignore[import-not-found]

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
    """Those that stand alone; each is run in a folder of its own."""
    return [line for block in blocks("bash") if not is_story(block) for line in lines_of(block)]


def stories() -> list[list[str]]:
    """Blocks in which one line takes up what another has trained; they are run in order, in one folder."""
    return [lines_of(block) for block in blocks("bash") if is_story(block)]


def is_story(block: str) -> bool:
    return any(words in block for words in ("generate run=latest", "audit latest", "sweep.resume=latest"))


def lines_of(block: str) -> list[str]:
    lines = [line.partition(" #")[0].strip() for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("./scripts/")]


def is_long(command: str) -> bool:
    """Whether it trains for more than some seconds; such commands are a file of tests of their own."""
    return any(word in command for word in ("docs_lm", "trainer=ddp", "trainer=fsdp", "launch=torchrun"))


def is_first_of_its_program(command: str) -> bool:
    """Whether the README has no earlier line with this program; such a line makes its imports itself."""
    program = command.split()[0]
    return command == next(line for line in chain(commands(), *stories()) if line.split()[0] == program)


def run(folder: Path, command: list[str], warm: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a command as a user would, in ``folder``.

    Args:
        folder: Where it runs.
        command: The program and its words.
        warm: Whether it finds torch and Lightning imported.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    environment.pop("LIGHTRAIL_RUN_FOLDER", None)
    # Processes that speak with each other begin anew: a fork of one that has threads can stand still in a collective.
    if warm and not any("devices=" in word for word in command):
        return run_warm(command, cwd=folder, env=environment, timeout=900)
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False
    )


def execute(folder: Path, command: str) -> None:
    """Runs one line of the README and asserts that it ended as it should."""
    (folder / "mine.py").write_text(MINE)
    words = shlex.split(command)
    program = Path(sys.executable).with_name(words[0])
    if "run.resume=latest" in words:
        stopped = run(folder, [str(program), "trainer.max_epochs=1"])
        assert stopped.returncode == 0, stopped.stderr
    if "schedule.from_run=latest" in words:
        recorded = run(folder, [str(program), "schedule=refined", "trainer.max_epochs=1"])
        assert recorded.returncode == 0, recorded.stderr
    finished = run(folder, [str(program), *words[1:]], warm=not is_first_of_its_program(command))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    if words[0] == "train" and "--help" not in words:
        assert any(last in finished.stdout for last in ("run folder", "report.html", "best: "))
        assert "Traceback" not in finished.stderr
