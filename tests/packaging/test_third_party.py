"""A package that knows lightrail, and that lightrail does not know, is as much at home as lightrail's own plugins."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from clean_environment import CleanEnvironment, build_wheel, write_package

_PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "{version}"
dependencies = ["lightrail"]
"""

_THEIRS = {
    "pyproject.toml": _PROJECT.format(name="their-methods", version="3.1")
    + """
[project.entry-points."lightrail.optimizer"]
theirs = "their_methods.optimizer:Theirs"

[project.entry-points."lightrail.transform"]
their_transform = "their_methods.transform:Damped"

[project.entry-points."lightrail.task"]
their_task = "their_methods.task:TheirTask"

[project.entry-points."lightrail.conf"]
their_methods = "their_methods.conf"
""",
    "their_methods/__init__.py": "",
    "their_methods/optimizer.py": '''
import torch


class Theirs(torch.optim.Optimizer):
    """Steps against the sign of the gradient."""

    def __init__(self, params, lr: float = 0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.sign(), alpha=group["lr"])
        return loss
''',
    "their_methods/transform.py": '''
from lightrail import Transform


class Damped(Transform):
    """Multiplies the gradient by a factor."""

    def __init__(self, factor: float = 0.5):
        self.factor = factor

    def before_step(self, params, closure):
        for p in params:
            if p.grad is not None:
                p.grad.mul_(self.factor)
''',
    "their_methods/task.py": '''
import lightning
import torch


class TheirTask(lightning.LightningModule):
    """Classification with a temperature."""

    def __init__(self, model: torch.nn.Module, temperature: float = 2.0):
        super().__init__()
        self.model = model
        self.temperature = temperature

    def training_step(self, batch, batch_idx):
        return {"loss": self.loss(batch)}

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), on_epoch=True)

    def loss(self, batch):
        inputs, target = batch
        return torch.nn.functional.cross_entropy(self.model(inputs) / self.temperature, target)
''',
    "their_methods/conf/experiment/their_experiment.yaml": """
defaults:
  - override /optimizer: theirs
  - override /task: their_task

optimizer:
  lr: 0.125
""",
}

_RIVAL = {
    "pyproject.toml": _PROJECT.format(name="rival-methods", version="0.2")
    + """
[project.entry-points."lightrail.optimizer"]
theirs = "rival_methods:Rival"
""",
    "rival_methods.py": '''
import torch


class Rival(torch.optim.SGD):
    """Another method of the same name."""

    def __init__(self, params, lr: float = 0.25):
        super().__init__(params, lr=lr)
''',
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("their_methods")
    return {"their-methods": build_wheel(write_package(folder, _THEIRS), folder / "dist")}


@pytest.fixture(scope="module")
def rival(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rival_methods")
    return {"rival-methods": build_wheel(write_package(folder, _RIVAL), folder / "dist")}


def _assert_four_part_error(done: subprocess.CompletedProcess[str], *named: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert all(f"\n  {part}:" in done.stderr for part in ("found", "allowed", "remedy")), done.stderr
    assert all(word in done.stderr for word in named), done.stderr


def test_trains_and_after_it_is_gone_says_so(clean: CleanEnvironment, theirs: dict[str, Path], tmp_path: Path) -> None:
    command = ["train", "+optimizer=theirs", "+transform=[their_transform]", "task=their_task", "trainer.max_steps=2"]
    with clean.having(theirs):
        done = clean.run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    lock = (folder / "lock.json").read_text(encoding="utf-8")
    assert "their-methods" in lock
    assert "3.1" in lock
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    assert all(name in config for name in ("optimizer.Theirs", "transform.Damped", "task.TheirTask", "temperature"))

    done = clean.run(*command, cwd=tmp_path)
    _assert_four_part_error(done, "'their", "' is not installed", "reinstall its package")
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_is_listed_and_brings_its_configuration(
    clean: CleanEnvironment, theirs: dict[str, Path], tmp_path: Path
) -> None:
    with clean.having(theirs):
        listed = clean.run("lightrail", "plugins", "--json", cwd=tmp_path)
        shown = clean.run("lightrail", "plugins", "theirs", cwd=tmp_path)
        composed = clean.run("train", "--cfg", "experiment=their_experiment", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    ours = [each for each in json.loads(listed.stdout) if each["distribution"] == "their-methods"]
    assert {(each["kind"], each["name"]) for each in ours} == {
        ("optimizer", "theirs"),
        ("transform", "their_transform"),
        ("task", "their_task"),
    }
    assert {(each["version"], each["state"]) for each in ours} == {("3.1", "ready")}
    assert "Steps against the sign of the gradient." in shown.stdout
    assert "their-methods 3.1" in shown.stdout
    assert composed.returncode == 0, composed.stderr
    assert "_target_: their_methods.optimizer.Theirs" in composed.stdout
    assert "lr: 0.125" in composed.stdout


def test_two_that_claim_one_name(
    clean: CleanEnvironment, theirs: dict[str, Path], rival: dict[str, Path], tmp_path: Path
) -> None:
    with clean.having(theirs | rival):
        unclear = clean.run("train", "--cfg", "optimizer=theirs", cwd=tmp_path)
        chosen = clean.run("train", "--cfg", "optimizer=rival-methods:theirs", cwd=tmp_path)
    _assert_four_part_error(unclear, "their-methods:theirs", "rival-methods:theirs")
    assert chosen.returncode == 0, chosen.stderr
    assert "_target_: rival_methods.Rival" in chosen.stdout
    assert "lr: 0.25" in chosen.stdout
