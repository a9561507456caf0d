"""What is to be carried out, written once: no machine composes it again, so none can compose something else."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightrail.configuration.composition import Composition
from lightrail.configuration.written import composition_from, plain_composition
from lightrail.errors import CheckpointError
from lightrail.files import replace_file

if TYPE_CHECKING:
    from lightrail.run.run import Run

__all__ = ["Order", "read_order", "write_order"]

_PLACE = Path("launch") / "order.json"


@dataclass(frozen=True)
class Order:
    """A run that is to be carried out, in its run folder; carrying it out again goes on from its last checkpoint.

    Args:
        folder: The run folder.
        content: The composition, the lock of what it was composed from, where it was written, and from which
            checkpoint it starts.
        digest: Of the written file: what all processes of the run compare.
    """

    folder: Path
    content: Mapping[str, Any]
    digest: str

    @property
    def path(self) -> Path:
        """The file that it stands in."""
        return self.folder / _PLACE

    @property
    def workspace(self) -> Path:
        """Where launches and jobs keep files of their own."""
        return self.path.parent

    @property
    def trainer(self) -> Mapping[str, Any]:
        """The ``trainer`` group of its configuration."""
        return self.content["composition"]["config"]["trainer"]

    @property
    def command(self) -> list[str]:
        """The words that carry it out on a machine that shares the folder, with a supervisor around the run."""
        return [sys.executable, "-m", "lightrail.launch.node", str(self.folder)]

    @property
    def rank_command(self) -> list[str]:
        """The words that carry out one rank of it, without a supervisor."""
        return [sys.executable, "-m", "lightrail.train", "--order", str(self.folder)]

    @property
    def directory(self) -> Path:
        """The working directory in which it was written: relative paths and modules of the user's are found there."""
        return Path(self.content["directory"])

    def composition(self) -> Composition:
        """What was composed, with the plugins that are installed here."""
        return composition_from(self.content["composition"])

    def run(self) -> Run:
        """Builds the run: a new one, or one that goes on from the last checkpoint of its folder.

        Raises:
            UserError: What is installed here is not what it was composed from, or cannot be built.
        """
        from lightrail.run.build import build
        from lightrail.run.folder import RunFolder
        from lightrail.run.lock import check_lock, lock_of
        from lightrail.run.resume import Resumed

        composition = self.composition()
        lock = self.content["lock"]
        accept = bool(composition.config.run.accept_changes)
        check_lock(lock, lock_of(composition), accept_changes=accept)
        folder, checkpoint = RunFolder(self.folder), self._checkpoint()
        run = build(composition, Resumed(folder, checkpoint, dict(lock)) if checkpoint else None)
        run.order = self
        return run

    def _checkpoint(self) -> Path | None:
        """Where it goes on: what was saved since the order was written, else where the order says that it starts."""
        from lightrail.run.folder import RunFolder

        last, start = RunFolder(self.folder).last, self.content["checkpoint"]
        if last.exists() and last.stat().st_mtime_ns > self.path.stat().st_mtime_ns:
            return last
        return None if start is None else Path(start)


def write_order(composition: Composition, folder: Path, checkpoint: Path | None = None) -> Order:
    """Writes what was composed into a run folder.

    Args:
        composition: What was composed.
        folder: The run folder, which is there.
        checkpoint: Where the run starts, if not from the beginning.
    """
    from omegaconf import OmegaConf

    from lightrail.run.folder import RunFolder
    from lightrail.run.lock import lock_of

    run_folder = RunFolder(folder.resolve())
    lock = lock_of(composition)
    content = {
        "composition": plain_composition(composition),
        "lock": lock,
        "directory": os.getcwd(),
        "checkpoint": None if checkpoint is None else str(checkpoint),
    }
    path = run_folder.path / _PLACE
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(content, indent=1, default=str)
    run_folder.write_text(run_folder.config, OmegaConf.to_yaml(composition.config, resolve=True))
    run_folder.write_json(run_folder.lock, lock)
    replace_file(path, text.encode())
    return read_order(run_folder.path)


def read_order(folder: Path) -> Order:
    """The order in a run folder.

    Args:
        folder: The run folder.

    Raises:
        CheckpointError: There is none, or it cannot be read.
    """
    path = folder.resolve() / _PLACE
    try:
        text = path.read_bytes()
        content = json.loads(text)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"there is no order to carry out in {folder}",
            found=f"{path}: {error.strerror if isinstance(error, OSError) else error}",
            allowed="a run folder that `train launch=…` or `train -m` made, on a disk that every machine sees",
            remedy="Put run.root on a disk that is shared between the machines, or start the run anew.",
        ) from error
    return Order(folder.resolve(), content, hashlib.sha256(text).hexdigest())
