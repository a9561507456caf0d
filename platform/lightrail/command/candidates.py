"""``lightrail complete``: how the word under the cursor may go on."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

from lightrail.catalogue.plugin import available, find, registered
from lightrail.catalogue.schema import Schema
from lightrail.catalogue.schema_cache import Source, read_schemas
from lightrail.configuration.help import options_of_group
from lightrail.configuration.snapshot import Snapshot, snapshot
from lightrail.errors import UserError
from lightrail.kinds import KINDS

__all__ = ["candidates", "main"]

_FLAGS = {
    "train": ("--cfg", "--config-dir", "--help", "--multirun", "--version"),
    "generate": ("--cfg", "--config-dir", "--help", "--version"),
}
_COMMANDS = ("bench", "completion", "federated", "jobs", "plugins", "privacy", "search", "sweep", "--help", "--version")


def main(arguments: Sequence[str]) -> int:
    """Prints one candidate a line.

    Args:
        arguments: The words of the command line up to the cursor, the command first; the last may be empty.
    """
    words = list(arguments[1:] if arguments[:1] == ["--"] else arguments)
    for candidate in candidates(words):
        print(candidate)
    return 0


def candidates(words: Sequence[str]) -> list[str]:
    """The words that the last one may become; none where the line is wrong already.

    Args:
        words: The command line up to the cursor, the command first.
    """
    if len(words) < 2:
        return []
    command, *before, current = words
    command = os.path.basename(command)
    try:
        if command == "lightrail" and len(before) > 1 and before[0] == "search":
            return _of_run("search", before[2:], current)
        if command == "lightrail":
            found = _of_lightrail(before)
        elif current.startswith("-"):
            found = _FLAGS.get(command, ())
        else:
            return _of_run(command, before, current)
    except UserError:
        return []
    return sorted(each for each in found if each.startswith(current))


def _of_lightrail(before: Sequence[str]) -> Iterable[str]:
    if not before:
        return _COMMANDS
    if before[-1] == "--kind":
        return KINDS
    if before[0] == "plugins":
        return ("--batch-size", "--json", "--kind", "--plot", *{plugin.name for plugin in registered()})
    if before[0] == "search":
        return available("search")
    if before[0] == "privacy":
        return ("plan", "audit") if len(before) == 1 else ()
    return ("bash", "fish", "zsh") if before[0] == "completion" else ()


def _of_run(command: str, before: Sequence[str], current: str) -> list[str]:
    match = re.fullmatch(r"""(?P<opening>["']?\+{0,2}|~)(?P<word>.*)""", current)
    if match is None:
        return []
    opening, word = match["opening"], match["word"]
    typed = [each.strip("\"'").lstrip("+") for each in before]
    config_dirs = [before[place + 1] for place, each in enumerate(before[:-1]) if each == "--config-dir"]
    experiment = [each for each in typed if each.startswith("experiment=")][-1:]
    found = snapshot(command, experiment, config_dirs)
    key, separator, value = word.partition("=")
    names = _values(found, typed, key, value) if separator else _keys(found, typed, key)
    prefix = f"{key}=" if separator else ""
    return [f"{opening}{prefix}{name}" for name in names if name.startswith(value if separator else key)]


def _keys(found: Snapshot, typed: Sequence[str], key: str) -> list[str]:
    """Groups and roots, or the keys within one of them once a dot is typed."""
    parent, dot, _ = key.rpartition(".")
    if dot:
        return sorted(f"{parent}.{name}" for name in _children(found, typed, parent))
    settings = {root: node for root, node in found.config.items() if root not in found.groups}
    roots = [f"{root}." if isinstance(node, dict) else f"{root}=" for root, node in settings.items()]
    chosen = [
        f"{group}." for group in found.groups if isinstance(found.config.get(group), dict) or _choice(typed, group)
    ]
    return sorted({*roots, *chosen, *(f"{group}=" for group in found.groups)})


def _children(found: Snapshot, typed: Sequence[str], parent: str) -> list[str]:
    schema = _schema(found, typed, parent)
    if schema is not None:
        return [f"{parameter.name}=" for parameter in schema.parameters]
    if parent in KINDS and KINDS[parent].many:
        return [f"{name}." for name in _chosen_names(found, typed, parent)]
    node: Any = found.config
    for part in parent.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return [f"{key}." if isinstance(value, dict) else f"{key}=" for key, value in (node or {}).items()]


def _values(found: Snapshot, typed: Sequence[str], key: str, value: str) -> list[str]:
    if key in found.groups:
        options = options_of_group(key, found)
        if not value.startswith("["):
            return options
        *done, _ = re.split(r",\s*", value[1:])
        start = f"[{','.join(done)}{',' if done else ''}"
        return [f"{start}{name}" for name in options if name not in done]
    parent, _, name = key.rpartition(".")
    schema = _schema(found, typed, parent) if parent else None
    if schema is not None:
        parameter = schema.parameter(name)
        return _spelled(parameter.form) if parameter is not None else []
    node: Any = found.config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return ["false", "true"] if isinstance(node, bool) else []


def _spelled(form: Any) -> list[str]:
    """The values of a form that are few enough to be listed."""
    match form["is"]:
        case "bool":
            return ["false", "true"]
        case "none":
            return ["null"]
        case "literal":
            return [str(value) for value in form["values"] if value is not None]
        case "union":
            spelled = [word for each in form["of"] for word in _spelled(each)]
            return spelled if set(spelled) - {"null"} else []
        case _:
            return []


def _choice(typed: Sequence[str], group: str) -> str:
    """What the words before chose in a group; the last counts."""
    return next((each.partition("=")[2] for each in reversed(typed) if each.startswith(f"{group}=")), "")


def _chosen_names(found: Snapshot, typed: Sequence[str], kind: str) -> list[str]:
    chosen = [name.strip() for name in _choice(typed, kind).strip("[]").split(",") if name.strip()]
    return chosen or [path.partition(".")[2] for path in found.sources if path.startswith(f"{kind}.")]


def _schema(found: Snapshot, typed: Sequence[str], path: str) -> Schema | None:
    """The schema behind a node: of what was chosen on the line, else of what stands there by default."""
    kind, _, name = path.partition(".")
    if kind not in KINDS or KINDS[kind].many != bool(name):
        return None
    option = name or _choice(typed, kind)
    source = found.sources.get(path)
    if option and (name == "" or source is None):
        source = Source.typed(kind, option) if "." in option else find(kind, option).source
    schema = read_schemas([source])[source] if source is not None else None
    return schema if isinstance(schema, Schema) else None
