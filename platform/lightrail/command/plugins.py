"""``lightrail plugins``: what is installed, and what one plugin accepts."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightrail.catalogue.forms import shown
from lightrail.catalogue.plugin import Plugin, plugins, unknown_plugin
from lightrail.catalogue.schema import Parameter, Schema
from lightrail.errors import ConfigurationError, closest
from lightrail.kinds import KINDS

__all__ = ["as_objects", "main"]

_COLOURS = {"ready": "32", "broken": "31", "duplicate": "33", "bold": "1", "dim": "2"}


def main(arguments: Sequence[str]) -> int:
    """Prints the installed plugins.

    Args:
        arguments: The words after ``lightrail plugins``.
    """
    options = _read(arguments)
    if options.kind is not None and options.kind not in KINDS:
        raise ConfigurationError(
            f"there is no kind of plugin named '{options.kind}'",
            found=options.kind,
            allowed=", ".join(KINDS),
            remedy=f"{closest(options.kind, KINDS)}Leave --kind out to see all.",
        )
    found = plugins(options.kind)
    if options.name is not None:
        found = _named(options.name, options.kind, found)
    if options.plot is not None:
        from lightrail.command.schedule_plot import plotted

        print(plotted(options.name, found, options.set, options.plot, options.batch_size))
    elif options.set or options.batch_size is not None:
        raise ConfigurationError(
            "options are set for a plot only",
            found=" ".join(options.set) or f"--batch-size {options.batch_size}",
            allowed="lightrail plugins NAME --plot [FILE] [KEY=VALUE …]",
            remedy="Add --plot, or give one name.",
        )
    elif options.json:
        print(json.dumps(as_objects(found), indent=2, ensure_ascii=False))
    elif options.name is not None:
        print("\n\n".join(map(_card, found)))
    else:
        print(_table(found))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightrail plugins",
        description="What is installed, by kind; with a name, what that plugin accepts and says of itself.",
        epilog="A schedule can be drawn: `lightrail plugins cosine --plot final=0.1 warmup_steps=0.1` in the terminal, "
        "`lightrail plugins cosine --plot curve.svg` into a file.",
    )
    parser.add_argument("name", nargs="?", help="describe the plugins of this name, or of distribution:name")
    parser.add_argument("set", nargs="*", metavar="KEY=VALUE", help="with --plot: an option of the schedule")
    parser.add_argument("--kind", help="only those of one kind")
    shown_as = parser.add_mutually_exclusive_group()
    shown_as.add_argument("--json", action="store_true", help="for programs")
    shown_as.add_argument(
        "--plot",
        nargs="?",
        const="",
        metavar="FILE",
        help="draw the schedule of this name over 1000 steps, as a share of the learning rate: in the terminal, or as "
        "a picture into FILE.png or FILE.svg",
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="B", help="with --plot: samples a step, which the axis then counts as well"
    )
    return parser


def _read(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; the word after ``--plot`` may be a file, but also the name or an option of the schedule."""
    options = _parser().parse_intermixed_args(list(arguments))
    words = [options.name, *options.set] if options.name is not None else []
    if after := options.plot:
        names = [word for word in words if "=" not in word]
        if not after.lower().endswith((".png", ".svg")) and ("=" in after or not names):
            options.plot, words = "", [after, *words]
    if options.plot is not None:
        options.name = next((word for word in words if "=" not in word), None)
        options.set = [word for word in words if word is not options.name]
    return options


def _named(name: str, kind: str | None, among: Sequence[Plugin]) -> list[Plugin]:
    found = [each for each in among if name in (each.name, f"{each.distribution}:{each.name}")]
    if not found:
        raise unknown_plugin(kind or "plugin", name, sorted({each.name for each in among}))
    return found


def as_objects(found: Sequence[Plugin]) -> list[dict[str, Any]]:
    """The plugins as plain values, for ``--json``.

    Args:
        found: The plugins, their schemas read.
    """
    return [_finite(_object(each)) for each in found]


def _object(plugin: Plugin) -> dict[str, Any]:
    schema = plugin.known
    return {
        "kind": plugin.kind,
        "name": plugin.name,
        "summary": schema.summary if schema else "",
        "distribution": plugin.distribution,
        "version": plugin.version,
        "state": plugin.state,
        "reason": plugin.reason,
        "install": plugin.install,
        "target": plugin.target,
        "parameters": [_parameter_object(each) for each in schema.parameters] if schema else [],
        "accepts_any_key": schema.accepts_any_key if schema else False,
        "traits": dict(schema.traits) if schema else {},
    }


def _parameter_object(parameter: Parameter) -> dict[str, Any]:
    return {
        "name": parameter.name,
        "type": parameter.type,
        "default": parameter.default,
        "required": parameter.required,
        "choices": list(parameter.choices),
        "doc": parameter.doc,
    }


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _styled(text: str, style: str) -> str:
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{_COLOURS[style]}m{text}\x1b[0m"


def _table(found: Sequence[Plugin]) -> str:
    if not found:
        return "no plugin is installed"
    width = shutil.get_terminal_size((120, 24)).columns if sys.stdout.isatty() else 1000
    rows = [(each.kind, each.name, _origin(each), each.state, _remark(each)) for each in found]
    header = ("kind", "name", "distribution", "state", "summary")
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(4)]
    room = max(width - sum(widths) - 2 * len(widths), 20)
    lines = [_styled(_row(header, widths, room), "bold")]
    for row in rows:
        cells = _row(row, widths, room)
        start = sum(widths[:3]) + 6
        state = row[3]
        lines.append(cells[:start] + _styled(state, state) + cells[start + len(state) :])
    return "\n".join(lines)


