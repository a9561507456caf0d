"""Pictures of samples: grids of images, points over data, and either as training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

__all__ = ["images_over_time", "is_image", "points_over_time", "sample_grid", "scatter"]

INK, FAINT, RED = "#374151", "#d1d5db", "#c43d5a"
COLOURS = ("#3866d6", "#e07a1f", "#1f9d76", "#a04fb8", "#c43d5a", "#6b7280", "#2a9bb5", "#97852a")
DATA_AT_MOST = 2000  # points of the data behind those of a model
GAP = 1  # pixels between images
WIDE = 6.0  # inches that images fill: what a report shows without shrinking it
_RC: Any = {"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}


def is_image(shape: Sequence[int]) -> bool:
    """Whether samples of this shape can be shown as pictures: one channel or three, at least 4 pixels a side."""
    return len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) >= 4


def sample_grid(
    images: Tensor, columns: int, headings: Sequence[str], title: str, marked: Sequence[int] = (), limits: Any = None
) -> Figure:
    """Images row by row.

    Args:
        images: ``[N, 1 or 3, H, W]``.
        columns: Images a row.
        headings: One a column, or none.
        title: Above all.
        marked: Numbers of images that get a red frame.
        limits: The values that are black and white; by default those of the images.
    """
    rows = -(-len(images) // columns)
    side = min(0.8, WIDE / columns)
    figure, axes = _new_figure(side * columns + 0.3, side * rows + (0.85 if headings else 0.55), 1, 1)
    _draw_mosaic(axes[0], images, columns, headings, limits)
    height, width = (size + GAP for size in images.shape[2:])
    for number in marked:
        left, top = number % columns * width - 0.5, number // columns * height - 0.5
        corners = (left, left + width - GAP, left + width - GAP, left, left), (top, top, *[top + height - GAP] * 2, top)
        axes[0].plot(*corners, color=RED, lw=1.6)
    _entitle(figure, title)
    return figure


def images_over_time(rows: Sequence[tuple[str, Tensor]], headings: Sequence[str], title: str, limits: Any) -> Figure:
    """One row of images for each moment, with its label to the left.

    Args:
        rows: Labels and images ``[N, 1 or 3, H, W]``, all as many.
        headings: One a column, or none.
        title: Above all.
        limits: The values that are black and white; ``None`` for those of the last row.
    """
    columns = len(rows[0][1])
    side = min(0.6, (WIDE - 1.2) / columns)
    figure, axes = _new_figure(side * columns + 1.4, side * len(rows) + (0.85 if headings else 0.55), 1, 1)
    images = np.concatenate([each.numpy() for _, each in rows])
    limits = _limits(rows[-1][1].numpy()) if limits is None else limits
    _draw_mosaic(axes[0], images, columns, headings, limits)
    height = images.shape[2] + GAP
    axes[0].set_yticks([(row + 0.5) * height - 1 for row in range(len(rows))], [label for label, _ in rows])
    _entitle(figure, title)
    return figure


def _draw_mosaic(axes: Axes, images: Any, columns: int, headings: Sequence[str], limits: Any) -> None:
    """All images as one, so that a hundred of them cost no more than one."""
    values = np.asarray(images, dtype=np.float32)
    low, high = _limits(values) if limits is None else limits
    values = ((values - low) / max(high - low, 1e-12)).clip(0, 1)
    count, height, width = len(values), *values.shape[2:]
    rows = -(-count // columns)
    whole = np.ones((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), dtype=np.float32)
    for number, image in enumerate(values):
        top, left = number // columns * (height + GAP), number % columns * (width + GAP)
        whole[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    axes.imshow(whole, interpolation="nearest")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_yticks([])
    axes.xaxis.tick_top()
    places = [(column + 0.5) * (width + GAP) - 1 for column in range(columns)] if headings else []
    axes.set_xticks(places, list(headings))


def _limits(values: np.ndarray) -> tuple[float, float]:
    """Those of pixels in [0, 1] where the values are such, or else their own."""
    low, high = float(values.min()), float(values.max())
    return (0.0, 1.0) if low > -0.5 and high < 1.5 else (low, high)


def scatter(points: Tensor, labels: Tensor | None, data: Tensor, names: Sequence[str], title: str) -> Figure:
    """Points, coloured by label, over the data in grey; of more than two numbers a point the first two.

    Args:
        points: ``[N, n]``.
        labels: ``[N]``, or ``None``.
        data: ``[M, n]``.
        names: Of the labels.
        title: Above all.
    """
    figure, axes = _new_figure(6.0, 5.2 * _steepness(data) + 1.0, 1, 1)
    _draw_points(axes[0], points, labels, data)
    if labels is not None and len(names) <= len(COLOURS):
        axes[0].legend(
            [*axes[0].collections[1:]], [f"asked for {name}" for name in names], frameon=False, fontsize=9, loc="best",
            markerscale=2.5,
        )  # fmt: skip
    _entitle(figure, title)
    return figure


def points_over_time(rows: Sequence[tuple[str, Tensor]], labels: Tensor | None, data: Tensor, title: str) -> Figure:
    """One panel of points for each moment, with its label above.

    Args:
        rows: Labels and points ``[N, n]``.
        labels: ``[N]``, or ``None``.
        data: ``[M, n]``.
        title: Above all.
    """
    columns = min(4, len(rows))
    lines = -(-len(rows) // columns)
    figure, axes = _new_figure(2.4 * columns, (2.2 * _steepness(data) + 0.55) * lines + 0.4, lines, columns)
    for place in axes[len(rows) :]:
        place.axis("off")
    for place, (label, points) in zip(axes, rows, strict=False):
        _draw_points(place, points, labels, data)
        place.set_title(label, fontsize=9, color=INK)
        place.set_xticks([])
        place.set_yticks([])
        place.spines[:].set_visible(False)
    _entitle(figure, title)
    return figure


def _steepness(data: Tensor) -> float:
    """Height over width of what points are drawn in."""
    if data.shape[1] < 2:
        return 0.5
    width, height = (data.max(0).values - data.min(0).values)[:2].tolist()
    return min(1.5, max(0.4, height / max(width, 1e-12)))


def _draw_points(axes: Axes, points: Tensor, labels: Tensor | None, data: Tensor) -> None:
    # At random, for every so-manieth point may be of one class.
    shown = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:DATA_AT_MOST]]
    axes.scatter(*_plane(shown), s=4, color=FAINT, linewidths=0)
    for label in [None] if labels is None else labels.unique().tolist():
        chosen = points if label is None or labels is None else points[labels == label]
        axes.scatter(*_plane(chosen), s=5, color=COLOURS[(label or 0) % len(COLOURS)], alpha=0.7, linewidths=0)
    # What the data fill, with room around it: one stray sample must not shrink the picture.
    low, high = data.min(0).values, data.max(0).values
    room = 0.15 * (high - low)
    axes.set_xlim(float(low[0] - room[0]), float(high[0] + room[0]))
    if data.shape[1] > 1:
        axes.set_ylim(float(low[1] - room[1]), float(high[1] + room[1]))
        axes.set_aspect("equal", adjustable="box")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)


def _plane(points: Tensor) -> tuple[np.ndarray, np.ndarray]:
    first = points[:, 0].numpy()
    return first, points[:, 1].numpy() if points.shape[1] > 1 else np.zeros_like(first)


def _new_figure(width: float, height: float, rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure outside pyplot, so that nothing keeps it alive and no display is asked for."""
    with rc_context(_RC):
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def _entitle(figure: Figure, title: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=9.5, color=INK)
