"""The wheel holds everything that the commands need, and they run from it with no checkout around."""

from __future__ import annotations

import configparser
import json
import tomllib
import zipfile
from pathlib import Path

from clean_environment import CleanEnvironment


def test_holds_packages_configuration_and_licence(root: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    expected = set()
    for source, target in (("platform", ""), ("plugins", ""), ("conf", "lightrail/conf/")):
        files = (file for file in (root / source).rglob("*") if file.is_file() and "__pycache__" not in file.parts)
        expected |= {f"{target}{file.relative_to(root / source).as_posix()}" for file in files}
    assert "lightrail/conf/train.yaml" in expected
    assert expected <= held
    metadata = {name for name in held if ".dist-info/" in name}
    assert {name.partition("/")[2] for name in metadata} >= {"licenses/LICENSE", "entry_points.txt", "METADATA"}
    assert held == expected | metadata, "the wheel holds something else too"


def test_registers_commands_and_plugins(root: Path, wheel: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(".dist-info/entry_points.txt"))
        registered = configparser.ConfigParser(delimiters=("=",))
        registered.read_string(archive.read(name).decode())
    assert {group: dict(registered[group]) for group in registered.sections()} == {
        **project["entry-points"],
        "console_scripts": project["scripts"],
    }


def test_trains_from_an_empty_folder(clean: CleanEnvironment, tmp_path: Path) -> None:
    work, runs = tmp_path / "work", tmp_path / "runs"
    work.mkdir()
    done = clean.run("train", "trainer.max_epochs=1", f"run.root={runs}", cwd=work)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "accuracy" in done.stdout
    (folder,) = runs.iterdir()
    assert str(folder / "report.html") in done.stdout
    assert {"config.yaml", "lock.json", "metrics.csv", "summary.json", "report.html"} <= {
        file.name for file in folder.iterdir()
    }
    lock = (folder / "lock.json").read_text(encoding="utf-8")
    assert "lightrail_starter" in lock
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8"))["steps"] > 0
    assert list(work.iterdir()) == [], "a run writes into its folder alone"


def test_imports_nothing_of_the_checkout(clean: CleanEnvironment, root: Path, tmp_path: Path) -> None:
    program = (
        "import lightrail, lightrail_starter, sys; print(lightrail.__file__, lightrail_starter.__file__, sys.path)"
    )
    done = clean.run("python", "-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(clean.folder / "lib")) >= 3
    assert str(root / "platform") not in done.stdout
    assert str(root / "plugins") not in done.stdout
