"""A job: an order that somebody was asked to carry out. What is known of it lies in its run folder."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightrail.files import replace_file

__all__ = ["Job", "JobState", "jobs_under"]

_PLACE = Path("launch") / "job.json"
_OUTCOME = Path("launch") / "outcome.json"

PHASES = ("pending", "running", "finished", "failed", "stopped", "lost")


@dataclass(frozen=True)
class JobState:
    """How a job fares.

    Args:
        phase: ``pending`` (in a queue, or between two starts), ``running``; or over: ``finished``, ``failed``,
            ``stopped`` (asked to; it can go on), ``lost`` (nobody knows it any more, and it left no outcome).
        reason: Why, in words: of a failure, of waiting.
    """

    phase: str
    reason: str = ""

    @property
    def is_over(self) -> bool:
        return self.phase not in ("pending", "running")


@dataclass(frozen=True)
class Job:
    """An order that was handed over.

    Args:
        folder: The run folder.
        launch: The name of the launch that started it.
        number: By which it is known there.
        options: Those of the launch.
        submitted: When, in seconds since 1970.
        known: What else the launch needs to find it again.
    """

    folder: Path
    launch: str
    number: str
    options: Mapping[str, Any] = field(default_factory=dict)
    submitted: float = field(default_factory=time.time)
    known: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Job | None:
        """The job of a run folder; ``None`` where it was handed to nobody."""
        try:
            return cls(**{**json.loads((folder / _PLACE).read_bytes()), "folder": folder})
        except OSError:
            return None

    def keep(self) -> Job:
        """Writes it into its run folder, so that any process can find it again."""
        content = {key: value for key, value in asdict(self).items() if key != "folder"}
        replace_file(self.folder / _PLACE, json.dumps(content, indent=1, default=str).encode())
        return self

    def outcome(self) -> JobState | None:
        """How it ended, as its supervisor wrote; ``None`` while it has not."""
        return outcome_of(self.folder)

    def state(self) -> JobState:
        """How it fares: its own outcome where there is one, else what its launch says."""
        from lightrail.launch.choice import launch_of

        # Asked in this order: between the two answers it may end, but never begin again.
        asked = self.outcome() or launch_of(self).state(self)
        return (self.outcome() or asked) if asked.phase == "lost" else asked


def outcome_of(folder: Path) -> JobState | None:
    """How the order in a run folder ended; ``None`` while it has not."""
    try:
        content = json.loads((folder / _OUTCOME).read_bytes())
    except OSError:
        return None
    return JobState(content["phase"], content["reason"])


def write_outcome(folder: Path, state: JobState, **more: Any) -> None:
    """Writes how the order in a run folder ended."""
    content = {"phase": state.phase, "reason": state.reason, "time": time.time(), **more}
    replace_file(folder / _OUTCOME, json.dumps(content, indent=1).encode())


def clear_outcome(folder: Path) -> None:
    """The order goes on: one that was stopped or failed is started again."""
    (folder / _OUTCOME).unlink(missing_ok=True)


def jobs_under(root: Path) -> list[Job]:
    """Every job whose run folder lies under a folder, the newest last; those of sweeps too.

    Args:
        root: Where run folders are.
    """
    places = [*root.glob(f"*/{_PLACE}"), *root.glob(f"*/jobs/*/{_PLACE}")]
    found = [Job.of(place.parent.parent.resolve()) for place in places]
    return sorted((job for job in found if job is not None), key=lambda job: job.submitted)
