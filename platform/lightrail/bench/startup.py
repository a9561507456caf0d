"""How long the command line takes to answer, and a run to take its first step."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightrail.bench.table import Table

__all__ = ["measure"]

_PLUGINS = 300
_IMPORTS = "import torch, lightning, wandb"
# A callback that ends the process at the first optimizer step, from a package of its own.
_FIRST_STEP = """
import os, time
from lightning.pytorch import Callback

class FirstStep(Callback):
    def on_before_zero_grad(self, *args):
        self.armed = True
    def on_train_batch_end(self, *args):
        print(time.time(), flush=True)
        os._exit(0)
"""


def measure(options: argparse.Namespace) -> Table:
    """Measures commands with 300 more plugins installed, and a run up to its first step.

    Args:
        options: ``rounds``, how often each; they take turns.
    """
    rounds = options.rounds
    table = Table(
        f"seconds to answer, with {_PLUGINS} more plugins installed in as many distributions",
        "s ",
        f"medians of {rounds} rounds in new processes, after one that fills the caches",
    )
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        _make_plugins(root / "plugins")
        (root / "first_step.py").write_text(_FIRST_STEP)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(root), str(root / "plugins"), os.environ.get("PYTHONPATH", "")]),
            "LIGHTRAIL_CACHE": str(root / "cache"),
        }
        samples: dict[str, list[float]] = {}
        for number in range(rounds + 1):
            for name, seconds in _one_round(root, environment).items():
                if number:
                    samples.setdefault(name, []).append(seconds)
    for name in ("lightrail plugins", "train --help", "one completion"):
        table.add(name, samples[name], bound=0.35)
    table.add(_IMPORTS, samples[_IMPORTS])
    table.add("train, to its first step", samples["train"], _IMPORTS)
    beyond = [a - b for a, b in zip(samples["train"], samples[_IMPORTS], strict=True)]
    table.add("train, beyond those imports", beyond, bound=1.5)
    return table


def _one_round(root: Path, environment: Mapping[str, str]) -> dict[str, float]:
    python = [sys.executable, "-m"]
    commands = {
        "lightrail plugins": [*python, "lightrail", "plugins"],
        "train --help": [*python, "lightrail.train", "--help"],
        "one completion": [*python, "lightrail", "complete", "--", "train", "optimizer=so"],
        _IMPORTS: [sys.executable, "-c", _IMPORTS],
    }
    seconds = {}
    for name, command in commands.items():
        began = time.time()
        _run(command, root, environment)
        seconds[name] = time.time() - began
    began = time.time()
    command = [*python, "lightrail.train", "callback=[first_step.FirstStep]", f"run.root={root / 'runs'}"]
    seconds["train"] = float(_run(command, root, environment).splitlines()[-1]) - began
    return seconds


def _run(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> str:
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {finished.returncode}:\n{finished.stderr}")
    return finished.stdout


def _make_plugins(folder: Path) -> None:
    """As many distributions as plugins, as installed packages look on the disk."""
    for number in range(_PLUGINS):
        name = f"made_up_{number}"
        package = folder / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(
            f"class Method{number}:\n    '''Method {number}.'''\n\n"
            "    def __init__(self, params, lr: float = 0.1): ...\n"
        )
        metadata = folder / f"{name}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (metadata / "RECORD").write_text("")
        (metadata / "entry_points.txt").write_text(f"[lightrail.optimizer]\nmethod_{number} = {name}:Method{number}\n")
