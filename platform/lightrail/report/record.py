"""What the files of a run folder say of the run, as far as they are there and readable."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lightrail.errors import UserError
from lightrail.report.metrics import read_metrics

__all__ = ["RunRecord"]

T = TypeVar("T")


@dataclass(frozen=True)
class RunRecord:
    """One run, read from its folder.

    Args:
        folder: The run folder.
        metrics: The curves of ``metrics.csv``.
        config: The text of ``config.yaml``.
        lock: The contents of ``lock.json``.
        summary: The contents of ``summary.json``.
        privacy: The contents of ``privacy.json``, which only private runs have.
        federated: The contents of ``federated.json``, which only federated runs have.
        missing: For each file that could not be read, why.
    """

    folder: Path
    metrics: Mapping[str, list[tuple[int, float]]] = field(default_factory=dict)
    config: str = ""
    lock: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    privacy: Mapping[str, Any] = field(default_factory=dict)
    federated: Mapping[str, Any] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """Reads whatever of the files is there."""
        missing: dict[str, str] = {}

        def attempt(name: str, read: Callable[[Path], T], otherwise: T) -> T:
            try:
                return read(folder / name)
            except FileNotFoundError:
                missing[name] = f"{name} is not in this folder."
            except UserError as error:
                missing[name] = f"{error.what}: {error.found}."
            except (OSError, ValueError) as error:
                missing[name] = f"{name} could not be read: {error}."
            return otherwise

        return cls(
            folder,
            metrics=attempt("metrics.csv", read_metrics, {}),
            config=attempt("config.yaml", lambda path: path.read_text(encoding="utf-8"), ""),
            lock=attempt("lock.json", _mapping, {}),
            summary=attempt("summary.json", _mapping, {}),
            privacy=attempt("privacy.json", _mapping, {}),
            federated=attempt("federated.json", _mapping, {}),
            missing=missing,
        )

    @property
    def is_generation(self) -> bool:
        """Whether it is of samples that were drawn rather than of a model that was trained."""
        return self.summary.get("command") == "generate"

    @property
    def is_private_by_plan(self) -> bool:
        """Whether privacy was asked for, whatever came of it."""
        plugins = self.lock.get("plugins") or ()
        return bool(self.privacy) or "privacy" in self.summary or any(p.get("kind") == "privacy" for p in plugins)

    @property
    def name(self) -> str:
        return str(self.summary.get("name") or self.folder.resolve().name)


def _mapping(path: Path) -> Mapping[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__} where names and values should be")
    return content
