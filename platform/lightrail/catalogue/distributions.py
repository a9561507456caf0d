"""What is installed, read from the metadata on disk: names, versions and entry points, without importing anything.

``importlib.metadata`` parses every file of every distribution; with hundreds of them that alone takes longer than a
command line may. Only distributions that name a ``lightrail.`` group are read further here.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from lightrail.kinds import ENTRY_POINT_PREFIX

__all__ = ["Distribution", "Entry", "Environment", "environment", "normalised", "requirements"]

_SUFFIXES = (".dist-info", ".egg-info")
_ENTRY = re.compile(r"(?P<name>[^=]+?)\s*=\s*(?P<value>[\w.]+(?::[\w.]+)?)\s*(?:\[(?P<extras>[^\]]*)\])?\s*(?:#.*)?$")
# The usual marker; any other is left to `packaging`, whose import takes longer than a whole listing may.
_EXTRA_ALONE = re.compile(r"""(?P<name>[\w.-]+)[^;]*;\s*extra\s*==\s*["'](?P<extra>[\w.-]+)["']\s*""")


@dataclass(frozen=True)
class Entry:
    """One line of a ``lightrail.`` group of entry points; ``group`` stands here without the prefix."""

    group: str
    name: str
    value: str
    extras: tuple[str, ...] = ()


@dataclass(frozen=True)
class Distribution:
    """A distribution that registers something here.

    Args:
        name: As its metadata spells it.
        version: Its version.
        location: Its metadata folder.
        entries: What it registers.
    """

    name: str
    version: str
    location: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True, eq=False)
class Environment:
    """Everything that is installed.

    Args:
        distributions: Those that register something, in the order of ``sys.path``.
        names: The normalised names of all.
        digest: Changes whenever a distribution comes, goes or changes its version.
    """

    distributions: tuple[Distribution, ...]
    names: frozenset[str] = field(repr=False)
    digest: str


_remembered: dict[tuple[tuple[str, int], ...], Environment] = {}


def environment() -> Environment:
    """What is installed now; read again only when a folder of ``sys.path`` has changed."""
    stamps = tuple((path, _modified(path)) for path in dict.fromkeys(sys.path))
    if (known := _remembered.get(stamps)) is not None:
        return known
    found = _read([path for path, modified in stamps if modified])
    # A second change within one tick of the file system's clock would go unseen.
    if all(time.time_ns() - modified > 100_000_000 for _, modified in stamps):
        _remembered.clear()
        _remembered[stamps] = found
    return found


def _modified(path: str) -> int:
    try:
        return os.stat(path or ".").st_mtime_ns
    except OSError:
        return 0


def _read(paths: list[str]) -> Environment:
    found: dict[str, str] = {}
    for path in paths:
        for folder in _metadata_folders(path):
            # The first on the path is the one that Python imports.
            found.setdefault(normalised(_stem(folder)), folder)
    digest = hashlib.sha256("\n".join(sorted(found.values())).encode()).hexdigest()
    distributions = [each for folder in found.values() if (each := _distribution(folder)) is not None]
    return Environment(tuple(distributions), frozenset(found), digest)


def _metadata_folders(path: str) -> Iterator[str]:
    try:
        with os.scandir(path or ".") as items:
            names = sorted(item.name for item in items if item.name.endswith(_SUFFIXES))
    except OSError:
        return
    yield from (os.path.join(path, name) for name in names)


def _stem(folder: str) -> str:
    return os.path.basename(folder).rsplit(".", 1)[0].split("-", 1)[0]


def normalised(name: str) -> str:
    """A distribution's name as indexes compare it.

    Example:
        >>> normalised("My_Plugins.Extra")
        'my-plugins-extra'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def _distribution(folder: str) -> Distribution | None:
    try:
        with open(os.path.join(folder, "entry_points.txt"), encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError):
        return None
    if f"[{ENTRY_POINT_PREFIX}" not in text:
        return None
    headers = dict(reversed([*_headers(folder)]))
    name = headers.get("name", _stem(folder))
    return Distribution(name, headers.get("version", "unknown"), folder, tuple(_entries(text)))


def _entries(text: str) -> Iterator[Entry]:
    group = ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("["):
            group = line.strip("[]").strip()
        elif group.startswith(ENTRY_POINT_PREFIX) and not line.startswith("#") and (match := _ENTRY.match(line)):
            extras = tuple(extra.strip() for extra in (match["extras"] or "").split(",") if extra.strip())
            yield Entry(group.removeprefix(ENTRY_POINT_PREFIX), match["name"], match["value"], extras)


def _headers(folder: str) -> Iterator[tuple[str, str]]:
    for file_name in ("METADATA", "PKG-INFO"):
        try:
            with open(os.path.join(folder, file_name), encoding="utf-8", errors="replace") as file:
                for line in file:
                    if not line.strip():
                        return
                    key, separator, value = line.partition(":")
                    if separator and not line[0].isspace():
                        yield key.lower(), value.strip()
            return
        except OSError:
            continue


def requirements(location: str, extra: str) -> list[str]:
    """The normalised names of the distributions that an extra asks for on this machine.

    Args:
        location: The metadata folder of the distribution that offers the extra.
        extra: Its name.
    """
    asked = [value for key, value in _headers(location) if key == "requires-dist" and "extra" in value]
    return [name for text in asked if (name := _asked_by(text, extra))]


def _asked_by(requirement: str, extra: str) -> str:
    """The normalised name of a requirement that an extra adds here; empty where it adds nothing."""
    if (match := _EXTRA_ALONE.fullmatch(requirement)) is not None:
        return normalised(match["name"]) if match["extra"] == extra else ""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        read = Requirement(requirement)
    except InvalidRequirement:
        return ""
    marker = read.marker
    adds = marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})
    return normalised(read.name) if adds else ""
