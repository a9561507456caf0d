"""What the rounds of a federated run looked like: who has which samples, how each client fared, what was sent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from lightrail.report.curves import FAINT, INK, MORE_COLOURS
from lightrail.report.pictures import figure_pictures
from lightrail.report.record import RunRecord
from lightrail.report.wording import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["account", "figures", "volume"]

_NAMED = 12  # clients or labels that have a colour and a name of their own
_LISTED = 20  # clients that are listed as left out


def volume(count: float) -> str:
    """Bytes, as one says them.

    Example:
        >>> volume(950), volume(52_400), volume(1.5e9)
        ('950 B', '52.4 kB', '1.5 GB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:.0f} B"


def account(record: RunRecord) -> str:
    """Totals, the pictures, and who was left out of which round and why.

    Args:
        record: Of the run.
    """
    rounds = _mappings(record.federated.get("rounds"))
    if not rounds:
        return ""
    pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in _totals(record.federated))
    return f"<dl>{pairs}</dl>{_left_out(rounds)}{figure_pictures(figures(record.federated))}"


def _totals(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    rounds, about = _mappings(values.get("rounds")), _mapping(values.get("about"))
    found = [("Rounds", number(len(rounds)))]
    if "nodes" in about:
        found += [
            ("Nodes", number(about["nodes"])),
            ("Topology", f"{about.get('topology')}, {len(about.get('edges', ()))} edges"),
            ("Spectral gap", number(about.get("spectral_gap"))),
            ("Sent over all edges", volume(sum(float(each.get("sent", 0)) for each in rounds))),
        ]
    else:
        received = sum(float(count) for each in rounds for count in _mapping(each.get("received")).values())
        found += [
            ("Clients", number(about.get("clients"))),
            ("Sent to clients", volume(sum(float(each.get("sent", 0)) for each in rounds))),
            ("Received from clients", volume(received)),
            ("Left out", f"{sum(len(_mapping(each.get('left_out'))) for each in rounds)} answers"),
        ]
    return found


def _left_out(rounds: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"Round {each.get('round')}, client {client}: {reason}"
        for each in rounds
        for client, reason in _mapping(each.get("left_out")).items()
    ]
    if not lines:
        return ""
    more = [f"… and {len(lines) - _LISTED} more, in federated.json"] if len(lines) > _LISTED else []
    text = "".join(f"<li>{escape(line)}</li>" for line in [*lines[:_LISTED], *more])
    return f'<h3>Left out</h3><ul class="sentences">{text}</ul>'


def figures(values: Mapping[str, Any]) -> dict[str, Figure]:
    """The pictures of a federated run, by name.

    Args:
        values: The contents of ``federated.json``.
    """
    about, rounds = _mapping(values.get("about")), _mappings(values.get("rounds"))
    found: dict[str, Figure] = {}
    if counts := _mappings(about.get("samples")):
        found["samples_of_each_client"] = _partition(counts)
    if edges := about.get("edges"):
        found["topology"] = _graph(int(about["nodes"]), edges)
    losses = _losses(rounds)
    if len(losses) > _NAMED:  # fewer have curves of their own
        found["loss_of_each_client"] = _client_losses(losses)
    return found


def _plain(width: float = 6.4, height: float = 3.5) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.tick_params(colors=INK, labelsize=10, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#9ca3af")
    axes.grid(color=FAINT, lw=0.8, axis="y")
    axes.set_axisbelow(True)
    return figure, axes


def _partition(counts: Sequence[Mapping[str, int]]) -> Figure:
    """Samples of each client, by label where samples have one."""
    figure, axes = _plain()
    labels = sorted({label for each in counts for label in each}, key=lambda x: (len(x), x))
    bottom = np.zeros(len(counts))
    for index, label in enumerate(labels):
        heights = np.array([each.get(label, 0) for each in counts], dtype=float)
        colour = MORE_COLOURS[index % len(MORE_COLOURS)] if len(labels) > 1 else MORE_COLOURS[0]
        alpha = 1.0 if index < len(MORE_COLOURS) else 0.55
        name = label if len(labels) > 1 and index < _NAMED else None
        axes.bar(range(len(counts)), heights, 0.8, bottom=bottom, color=colour, alpha=alpha, label=name, lw=0)
        bottom += heights
    axes.set_xlabel("client", color=INK, fontsize=10)
    axes.set_ylabel("samples", color=INK, fontsize=10)
    if len(counts) <= 2 * _NAMED:
        axes.set_xticks(range(len(counts)))
    if len(labels) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=_NAMED, frameon=False, fontsize=9,
                    labelcolor=INK, handlelength=0.9, columnspacing=0.9, borderaxespad=0.1)  # fmt: skip
    return figure


def _graph(nodes: int, edges: Sequence[Sequence[int]]) -> Figure:
    """Nodes on a circle."""
    figure, axes = _plain(3.6, 3.6)
    places = [(math.sin(2 * math.pi * i / nodes), math.cos(2 * math.pi * i / nodes)) for i in range(nodes)]
    for i, j in edges:
        axes.plot(*zip(places[i], places[j], strict=True), color="#9ca3af", lw=0.9, zorder=1)
    size = 180 if nodes <= 2 * _NAMED else 1600 / nodes
    axes.scatter(*zip(*places, strict=True), s=size, color=MORE_COLOURS[0], zorder=2)
    for i, (x, y) in enumerate(places if nodes <= 2 * _NAMED else ()):
        axes.text(x, y, str(i), ha="center", va="center", color="white", fontsize=8, zorder=3)
    axes.set_aspect("equal")
    axes.margins(0.1)
    axes.axis("off")
    return figure


def _losses(rounds: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for each in rounds:
        for client, metrics in _mapping(each.get("clients")).items():
            loss = _mapping(metrics).get("loss")
            if isinstance(loss, int | float) and math.isfinite(loss):
                found.setdefault(str(client), []).append((int(each.get("round", 0)) + 1, float(loss)))
    return found


def _client_losses(losses: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure, axes = _plain()
    is_few = len(losses) <= _NAMED
    for index, (client, points) in enumerate(sorted(losses.items(), key=lambda each: int(each[0]))):
        colour = MORE_COLOURS[index % len(MORE_COLOURS)] if is_few else MORE_COLOURS[0]
        marker = "o" if len(points) <= 40 else None
        width, alpha = (1.4, 1.0 if index < len(MORE_COLOURS) else 0.55) if is_few else (0.7, 0.35)
        label = client if is_few else None
        axes.plot(*zip(*points, strict=True), color=colour, lw=width, alpha=alpha, label=label, marker=marker, ms=3)
    values = [loss for points in losses.values() for _, loss in points]
    if min(values) > 0 and max(values) > 200 * min(values):
        axes.set_yscale("log")
    axes.set_xlabel("round", color=INK, fontsize=10)
    axes.set_ylabel("training loss", color=INK, fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    if is_few:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=_NAMED, frameon=False, fontsize=9,
                    labelcolor=INK, handlelength=1.2, columnspacing=1.1, borderaxespad=0.1)  # fmt: skip
    return figure


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _mappings(value: object) -> Sequence[Mapping[str, Any]]:
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list | tuple) else []
