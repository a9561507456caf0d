"""The parts of the page that are text: cards, the composition, what the run was, its configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html import escape
from typing import Any

from lightrail.report.record import RunRecord
from lightrail.report.wording import STAGES, by_base, duration, monitored, number, size, stage_and_base, title

__all__ = ["cards", "composition", "configuration", "facts", "heading", "notes", "texts"]

_YAML_KEY = re.compile(r"^(\s*(?:- )*)([\w.$/@-]+)(:)(?=\s|$)", re.MULTILINE)


def heading(record: RunRecord) -> str:
    """The name of the run, how it ended, how large it was and the command that made it."""
    status = str(record.summary.get("status", ""))
    pill = f'<span class="status {escape(status)}">{escape(status)}</span>' if status else ""
    line = "".join(f"<span>{escape(fact)}</span>" for fact in size(record.summary))
    command = record.lock.get("command")
    code = f'<pre class="command">{escape(str(command))}</pre>' if command else ""
    return f'<header><h1>{escape(record.name)}</h1><p class="facts">{pill}{line}</p>{code}</header>'


def notes(record: RunRecord) -> str:
    """What the run wants its reader to know."""
    lines = [str(note) for note in record.summary.get("notes") or ()]
    if "summary.json" in record.missing:
        lines.append(record.missing["summary.json"])
    text = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f'<div class="note" role="note">{text}</div>' if text else ""


def cards(record: RunRecord) -> str:
    """The final metrics: one card for each thing measured, the test value large, the others beside it."""
    chosen = monitored(record.summary)
    text = "".join(_card(base, values, is_chosen=base == chosen) for base, values in by_base(record.summary).items())
    return f'<section class="cards" aria-label="Final metrics">{text}</section>' if text else ""


def _card(base: str, values: Mapping[str, float], *, is_chosen: bool) -> str:
    stages = sorted(values, key=lambda stage: STAGES.index(stage) if stage in STAGES else len(STAGES))
    first, *rest = stages
    stage = f'<span class="stage">{escape(first)}</span>' if first else ""
    others = "".join(f"<span>{escape(stage or base)} <b>{escape(number(values[stage]))}</b></span>" for stage in rest)
    return (
        f'<div class="card{" chosen" if is_chosen else ""}"><div class="what">{escape(title(base))}</div>'
        f'<div class="value" title="{escape(repr(values[first]))}"><b>{escape(number(values[first]))}</b>{stage}</div>'
        + (f'<div class="others">{others}</div>' if others else "")
        + "</div>\n"
    )


def texts(record: RunRecord) -> str:
    """What a language model wrote, each text after its prompt."""
    try:
        content = json.loads((record.folder / "texts.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    written = zip(content.get("prompts", ()), content.get("texts", ()), strict=False)
    return "".join(
        f'<pre class="text"><b>{escape(str(prompt))}</b>{escape(str(text))}</pre>' for prompt, text in written
    )


def composition(record: RunRecord) -> str:
    """The plugins that the run was made of, with where they are from and their options."""
    plugins = record.lock.get("plugins")
    if not plugins:
        why = record.missing.get("lock.json", "The lock names no plugin.")
        return f'<p class="absent">{escape(why)}</p>'
    rows = "".join(_plugin(plugin) for plugin in plugins)
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Kind", "Plugin", "Distribution", "Options"))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _plugin(plugin: Mapping[str, Any]) -> str:
    def text(key: str) -> str:
        return escape(str(plugin.get(key) or ""))

    target = re.sub(r"(?<=[.:])", "<wbr>", text("target"))
    options = "".join(
        f'<code class="option"><i>{escape(str(name))}=</i>{escape(_plain(value))}</code>'
        for name, value in (plugin.get("options") or {}).items()
    )
    return (
        f'<tr><th scope="row">{text("kind")}</th><td><b>{text("name")}</b>'
        f'<code class="target">{target}</code></td>'
        f"<td>{text('distribution')} {text('version')}</td><td>{options}</td></tr>\n"
    )


def _plain(value: object) -> str:
    """A value as one would type it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    return str(value)


def facts(record: RunRecord) -> str:
    """What the run was, as pairs of a name and a value."""
    lock, summary = record.lock, record.summary
    versions = [f"{name} {lock[name]}" for name in ("python", "torch", "lightning") if lock.get(name)]
    core = [f"lightrail {lock['core']}"] if lock.get("core") else []
    wall_time, rounds = summary.get("wall_time"), summary.get("rounds")
    steps, epochs = (summary.get("steps"), summary.get("epochs")) if rounds is None else (None, None)
    pairs = {
        "Command": _code(lock.get("command")),
        "Seed": _text(lock.get("seed")),
        "Commit": _commit(lock.get("git")),
        "Wall time": _text(None if wall_time is None else duration(wall_time)),
        "Device": _text(summary.get("device")),
        "Model": _code(summary.get("model")),
        "Samples": _text(None if (count := summary.get("samples")) is None else number(count)),
        "Evaluations a sample": _text(None if (count := summary.get("evaluations")) is None else number(count)),
        "Sampling time": _text(None if (spent := summary.get("sampling_seconds")) is None else duration(spent)),
        "Rounds": _text(None if rounds is None else number(rounds)),
        "Steps": _text(None if steps is None else number(steps)),
        "Epochs": _text(None if epochs is None else number(epochs)),
        "Parameters": _text(None if (count := summary.get("parameters")) is None else number(count)),
        "Best": _best(summary.get("monitor")),
        "Resumed from": _code(summary.get("resumed_from")),
        "Last checkpoint": _code(summary.get("checkpoint")),
        "Best checkpoint": _code(summary.get("best_checkpoint")),
        "Versions": _text(", ".join(core + versions) or None),
        "Fingerprint": _code(lock.get("config")),
    }
    text = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in pairs.items() if value)
    why = record.missing.get("lock.json", "")
    return (f"<dl>{text}</dl>" if text else "") + (f'<p class="absent">{escape(why)}</p>' if why else "")


def _text(value: object) -> str:
    return "" if value is None else escape(str(value))


def _code(value: object) -> str:
    return f"<code>{escape(str(value))}</code>" if value else ""


def _commit(git: object) -> str:
    if not isinstance(git, Mapping) or not git.get("commit"):
        return ""
    dirty = ' <span class="dirty">with changes that were not committed</span>' if git.get("dirty") else ""
    return _code(git["commit"]) + dirty


def _best(monitor: object) -> str:
    if not isinstance(monitor, Mapping) or monitor.get("best") is None:
        return ""
    stage, base = stage_and_base(str(monitor.get("name")))
    return f"{_text(f'{stage} {title(base).lower()}'.strip())} {_text(number(monitor['best']))}"


def configuration(record: RunRecord) -> str:
    """The resolved configuration, folded away."""
    if not record.config:
        return f'<p class="absent">{escape(record.missing.get("config.yaml", "config.yaml is empty."))}</p>'
    text = _YAML_KEY.sub(r'\1<span class="key">\2</span>\3', escape(record.config, quote=False))
    return f"<details><summary>Resolved configuration</summary><pre>{text}</pre></details>"
