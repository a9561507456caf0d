"""Finding the run that ``run.resume`` names, and the overrides that it was composed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightrail.errors import CheckpointError
from lightrail.launch.node import is_held
from lightrail.run.folder import RunFolder, newest_run

__all__ = ["Resumed", "find_resumed"]

# What belongs to one start of a run rather than to the run.
_OF_ONE_START = ("run.resume", "run.accept_changes", "run.root", "run.name")


@dataclass(frozen=True)
class Resumed:
    """A run that is to be continued.

    Args:
        folder: Its folder, where the continued run goes on; ``None`` for a checkpoint that was moved out of one.
        checkpoint: From which checkpoint.
        lock: What it was made of.
    """

    folder: RunFolder | None
    checkpoint: Path
    lock: dict[str, Any]

    def overrides(self, typed: Sequence[str]) -> list[str]:
        """The run's own overrides, with those that the user typed now coming after and winning."""
        kept = [o for o in self.lock["overrides"] if _key(o) not in _OF_ONE_START]
        return [*kept, *typed]


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def find_resumed(overrides: Sequence[str]) -> Resumed | None:
    """The run that the overrides ask to continue; ``None`` where they ask for none.

    Args:
        overrides: What was typed.

    Raises:
        CheckpointError: There is no such run, or it has no checkpoint.
    """
    typed = {_key(o): o.partition("=")[2].strip("'\"") for o in overrides}
    wanted = typed.get("run.resume")
    if wanted in (None, "", "null"):
        return None
    folder, checkpoint = _locate(wanted, Path(typed.get("run.root", "runs")))
    if not checkpoint.is_file():
        raise CheckpointError(
            f"there is nothing to resume at {wanted}",
            found="a folder without checkpoints/last.ckpt" if Path(wanted).is_dir() else "no such file or folder",
            allowed="a run folder, a checkpoint in one, or 'latest'",
            remedy="Look for a run with a checkpoint under run.root, or start anew.",
        )
    if folder is not None and is_held(folder.path):
        raise CheckpointError(
            f"the run at {folder.path} is being carried out at this very moment",
            found="a process that holds its lock",
            allowed="a run that has ended, or was stopped",
            remedy=f"Wait for it, or stop it with `lightrail jobs {folder.path} --cancel`.",
        )
    return Resumed(folder, checkpoint, _lock_inside(checkpoint) if folder is None else folder.read_lock())


def _locate(wanted: str, root: Path) -> tuple[RunFolder | None, Path]:
    if wanted == "latest":
        folder = newest_run(root)
        return folder, folder.last
    path = Path(wanted).resolve()
    if path.is_dir():
        folder = RunFolder(path)
        return folder, folder.last
    folder = RunFolder(path.parent.parent)
    return (folder if path.parent.name == "checkpoints" and folder.lock.is_file() else None), path


def _lock_inside(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint that was moved out of its folder carries its lock."""
    from lightrail.run.checkpoint import load_checkpoint

    return dict(load_checkpoint(checkpoint)["lightrail"]["lock"])
