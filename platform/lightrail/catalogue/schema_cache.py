"""The schemas of installed plugins, kept on disk.

An entry holds as long as the distribution, its version, what it registers and the files behind it are unchanged. The
cache saves time and nothing else: without one, or with a damaged one, every answer is the same.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightrail.catalogue.distributions import environment
from lightrail.catalogue.schema import Schema
from lightrail.catalogue.stamps import stamped, unchanged
from lightrail.catalogue.storage import read_entries, write_entries

__all__ = ["Source", "read_schemas"]

# How long one plugin may take to import before it counts as broken, in seconds.
PATIENCE = 120.0
_SUBJECT_FILES = (
    "annotations.py",
    "docstrings.py",
    "forms.py",
    "reading.py",
    "schema.py",
    "signature.py",
    "../kinds.py",
    "../traits.py",
)


@dataclass(frozen=True)
class Source:
    """Where a schema comes from.

    Args:
        kind: The kind of plugin.
        target: ``module.Class``.
        origin: What registers it: distribution and version; empty for a path that the user typed.
        location: The metadata folder of that distribution; for a path that was typed, the folder where.
    """

    kind: str
    target: str
    origin: str = ""
    location: str = ""

    @classmethod
    def typed(cls, kind: str, target: str) -> Source:
        """The source behind a path that the user typed in the current folder."""
        return cls(kind, target, "", os.getcwd())

    @property
    def key(self) -> str:
        return "\n".join((self.kind, self.target, self.origin, self.location))


def read_schemas(sources: Sequence[Source], *, in_process: bool | None = None) -> dict[Source, Schema | str]:
    """The schema of each source, or the reason why it is broken.

    Args:
        sources: What to read.
        in_process: Whether stale ones may be imported here; ``None`` for where torch is imported already.
    """
    form = _form()
    now = _environment_stamp()
    cache = read_entries("schemas", form)
    found = {each: _decoded(cache.get(each.key), now) for each in sources}
    stale = [each for each, schema in found.items() if schema is None]
    if stale:
        here = ("torch" in sys.modules) if in_process is None else in_process
        fresh = _read_here(stale) if here or not sys.executable else _read_apart(stale)
        for source, entry in fresh.items():
            found[source] = Schema.from_dict(entry["schema"]) if entry["schema"] else entry["reason"]
            # A path that the user typed wrongly is not worth keeping.
            if entry["schema"] or source.origin:
                cache[source.key] = {**entry, "environment": now}
        write_entries("schemas", form, {key: entry for key, entry in cache.items() if _is_there(key)})
    return {source: schema for source, schema in found.items() if schema is not None}


def _form() -> str:
    """Changes whenever this package would read the same plugin differently."""
    here = os.path.dirname(__file__)
    return json.dumps(list(stamped(os.path.join(here, file) for file in _SUBJECT_FILES).values()))


def _environment_stamp() -> str:
    return " ".join([environment().digest, *sys.path])


def _is_there(key: str) -> bool:
    location = key.rpartition("\n")[2]
    return not location or os.path.exists(location)


def _decoded(entry: Mapping[str, Any] | None, now: str) -> Schema | str | None:
    """What an entry says; ``None`` where it is stale or damaged."""
    try:
        if entry is None or not unchanged(entry["files"]):
            return None
        if entry["schema"]:
            return Schema.from_dict(entry["schema"])
        # What a broken plugin lacked may have been installed.
        return str(entry["reason"]) if entry["environment"] == now else None
    except (KeyError, TypeError, AttributeError):
        return None


def _read_here(sources: Sequence[Source]) -> dict[Source, dict[str, Any]]:
    from lightrail.catalogue.reading import read_plugin

    return {source: read_plugin(source.kind, source.target) for source in sources}


def _read_apart(sources: Sequence[Source]) -> dict[Source, dict[str, Any]]:
    """Reads in another process; when that process ends early, the plugin that it was at is broken, not the rest."""
    if sys.stderr.isatty():
        number = len(sources)
        print(f"reading the signatures of {number} plugin{'s' if number > 1 else ''}…", file=sys.stderr)
    found: dict[Source, dict[str, Any]] = {}
    remaining = list(sources)
    while remaining:
        answers, end = _ask_process([(each.kind, each.target) for each in remaining])
        found.update(zip(remaining, answers, strict=False))
        remaining = remaining[len(answers) :]
        if remaining:
            ended = remaining.pop(0)
            found[ended] = {"schema": None, "reason": end, "files": stamped(_likely_files(ended.target))}
    return found


def _ask_process(request: list[tuple[str, str]]) -> tuple[list[dict[str, Any]], str]:
    """The answers for the first plugins of a request, and how the process ended."""
    import subprocess
    import tempfile

    with tempfile.TemporaryDirectory(prefix="lightrail-") as folder:
        request_file, answer_file = Path(folder, "request.json"), Path(folder, "answer.jsonl")
        request_file.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", "lightrail.catalogue.reading", str(request_file), str(answer_file)]
        surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path)}
        silent = subprocess.DEVNULL
        try:
            done = subprocess.run(
                command, env=surroundings, stdin=silent, stdout=silent, stderr=silent, timeout=PATIENCE + len(request)
            )
            end = f"importing it ended the process with status {done.returncode}"
        except subprocess.TimeoutExpired:
            end = f"importing it takes longer than {PATIENCE:.0f} s"
        lines = answer_file.read_text(encoding="utf-8").splitlines() if answer_file.exists() else []
    return [json.loads(line) for line in lines], end


def _likely_files(target: str) -> list[str]:
    """The files of a module, found without importing it."""
    parts = target.split(".")[:-1]
    folders = [os.path.abspath(path) for path in sys.path]
    files = []
    for part in parts:
        files += [os.path.join(folder, name) for folder in folders for name in (f"{part}.py", f"{part}/__init__.py")]
        folders = [os.path.join(folder, part) for folder in folders]
    return files
