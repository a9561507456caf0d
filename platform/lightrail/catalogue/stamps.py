"""Whether files are as they were."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

__all__ = ["stamped", "unchanged"]


def _stamp(file: str) -> list[int] | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return [status.st_mtime_ns, status.st_size]


def stamped(files: Iterable[str]) -> dict[str, list[int]]:
    """The time and the size of each file or folder that exists."""
    return {file: found for file in sorted(set(files)) if (found := _stamp(file)) is not None}


def unchanged(stamps: Mapping[str, list[int]]) -> bool:
    """Whether every file is as it was when it was stamped."""
    return all(_stamp(file) == before for file, before in stamps.items())