def _row(cells: Sequence[str], widths: Sequence[int], room: int) -> str:
    last = cells[-1] if len(cells[-1]) <= room else cells[-1][: room - 1] + "…"
    return "  ".join([*(cell.ljust(width) for cell, width in zip(cells, widths, strict=False)), last]).rstrip()


def _origin(plugin: Plugin) -> str:
    return f"{plugin.distribution} {plugin.version}"


def _remark(plugin: Plugin) -> str:
    if plugin.state == "ready":
        return plugin.summary
    reason = " ".join(plugin.reason.split())
    return f"{reason}: {plugin.install}" if plugin.install else reason


def _card(plugin: Plugin) -> str:
    """One plugin: what it is, what it accepts, what it says of itself."""
    head = f"{_styled(plugin.name, 'bold')}  {plugin.kind} of {_origin(plugin)}  {_styled(plugin.state, plugin.state)}"
    lines = [head]
    if plugin.state != "ready":
        lines.append(f"  {_remark(plugin)}")
    if (schema := plugin.known) is None:
        return "\n".join(lines)
    lines += textwrap.wrap(schema.summary, 100, initial_indent="  ", subsequent_indent="  ")
    lines += ["", f"  {schema.target}"]
    lines += ["", *_options(plugin, schema)]
    traits = schema.traits
    if plugin.kind in ("optimizer", "transform") and "paper" in traits:  # what a step costs is said of every method
        costs = {"state": traits.get("state"), "extra_evaluations": traits.get("extra_evaluations", 0.0)}
        first = {name: traits[name] for name in ("rule", "paper") if name in traits}
        traits = {**first, **costs, **traits}
    lines += ["", *_traits(traits)] if traits else []
    return "\n".join(lines)


def _options(plugin: Plugin, schema: Schema) -> list[str]:
    prefix = f"{plugin.kind}.{plugin.name}" if plugin.kind in KINDS and KINDS[plugin.kind].many else plugin.kind
    rows = [(f"{prefix}.{each.name}", _typed(each), each.doc) for each in schema.parameters]
    if not rows:
        return ["  no options"] if not schema.accepts_any_key else ["  accepts any option"]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    indent = " " * (sum(widths[:2]) + 6)
    lines = ["  options"]
    for name, typed, doc in rows:
        start = f"  {name:<{widths[0]}}  {typed:<{widths[1]}}  "
        text = textwrap.wrap(doc, 130, initial_indent=start, subsequent_indent=indent) if len(indent) < 90 else []
        lines += text or [f"{start}{doc}".rstrip()]
    return [*lines, "  and any other"] if schema.accepts_any_key else lines


def _typed(parameter: Parameter) -> str:
    if parameter.required:
        return f"{parameter.type}, filled in or required"
    return f"{parameter.type} = {shown(parameter.default)}" if parameter.has_default else parameter.type


def _traits(traits: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, value in traits.items():
        if name in _UNSHOWN:
            continue
        for text in _WORDS.get(name, _said)(name.replace("_", " "), value):
            lines += textwrap.wrap(text, 110, initial_indent="  ", subsequent_indent="    ")
    return lines


def _said(label: str, value: Any) -> list[str]:
    if value is True:
        return [label]
    return [f"{label}: {shown(value) if not isinstance(value, dict) else _pairs(value)}"]


def _claimed(label: str, claim: dict[str, Any]) -> list[str]:
    beside = " ".join([claim["baseline"], *(f"{k}={v}" for k, v in claim["baseline_options"].items())])
    return [f"claim: {claim['sentence']} (beside {beside}, on {', '.join(claim['problems'])})"]


def _kept(label: str, copies: float | None) -> list[str]:
    return [f"state: {'depends on options and shapes' if copies is None else _copies(copies)}"]


def _copies(count: float) -> str:
    return f"{count:g} {'copy' if count == 1 else 'copies'} of the parameters"


def _spent(label: str, passes: float | None) -> list[str]:
    return [f"extra evaluations: {'depends on the model' if passes is None else f'{passes:g} a step'}"]


# What the suites are told is no news to a user.
_UNSHOWN = ("example", "exceptions")
_WORDS: dict[str, Callable[[str, Any], list[str]]] = {
    "claim": _claimed,
    "sampling_claims": lambda label, claims: [f"claim: {claim['sentence']}" for claim in claims],
    "steps_from_newest": lambda label, _: ["steps from earlier states than its newest"],
    "descends": lambda label, _: ["a chain, which does not go down the grid level by level"],
    "fresh_noise": lambda label, share: [] if share is None else [f"fresh noise: η = {share:g}"],
    "peers": lambda label, peers: [f"measured beside: {', '.join(peer['target'] for peer in peers)}"],
    "state": _kept,
    "extra_evaluations": _spent,
    "verified": lambda label, sentences: [f"measured: {sentence}" for sentence in sentences],
}


def _pairs(value: dict[str, Any]) -> str:
    return ", ".join(f"{key}={shown(item)}" for key, item in value.items())
