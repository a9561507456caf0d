"""Small files that save time between two commands and that nothing depends on."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["cache_folder", "read_entries", "write_entries"]


def cache_folder() -> Path:
    """``LIGHTRAIL_CACHE``, else ``lightrail`` in ``XDG_CACHE_HOME``, else ``~/.cache/lightrail``."""
    if folder := os.environ.get("LIGHTRAIL_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "lightrail"


def _file(name: str) -> Path:
    place = hashlib.sha256(f"{sys.prefix} {sys.version}".encode()).hexdigest()[:16]
    return cache_folder() / f"{name}-{place}.json"


def read_entries(name: str, form: str) -> dict[str, Any]:
    """What is kept under a name for this environment; nothing where it is missing, damaged, or of another form."""
    try:
        data = json.loads(_file(name).read_text(encoding="utf-8"))
        return data["entries"] if data["form"] == form and isinstance(data["entries"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_entries(name: str, form: str, entries: Mapping[str, Any]) -> None:
    """Replaces what is kept under a name, in one step; where the folder cannot be written, nothing is kept."""
    import tempfile

    file, temporary = _file(name), ""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            json.dump({"form": form, "entries": entries}, handle)
        os.replace(temporary, file)
    except OSError:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
