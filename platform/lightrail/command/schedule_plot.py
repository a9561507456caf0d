"""``lightrail plugins NAME --plot``: the curve of a schedule, as text in the terminal or as a picture in a file."""

from __future__ import annotations

import inspect
import io
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightrail.catalogue.forms import accepts, describe, shown
from lightrail.catalogue.plugin import Plugin, available
from lightrail.catalogue.schema import Schema
from lightrail.errors import ConfigurationError, UserError, closest

__all__ = ["plotted", "rates_of", "text_picture"]

TOTAL_STEPS = 1000
_ROWS = 13  # a quarter of the height is a whole number of them
_MARGIN = len("samples")
_FORMATS = (".png", ".svg")
# The dots of a braille character, by column and by row from the top, as bits of its code.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BLANK = 0x2800


def plotted(
    name: str | None, found: Sequence[Plugin], settings: Sequence[str], file: str, batch_size: int | None
) -> str:
    """Draws a schedule.

    Args:
        name: What the user named.
        found: The plugins of that name.
        settings: Options of the schedule, as ``KEY=VALUE``.
        file: Where the picture goes; empty for the terminal.
        batch_size: Samples in one step, if they are known.

    Returns:
        What is to be printed.

    Raises:
        UserError: None of them is a schedule, an option is wrong, or the file cannot be written.
    """
    schedules = [each for each in found if each.kind == "schedule"]
    if name is None or not schedules:
        raise ConfigurationError(
            "only a schedule can be drawn" if name is None else f"'{name}' is no schedule, so there is no curve of it",
            found="no name" if name is None else f"{name} ({', '.join(each.kind for each in found)})",
            allowed=", ".join(available("schedule")),
            remedy="Name a schedule: lightrail plugins NAME --plot.",
        )
    if batch_size is not None and batch_size < 1:
        raise ConfigurationError(
            "--batch-size is out of range",
            found=f"--batch-size {batch_size}",
            allowed="a whole number of at least 1",
            remedy="Set it within that range, or leave it out.",
        )
    if file and Path(file).suffix.lower() not in _FORMATS:
        raise ConfigurationError(
            f"a schedule cannot be drawn into '{file}'",
            found=f"the ending '{Path(file).suffix}'",
            allowed=f"{', '.join(_FORMATS)}; KEY=VALUE for an option of the schedule",
            remedy="Name a file that ends in .png or .svg, or none to draw in the terminal.",
        )
    schedule, options = schedules[0].load(), _options_of(schedules[0], settings)
    scheduler = _built(schedules[0].name, schedule, options, batch_size)
    rates = rates_of(scheduler, TOTAL_STEPS)
    heading = " ".join([schedules[0].name, *(f"{key}={shown(value)}" for key, value in options.items())])
    notes = [f"note: {text}" for text in getattr(scheduler, "notes", ())]
    if file:
        _save(rates, heading, Path(file), batch_size)
        return "\n".join([f"{heading}: drawn into {file}", *notes])
    width = shutil.get_terminal_size((100, 24)).columns
    picture = text_picture(rates, width, batch_size)
    return "\n".join([f"{heading}: share of the learning rate", *picture, *notes])


def _options_of(plugin: Plugin, settings: Sequence[str]) -> dict[str, Any]:
    """What the user set, and of the example what has no default."""
    from lightrail.configuration.composing import parse

    schema = plugin.schema
    example = schema.traits.get("example", {})
    options = {each.name: example[each.name] for each in schema.parameters if each.required and each.name in example}
    for override in parse([each.removeprefix("schedule.") for each in settings]):
        key = override.key_or_group
        if override.is_sweep_override() or override.is_delete():
            raise ConfigurationError(
                f"'{override.input_line}' does not set one value",
                found=override.input_line or key,
                allowed="KEY=VALUE",
                remedy="Draw one curve at a time.",
            )
        options[key] = override.value()
        _check(plugin.name, schema, key, options[key])
    return options


def _check(name: str, schema: Schema, key: str, value: Any) -> None:
    parameter = schema.parameter(key)
    if parameter is None and not schema.accepts_any_key:
        known = [each.name for each in schema.parameters]
        raise ConfigurationError(
            f"schedule '{name}' has no option '{key}'",
            found=f"{key}={shown(value)}",
            allowed=", ".join(known) or "no options",
            remedy=f"{closest(key, known)}`lightrail plugins {name}` describes them.",
        )
    if parameter is not None and not accepts(parameter.form, value):
        raise ConfigurationError(
            f"{key} has the wrong type",
            found=f"{key}={shown(value)} ({type(value).__name__})",
            allowed=describe(parameter.form),
            remedy=f"Set {key} to an allowed value.",
        )


