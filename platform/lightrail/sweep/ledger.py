"""The ledger of a sweep is its folder: what it is after in ``sweep.json``, and one run folder a trial under ``jobs``.

A trial's folder takes its name only once its order is complete, and how a trial fares is read from its folder alone, so
that whoever carries the sweep on finds it as it is.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightrail.errors import CheckpointError, RunFolderError
from lightrail.files import replace_file
from lightrail.launch.order import write_order

if TYPE_CHECKING:
    from lightrail.configuration import Composition

__all__ = ["Ledger", "Trial", "find_sweep", "newest_sweep", "trial_of"]

FILE = "sweep.json"
TRIAL = "trial.json"
_LABEL_LENGTH = 60


@dataclass(frozen=True)
class Trial:
    """One configuration of a sweep.

    Args:
        number: From 0, in the order of the sweep.
        values: What was given to each key that the sweep varies, as typed.
        folder: Its run folder.
    """

    number: int
    values: Mapping[str, str]
    folder: Path

    @property
    def words(self) -> str:
        """Its values as they are typed."""
        return " ".join(f"{key}={value}" for key, value in self.values.items()) or "(the default)"


@dataclass(frozen=True)
class Ledger:
    """A sweep in its folder.

    Args:
        folder: The sweep's folder.
        content: Of ``sweep.json``: ``command``, ``directory``, ``planned``, ``goal``, ``launch``, and where a method
            proposes the trials ``method``, ``space``, ``fixed`` and ``config_dirs``.
    """

    folder: Path
    content: Mapping[str, Any] = field(default_factory=dict)

    @property
    def planned(self) -> int:
        """How many trials the sweep has in the end."""
        return int(self.content["planned"])

    def write(self, **content: Any) -> Ledger:
        """Writes ``sweep.json``: from now on the sweep can be carried out.

        Args:
            content: See :class:`Ledger`.
        """
        replace_file(self.folder / FILE, (json.dumps(content, indent=1, default=str) + "\n").encode())
        return Ledger(self.folder, content)

    def trials(self) -> list[Trial]:
        """The trials that are written, by number."""
        places = [place.parent for place in self.folder.glob(f"jobs/*/{TRIAL}")]
        found = [trial_of(place) for place in places if not place.name.startswith(".")]
        return sorted((each for each in found if each is not None), key=lambda trial: trial.number)

    def order(self, number: int, values: Mapping[str, str], composition: Composition, planned: int) -> Trial:
        """Writes the order of a trial: wholly, or not at all.

        Args:
            number: From 0.
            values: What it gives to the keys that vary.
            composition: What was composed.
            planned: How many trials there are in the end.
        """
        with self._new_trial(number, values) as written:
            write_order(composition, written)
        return self._named(number, values, planned)

    def refused(self, number: int, values: Mapping[str, str], reason: str) -> Trial:
        """Writes a trial that cannot be carried out, which has failed before it began.

        Args:
            number: From 0.
            values: What it gives to the keys that vary.
            reason: Why.
        """
        from lightrail.launch.job import JobState, write_outcome

        with self._new_trial(number, values) as written:
            (written / "launch").mkdir()
            write_outcome(written, JobState("failed", reason))
        return self._named(number, values, self.planned)

    @contextmanager
    def _new_trial(self, number: int, values: Mapping[str, str]) -> Iterator[Path]:
        """A folder under a name that no reader looks at, until it is complete."""
        jobs = self.folder / "jobs"
        written = jobs / f".{number}"
        shutil.rmtree(written, ignore_errors=True)
        (written / "checkpoints").mkdir(parents=True)
        yield written
        replace_file(written / TRIAL, json.dumps({"number": number, "values": dict(values)}).encode())

    def _named(self, number: int, values: Mapping[str, str], planned: int) -> Trial:
        folder = self.folder / "jobs" / folder_name(number, values, planned)
        os.replace(folder.with_name(f".{number}"), folder)
        return Trial(number, dict(values), folder)

    @contextmanager
    def held(self) -> Iterator[None]:
        """The sweep in one process's hands.

        Raises:
            RunFolderError: Another one has it.
        """
        with open(self.folder / "lock", "a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise RunFolderError(
                    f"the sweep {self.folder.name} is being carried out already",
                    found=f"another `train`, {lock.read().strip() or 'of an unknown process'}",
                    allowed="one that carries a sweep out at a time",
                    remedy=f"Follow it with `lightrail sweep {self.folder}`, or stop the other with Ctrl-C first.",
                ) from None
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {os.uname().nodename}")
            lock.flush()
            yield


def trial_of(folder: Path) -> Trial | None:
    """The trial whose run folder this is; ``None`` where it is no trial of a sweep."""
    try:
        content = json.loads((folder / TRIAL).read_bytes())
        return Trial(content["number"], content["values"], folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def folder_name(number: int, values: Mapping[str, str], planned: int) -> str:
    """A folder's name that tells the trial, in characters that need no quotes anywhere.

    Args:
        number: From 0.
        values: What it gives to the keys that vary.
        planned: How many trials there are.

    Example:
        >>> folder_name(3, {"optimizer": "adamw", "optimizer.lr": "1e-3", "seed": "0"}, 18)
        '03_adamw_lr-1e-3_seed-0'
    """
    words = [value if "." not in key and key != "seed" else f"{key.rpartition('.')[2]}-{value}"
             for key, value in values.items()]  # fmt: skip
    safe = [re.sub(r"[^A-Za-z0-9.+-]+", "-", word).strip("-.") for word in words]
    label = "_".join(word for word in safe if word)[:_LABEL_LENGTH].rstrip("-._")
    return f"{number:0{len(str(max(planned - 1, 0)))}}" + (f"_{label}" if label else "")


def find_sweep(wanted: str, root: Path) -> Ledger:
    """The sweep that a user names.

    Args:
        wanted: Its folder, or ``latest``.
        root: Where run folders are.

    Raises:
        CheckpointError: There is none, or it was never complete.
    """
    if wanted == "latest":
        return newest_sweep(root)
    path = Path(wanted).resolve()
    try:
        return Ledger(path, json.loads((path / FILE).read_bytes()))
    except (OSError, ValueError) as error:
        never = (path / "jobs").is_dir()
        raise CheckpointError(
            f"the sweep {path.name} was never complete: it ended while its orders were being written, and none of its "
            "jobs was started"
            if never
            else f"{wanted} is no sweep",
            found=f"{path / FILE}: {error.strerror if isinstance(error, OSError) else error}",
            allowed=f"a folder that `train -m` made, with {FILE}, or latest",
            remedy="Start it anew with the same `train -m`; this folder can be removed."
            if never
            else f"Name another folder; sweeps lie under run.root, which is {root} here.",
        ) from error


def newest_sweep(root: Path) -> Ledger:
    """The sweep under a folder that was begun last.

    Raises:
        CheckpointError: There is none.
    """
    found: Sequence[Path] = list(root.glob(f"*/{FILE}"))
    if not found:
        raise CheckpointError(
            "there is no sweep",
            found=f"no {FILE} in any folder of {root}",
            allowed="a sweep that was begun with `train -m`",
            remedy="Begin one with `train -m`, or say where runs are: run.root=FOLDER, or --root FOLDER.",
        )
    return find_sweep(str(max(found, key=lambda path: path.stat().st_mtime_ns).parent), root)
