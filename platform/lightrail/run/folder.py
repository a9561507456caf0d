"""The run folder: everything that a run leaves behind, in one place."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightrail.errors import CheckpointError, RunFolderError
from lightrail.files import replacing

__all__ = ["RunFolder", "newest_run"]

# A process that this one starts to be another rank finds its folder here.
FOLDER_VARIABLE = "LIGHTRAIL_RUN_FOLDER"


@dataclass(frozen=True)
class RunFolder:
    """The files of one run.

    Args:
        path: The folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def lock(self) -> Path:
        return self.path / "lock.json"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def last(self) -> Path:
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def best(self) -> Path:
        return self.path / "checkpoints" / "best.ckpt"

    @classmethod
    def create(cls, root: Path, name: str | None, title: str, *, bare: bool = False) -> RunFolder:
        """Makes a new folder under ``root``.

        Args:
            root: Where run folders go.
            name: The folder's name; ``None`` for the time and ``title``.
            title: What distinguishes the run: data, model, optimizer.
            bare: Whether the folder needs no place for checkpoints.

        Raises:
            RunFolderError: The folder exists already or cannot be made.
        """
        stem = name or f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{title}"
        for attempt in range(1000):
            path = root / (stem if attempt == 0 else f"{stem}-{attempt + 1}")
            try:
                path.mkdir(parents=True, exist_ok=False)
                if not bare:
                    (path / "checkpoints").mkdir()
                return cls(path.resolve())
            except FileExistsError as error:
                # A name that the user chose is never changed in silence; the time is only a suggestion.
                if name is not None or not path.is_dir():
                    raise RunFolderError(
                        f"the run folder {path} exists already",
                        found="a run of that name",
                        allowed="a name that is not taken",
                        remedy=f"Choose another run.name, or continue that run with run.resume={path}.",
                    ) from error
            except OSError as error:
                raise RunFolderError(
                    f"the run folder {path} cannot be made",
                    found=error.strerror or str(error),
                    allowed="a folder that can be written",
                    remedy="Choose another place with run.root=FOLDER.",
                ) from error
        raise AssertionError("a thousand runs within one second")

    def write_json(self, path: Path, content: Mapping[str, Any]) -> None:
        """Writes a JSON file, whole or not at all."""
        self.write_text(path, json.dumps(content, indent=2, default=str) + "\n")

    def write_text(self, path: Path, text: str) -> None:
        """Writes a text file, whole or not at all."""
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def read_lock(self) -> dict[str, Any]:
        """What the run was made of.

        Raises:
            CheckpointError: The folder is no run folder, or its lock cannot be read.
        """
        try:
            return json.loads(self.lock.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path} is not a run folder that can be resumed",
                found=f"lock.json: {error.strerror if isinstance(error, OSError) else error}",
                allowed="a folder that `train` made, with lock.json and checkpoints/last.ckpt",
                remedy="Name another folder with run.resume=FOLDER, or start anew.",
            ) from error


def newest_run(root: Path) -> RunFolder:
    """The run under ``root`` whose last checkpoint is the newest, those of sweeps among them.

    Raises:
        CheckpointError: There is none.
    """
    checkpoints = [*root.glob("*/checkpoints/last.ckpt"), *root.glob("*/jobs/*/checkpoints/last.ckpt")]
    if not checkpoints:
        raise CheckpointError(
            "there is no run to resume",
            found=f"no checkpoints/last.ckpt under {root}",
            allowed="a run that saved at least one checkpoint",
            remedy="Start one with `train`, or say where runs are with run.root=FOLDER.",
        )
    newest = max(checkpoints, key=lambda path: path.stat().st_mtime_ns)
    return RunFolder(newest.parent.parent.resolve())


def folder_from_environment() -> RunFolder | None:
    """The folder that the first rank made, for a process that it started."""
    path = os.environ.get(FOLDER_VARIABLE)
    return RunFolder(Path(path)) if path and os.environ.get("LOCAL_RANK", "0") != "0" else None
