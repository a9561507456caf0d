"""Every path and module that the project's configuration names is there, and the source roots are no packages."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
TOOLS = PYPROJECT["tool"]
SOURCE_ROOTS = ("platform", "plugins")
TARGETS = {
    **{f"command {name}": value for name, value in PROJECT["scripts"].items()},
    **{
        f"{group} {name}": value.partition("[")[0].strip()
        for group, entries in PROJECT["entry-points"].items()
        for name, value in entries.items()
    },
}


@pytest.mark.parametrize("folder", SOURCE_ROOTS)
def test_source_root_holds_packages_only(folder: str) -> None:
    files = [item.name for item in (ROOT / folder).iterdir() if item.is_file()]
    assert files == [], f"{folder}/ is a source root as src/ is: code belongs in a package inside it"


def test_standard_library_wins_in_the_root() -> None:
    program = "import platform, uuid; print(platform.system(), platform.__file__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    system, file = done.stdout.split(maxsplit=1)
    assert system == os.uname().sysname
    assert not Path(file.strip()).is_relative_to(ROOT / "platform")


def _named_paths() -> set[str]:
    hatch, pyright = TOOLS["hatch"]["build"], TOOLS["pyright"]
    wheel = hatch["targets"]["wheel"]
    return {
        PROJECT["readme"],
        *PROJECT["license-files"],
        *hatch["dev-mode-dirs"],
        *wheel["only-include"],
        *wheel["sources"],
        *(path.lstrip("/") for path in hatch["targets"]["sdist"]["include"]),
        *TOOLS["ruff"]["src"],
        *(pattern.removesuffix("/**") for pattern in TOOLS["ruff"]["lint"]["per-file-ignores"]),
        *pyright["include"],
        *pyright["extraPaths"],
        *TOOLS["pytest"]["ini_options"]["testpaths"],
    }


@pytest.mark.parametrize("path", sorted(_named_paths()))
def test_named_path_is_there(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_entry_point_loads(name: str) -> None:
    module, _, attribute = TARGETS[name].partition(":")
    loaded = importlib.import_module(module)
    assert not attribute or callable(getattr(loaded, attribute))
    if module.startswith("lightrail"):
        assert any(Path(str(loaded.__file__)).is_relative_to(ROOT / folder) for folder in SOURCE_ROOTS)


def test_installed_entry_points_are_those_of_the_project() -> None:
    installed = importlib.metadata.distribution("lightrail").entry_points
    groups = {**PROJECT["entry-points"], "console_scripts": PROJECT["scripts"]}
    named = {(group, name, value) for group, entries in groups.items() for name, value in entries.items()}
    found = {(each.group, each.name, each.value) for each in installed}
    assert found == named, "reinstall the project: ./scripts/test does it"


def test_every_package_is_under_the_import_rules() -> None:
    rules = TOOLS["importlinter"]
    plugins = {folder.name for folder in (ROOT / "plugins").iterdir() if (folder / "__init__.py").is_file()}
    by_type = {contract["type"]: contract for contract in rules["contracts"]}
    assert set(rules["root_packages"]) == {"lightrail", *plugins}
    assert set(by_type["forbidden"]["forbidden_modules"]) == plugins
    assert set(by_type["independence"]["modules"]) == plugins


def test_import_rules_hold(capsys: pytest.CaptureFixture[str]) -> None:
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert status == 0, capsys.readouterr().out
