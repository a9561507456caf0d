"""The commands in scripts/ set up once, in the right place, and fail loudly; one set of versions serves every extra."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

COMMANDS = ("scripts/train", "scripts/test", "scripts/lint", ".ci/run")

# Stands for the Python of an environment: writes down what it is asked and installs nothing.
_PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$ASKED"
case "$*" in
    *"pip install"*)
        [ -z "${OFFLINE:-}" ] || { echo "no index can be reached"; exit 1; }
        printf '#!/usr/bin/env bash\\nprintf "<%%s>" "$PWD" "$@"\\n' >"${0%/*}/train"
        chmod +x "${0%/*}/train" ;;
esac
"""


@dataclass
class Checkout:
    """A copy of the set-up commands in a folder with spaces, beside an environment that only writes down."""

    folder: Path

    @property
    def environment(self) -> Path:
        return self.folder / "their environment"

    def start(self, command: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        away = self.folder / "somewhere else"
        away.mkdir(exist_ok=True)
        environment = {"ASKED": str(self.folder / "asked"), "VIRTUAL_ENV": str(self.environment)}
        outside = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "OMP_NUM_THREADS")}
        return subprocess.run(
            [self.folder / "scripts" / command, *words],
            cwd=away,
            env=outside | environment | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def installations(self) -> list[str]:
        asked = self.folder / "asked"
        lines = asked.read_text(encoding="utf-8").splitlines() if asked.exists() else []
        return [line for line in lines if "pip install" in line]


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Checkout:
    made = Checkout(tmp_path / "a folder with spaces")
    shutil.copytree(root / "scripts", made.folder / "scripts")
    shutil.copy(root / "pyproject.toml", made.folder)
    (made.environment / "bin").mkdir(parents=True)
    (made.environment / "bin" / "python").write_text(_PYTHON, encoding="utf-8")
    (made.environment / "bin" / "python").chmod(0o755)
    return made


@pytest.mark.parametrize("path", COMMANDS)
def test_command_is_an_executable_script(root: Path, path: str) -> None:
    assert os.access(root / path, os.X_OK)
    subprocess.run(["bash", "-n", root / path], check=True)


def test_installs_once_and_passes_every_word_on(checkout: Checkout) -> None:
    first = checkout.start("train", "+optimizer=sophia", "run.root=my runs")
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"<{checkout.folder / 'somewhere else'}><+optimizer=sophia><run.root=my runs>"
    assert "installing lightrail" in first.stderr
    (asked,) = checkout.installations()
    assert f"--constraint {checkout.folder}/scripts/constraints.txt --editable {checkout.folder}" in asked
    second = checkout.start("train")
    assert second.returncode == 0
    assert second.stderr == ""
    assert len(checkout.installations()) == 1


def test_installs_again_when_something_changed(checkout: Checkout) -> None:
    for changed in ("pyproject.toml", "scripts/constraints.txt"):
        assert checkout.start("train").returncode == 0
        before = len(checkout.installations())
        with (checkout.folder / changed).open("a", encoding="utf-8") as file:
            file.write("# changed\n")
        assert checkout.start("train").returncode == 0
        assert len(checkout.installations()) == before + 1, changed


def test_tests_need_their_extra_and_serve_training_too(checkout: Checkout) -> None:
    assert checkout.start("train").returncode == 0
    assert checkout.start("test", "-k", "resume").returncode == 0
    assert [line.endswith("[test]") for line in checkout.installations()] == [False, True]
    assert (checkout.folder / "asked").read_text(encoding="utf-8").splitlines()[-1].endswith("-k resume")
    assert checkout.start("train").returncode == 0
    assert len(checkout.installations()) == 2


def test_failed_installation_is_told_and_tried_again(checkout: Checkout) -> None:
    failed = checkout.start("train", OFFLINE="1")
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert "no index can be reached" in failed.stderr
    assert f"the installation failed; its whole output is in {checkout.environment}/set-up.log" in failed.stderr
    assert checkout.start("train").returncode == 0
    assert len(checkout.installations()) == 2


def test_without_a_python_it_says_what_to_do(checkout: Checkout) -> None:
    done = checkout.start("train", VIRTUAL_ENV="", PYTHON=str(checkout.folder / "no python"))
    assert done.returncode == 1
    assert "there is no Python 3.11 or newer" in done.stderr
    assert "PYTHON=/path/to/" in done.stderr
    assert not (checkout.folder / ".venv").exists()


def test_environment_that_is_gone_is_told(checkout: Checkout) -> None:
    done = checkout.start("train", VIRTUAL_ENV=str(checkout.folder / "gone"))
    assert done.returncode == 1
    assert f"{checkout.folder}/gone is no virtual environment" in done.stderr


def test_versions_cover_what_every_extra_asks_for(root: Path) -> None:
    lines = (root / "scripts" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    for name, version in pins.items():
        assert name == canonicalize_name(name)
        assert re.fullmatch(r"[\d.]+((a|b|rc|\.post|\.dev)\d+)?", version), f"{name}: a version without a local label"
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [each for asked in project["optional-dependencies"].values() for each in asked]
    for requirement in map(Requirement, [*project["dependencies"], *extras]):
        name = canonicalize_name(requirement.name)
        if name != project["name"]:
            assert requirement.specifier.contains(pins.get(name, ""), prereleases=True), f"{requirement} has no version"


def test_commits_and_ci_run_the_same_checks(root: Path) -> None:
    assert "entry: ./scripts/lint\n" in (root / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert "./scripts/lint" in (root / ".ci" / "run").read_text(encoding="utf-8")