def _built(name: str, schedule: Callable[..., Any], options: dict[str, Any], batch_size: int | None) -> Any:
    """The scheduler of an optimizer whose learning rate is 1."""
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    if batch_size is not None and "batch_size" in inspect.signature(schedule).parameters:
        options = {**options, "batch_size": batch_size}
    try:
        return schedule(optimizer, TOTAL_STEPS, **options)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"schedule '{name}' does not accept its options",
            found=", ".join(f"{key}={shown(value)}" for key, value in options.items()) or "none",
            allowed=str(error),
            remedy=f"See `lightrail plugins {name}` for its options; KEY=VALUE after --plot sets them.",
        ) from error


def rates_of(scheduler: Any, total_steps: int) -> list[float]:
    """The learning rate of the first group at each step of a run.

    Args:
        scheduler: At its first step.
        total_steps: How many.
    """
    rates = []
    for _ in range(total_steps):
        rates.append(float(scheduler.optimizer.param_groups[0]["lr"]))
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def text_picture(rates: Sequence[float], width: int, batch_size: int | None = None) -> list[str]:
    """A curve in braille dots, with an axis of shares and one of steps; lines of at most ``width`` characters.

    Args:
        rates: One a step, >= 0.
        width: Of the terminal, in characters.
        batch_size: Samples in one step, for a line of samples under that of steps.
    """
    top = max(rates) or 1.0
    shares = {k * (_ROWS - 1) // 4: f"{top * (4 - k) / 4:.3g}" for k in range(5)}
    margin = max(_MARGIN, *map(len, shares.values()))
    columns = max(20, width - margin - 2)
    lines = [
        f"{shares.get(row, ''):>{margin}} {'┤' if row in shares else '│'}{cells}".rstrip()
        for row, cells in enumerate(_braille(rates, top, columns))
    ]
    parts = 4 if columns >= 50 else 1
    ticks = [round(k / parts * columns) for k in range(parts + 1)]
    axis = "".join("┴" if column in ticks else "─" for column in range(1, columns + 1))
    lines.append(f"{'':>{margin}} └{axis}")
    for unit, each in (("steps", 1), ("samples", batch_size)):
        if each is not None:
            counts = [f"{round(k / parts * len(rates)) * each:,}" for k in range(parts + 1)]
            lines.append(f"{unit:>{margin}} {_under(ticks, counts)}")
    return lines


def _under(ticks: Sequence[int], counts: Sequence[str]) -> str:
    """Numbers in the middle under their ticks, the last one flush right; one that would touch another is left out."""
    line = counts[0]
    for tick, text in zip(ticks[1:], counts[1:], strict=True):
        start = tick + 1 - len(text) if tick == ticks[-1] else tick - len(text) // 2
        if start > len(line):
            line = line.ljust(start) + text
    return line


def _braille(rates: Sequence[float], top: float, columns: int) -> list[str]:
    """The curve itself: rows of characters of two by four dots, the values between two columns joined."""
    codes = [[_BLANK] * columns for _ in range(_ROWS)]
    last = rates[0]
    for x in range(2 * columns):
        begin = x * len(rates) // (2 * columns)
        within = rates[begin : max(begin + 1, (x + 1) * len(rates) // (2 * columns))]
        high, low = (round((1 - v / top) * (4 * _ROWS - 1)) for v in (max(*within, last), min(*within, last)))
        for y in range(high, low + 1):
            codes[y // 4][x // 2] |= _DOTS[x % 2][y % 4]
        last = within[-1]
    return ["".join(chr(code) if code != _BLANK else " " for code in row) for row in codes]


def _save(rates: Sequence[float], heading: str, file: Path, batch_size: int | None) -> None:
    import numpy as np

    from lightrail.report.curves import INK, Chart, Series, draw

    steps = np.arange(len(rates))
    figure = draw(Chart("learning_rate", [Series("", "", steps, np.array(rates), is_exact=True)]))
    axes = figure.axes[0]
    axes.set_title(heading, loc="left", color=INK, fontsize=10)
    axes.set_ylabel("share of the learning rate", color=INK, fontsize=10)
    axes.set_ylim(bottom=0)
    if batch_size is not None:
        count = float(batch_size)
        below = axes.secondary_xaxis(-0.22, functions=(lambda x: np.multiply(x, count), lambda x: np.divide(x, count)))
        below.set_xlabel("samples", color=INK, fontsize=10)
        below.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        below.tick_params(colors=INK, labelsize=10, length=0)
        below.spines["bottom"].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format=file.suffix[1:].lower(), dpi=150)
    try:
        file.write_bytes(picture.getvalue())
    except OSError as error:
        raise ConfigurationError(
            f"{file} cannot be written",
            found=error.strerror or str(error),
            allowed="a file in a folder that is there and in which you may write",
            remedy="Name another file after --plot.",
        ) from error
