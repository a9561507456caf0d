"""``report.html`` of a sweep: one file that opens offline."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from lightrail.files import replace_file
from lightrail.report.page import POLICY
from lightrail.report.pictures import figure_pictures
from lightrail.report.wording import number
from lightrail.sweep.importance import axes_of, importance_of
from lightrail.sweep.ledger import Ledger
from lightrail.sweep.method import Goal
from lightrail.sweep.results import Row, best_of, groups_over_seeds, short_reason, sorted_rows
from lightrail.sweep.table import command_again, short_keys

__all__ = ["write_sweep_report"]


def write_sweep_report(ledger: Ledger, rows: Sequence[Row]) -> Path:
    """Writes ``report.html`` into a sweep's folder.

    Args:
        ledger: The sweep's.
        rows: Its trials.

    Returns:
        The path of the page.
    """
    path = ledger.folder / "report.html"
    replace_file(path, _page(ledger, rows).encode())
    return path


def _page(ledger: Ledger, rows: Sequence[Row]) -> str:
    style = files("lightrail.report").joinpath("style.css").read_text(encoding="utf-8")
    goal = Goal(**ledger.content["goal"])
    parts = [
        _heading(ledger, rows),
        _best(rows, goal),
        _pictures(ledger, rows, goal),
        _section("Mean over seeds", _seeds(rows, goal)),
        _section("Trials", _trials(rows, goal)),
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(ledger.folder.name)} – lightrail</title>
<style>
{style}tbody tr.best td {{ background: var(--tint); font-weight: 600; }}
.pictures + .facts {{ margin-top: .7rem; font-size: .94rem; }}
</style>
</head>
<body>
<main>
{"".join(parts)}</main>
<footer><a href="sweep.json">sweep.json</a></footer>
</body>
</html>
"""


def _section(name: str, content: str) -> str:
    return f"<section><h2>{name}</h2>\n{content}</section>\n" if content else ""


def _heading(ledger: Ledger, rows: Sequence[Row]) -> str:
    counts = Counter(row.status for row in rows)
    if ledger.planned > len(rows):
        counts["not proposed yet"] += ledger.planned - len(rows)
    facts = [f"{ledger.planned} trials", *(f"{count} {status}" for status, count in counts.most_common())]
    if method := ledger.content.get("method"):
        facts.append(f"proposed by {method['name']}")
    line = "".join(f"<span>{escape(fact)}</span>" for fact in facts)
    command = f'<pre class="command">{escape(str(ledger.content.get("command", "")))}</pre>'
    return f'<header><h1>{escape(ledger.folder.name)}</h1><p class="facts">{line}</p>{command}</header>'


def _best(rows: Sequence[Row], goal: Goal) -> str:
    best = best_of(rows, goal)
    if best is None:
        return '<p class="absent">No trial has finished with a value yet.</p>'
    others = "".join(
        f"<span>{escape(name)} <b>{escape(number(value))}</b></span>"
        for name, value in (best.summary.get("metrics") or {}).items()
        if name.startswith("test")
    )
    return (
        '<section class="cards" aria-label="Best"><div class="card chosen">'
        f'<div class="what">best {escape(goal.metric)}, of trial {best.trial.number}</div>'
        f'<div class="value"><b>{escape(number(best.value))}</b></div><div class="others">{others}</div></div>'
        f'</section><pre class="command">{escape(command_again(best))}</pre>'
    )


def _pictures(ledger: Ledger, rows: Sequence[Row], goal: Goal) -> str:
    from lightrail.sweep.pictures import importance_picture, parallel_picture

    valued = [row for row in rows if row.value is not None]
    if len(valued) < 2 or not axes_of(valued):
        return _section("Keys", '<p class="absent">There are too few trials to compare.</p>')
    names = short_keys(rows)
    space = ledger.content.get("space") or {}
    spread = {key.lstrip("+"): bool(each["log"]) for key, each in space.items() if "log" in each}
    picture = parallel_picture(valued, goal, names, spread)
    left_out = len(rows) - len(valued)
    remark = "Each line is a trial, the darker the better; the best is orange." + (
        f" {left_out} without a value {'is' if left_out == 1 else 'are'} not drawn." if left_out else ""
    )
    across = f"{figure_pictures({'every_trial': picture})}<p class='facts'>{escape(remark)}</p>"
    importance = importance_of(valued)
    if importance is None:
        return _section("Keys", across)
    bars = figure_pictures({"importance": importance_picture(importance, names)})
    return _section("Keys", f"{across}") + _section(
        "What mattered", f"{bars}<p class='facts'>{escape(importance.how[:1].upper() + importance.how[1:])}.</p>"
    )


def _seeds(rows: Sequence[Row], goal: Goal) -> str:
    groups = groups_over_seeds(rows, goal)
    if not any(group.count > 1 for group in groups):
        return ""
    keys = {key: name for key, name in short_keys(rows).items() if key != "seed"}
    lines = [
        [
            *(group.values.get(key, "-") for key in keys),
            str(group.count),
            number(group.mean) + ("" if math.isnan(group.deviation) else f" ± {number(group.deviation)}"),
        ]
        for group in groups
    ]
    return _table([*keys.values(), "seeds", f"{goal.metric}, mean ± sd"], lines, 0)


def _trials(rows: Sequence[Row], goal: Goal) -> str:
    keys = short_keys(rows)
    ordered = sorted_rows(rows, goal)
    lines = [
        [
            str(row.trial.number),
            *(row.values.get(key, "-") for key in keys),
            "-" if row.value is None else number(row.value),
            row.status + (f": {short_reason(row.state.reason)}" if row.state.reason else ""),
            row.trial.folder.name,
        ]
        for row in ordered
    ]
    best = 0 if ordered and ordered[0].value is not None else -1
    return _table(["trial", *keys.values(), goal.metric, "state", "folder"], lines, best)


def _table(header: Sequence[str], lines: Sequence[Sequence[str]], best: int) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join(_line(line, is_best=index == best) for index, line in enumerate(lines))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _line(cells: Sequence[str], *, is_best: bool) -> str:
    start = '<tr class="best">' if is_best else "<tr>"
    return start + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>\n"
