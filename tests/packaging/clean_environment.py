"""A virtual environment with the wheel and no checkout, and the building of wheels for it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CleanEnvironment", "build_wheel", "make_environment", "write_package"]

# What would let a checkout, or the account of whoever runs the tests, reach into the environment.
_LEAKS = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "WANDB_API_KEY")


@dataclass(frozen=True)
class CleanEnvironment:
    """A virtual environment that sees the dependencies of this one, but nothing editable.

    Args:
        folder: Where it lies.
    """

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def run(self, command: str, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Runs one of its commands, as typed into a shell where it is active."""
        variables = {name: value for name, value in os.environ.items() if name not in _LEAKS}
        variables |= {
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{variables['PATH']}",
            "LIGHTRAIL_CACHE": str(self.folder / "cache"),
            "WANDB_MODE": "offline",
            "COLUMNS": "200",
        }
        return subprocess.run(
            [self.folder / "bin" / command, *words],
            cwd=cwd,
            env=variables,
            capture_output=True,
            text=True,
            timeout=300,
            stdin=subprocess.DEVNULL,
        )

    def install(self, *wheels: Path) -> None:
        self._pip("install", "--no-deps", "--no-index", *map(str, wheels))

    def uninstall(self, *distributions: str) -> None:
        self._pip("uninstall", "--yes", *distributions)

    @contextmanager
    def having(self, wheels: Mapping[str, Path]) -> Iterator[None]:
        """Has wheels installed for a while.

        Args:
            wheels: Each under the name of its distribution.
        """
        self.install(*wheels.values())
        try:
            yield
        finally:
            self.uninstall(*wheels)

    def _pip(self, *words: str) -> None:
        _checked([sys.executable, "-m", "pip", "--python", str(self.python), "--quiet", *words])


def make_environment(folder: Path, wheel: Path) -> CleanEnvironment:
    """A fresh environment with one wheel; its dependencies are those of the interpreter that runs the tests."""
    _checked([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    environment = CleanEnvironment(folder)
    environment.install(wheel)
    # A .pth file may add folders to the path, but the .pth files in those are not read: the editable checkout, which
    # is one of them, stays out.
    paths = {"base": str(folder), "platbase": str(folder)}
    place = Path(sysconfig.get_path("purelib", scheme="venv", vars=paths))
    shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (place / "shared_dependencies.pth").write_text("\n".join(shared) + "\n", encoding="utf-8")
    return environment


def build_wheel(project: Path, into: Path) -> Path:
    """The wheel of a project, built with the tools that are installed here."""
    _checked([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(into), str(project)])
    (wheel,) = into.glob("*.whl")
    return wheel


def write_package(folder: Path, files: Mapping[str, str]) -> Path:
    """A project folder with these files."""
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return folder


def _checked(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
