"""What a classifier got right and wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightrail_starter.figures.style import BLUES, FAINT, GREEN, INK, RED, new_figure, titled

__all__ = ["confusion_matrix", "prediction_grid"]

WRITTEN_UP_TO = 20  # classes; beyond, numbers and names in the cells could not be read


def confusion_matrix(prediction: Tensor, target: Tensor, names: Sequence[str]) -> Figure:
    """How often each class was taken for each; colours are shares of the true class.

    Args:
        prediction: ``[N]`` int64.
        target: ``[N]`` int64.
        names: Of the classes.
    """
    count = len(names)
    table = torch.bincount(target * count + prediction, minlength=count * count).view(count, count).numpy()
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    written = count <= WRITTEN_UP_TO
    side = min(9.0, max(4.0, 1.6 + 0.42 * count))
    figure, (axes,) = new_figure(side, side)
    axes.imshow(share, cmap=BLUES, vmin=0, vmax=1)
    for row, column in np.argwhere(table > 0) if written else ():
        colour = "white" if share[row, column] > 0.5 else RED if row != column else INK
        axes.text(column, row, f"{table[row, column]:,}", ha="center", va="center", color=colour, fontsize=9)
    if written:
        upright = max(map(len, names)) <= 3
        axes.set_xticks(range(count), [_short(name) for name in names], rotation=0 if upright else 45,
                        ha="center" if upright else "right")  # fmt: skip
        axes.set_yticks(range(count), [_short(name) for name in names])
    axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
    if written:
        axes.grid(which="minor", color=FAINT, linewidth=0.8)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    wrong = len(target) - int(np.trace(table))
    titled(axes, f"{len(target) - wrong:,} of {len(target):,} right ({1 - wrong / max(1, len(target)):.2%})")
    return figure


def prediction_grid(
    images: Tensor, probabilities: Tensor, target: Tensor, names: Sequence[str], count: int = 36
) -> Figure:
    """Pictures with what they were taken for, and how surely: every mistake first, the surest foremost.

    Args:
        images: ``[N, 1 or 3, H, W]``, in any range.
        probabilities: ``[N, C]``.
        target: ``[N]`` int64.
        names: Of the classes.
        count: Pictures shown at most.
    """
    sureness, prediction = probabilities.max(dim=1)
    right = prediction.eq(target)
    # The mistakes fill at most half of the grid; of what is right, the order is that of the data.
    wrong = (~right).nonzero()[:, 0]
    wrong = wrong[sureness[wrong].argsort(descending=True)][: count // 2]
    chosen = torch.cat((wrong, right.nonzero()[:, 0]))[:count].tolist()
    columns = min(9, len(chosen))
    rows = -(-len(chosen) // columns)
    figure, axes = new_figure(1.05 * columns, 1.32 * rows + 0.35, rows, columns)
    for place in axes:
        place.axis("off")
    for place, i in zip(axes, chosen, strict=False):
        picture = _displayable(images[i])
        place.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        place.axis("on")
        place.set_xticks([])
        place.set_yticks([])
        colour = GREEN if right[i] else RED
        place.spines[:].set(visible=True, color=colour, linewidth=1.0 if right[i] else 2.0)
        label = _short(names[int(prediction[i])])
        label = label if right[i] else f"{label}, not {_short(names[int(target[i])])}"
        place.set_xlabel(f"{label}\n{sureness[i]:.0%}", fontsize=8, color=colour, labelpad=3)
    figure.suptitle("Predictions on test pictures, mistakes first", x=0.01, ha="left", fontsize=11, fontweight="bold",
                    color=INK)  # fmt: skip
    return figure


def _displayable(image: Tensor) -> np.ndarray:
    low, high = image.min(), image.max()
    if low < 0 or high > 1:
        image = (image - low) / (high - low).clamp_min(1e-12)
    return image[0].numpy() if image.shape[0] == 1 else image.permute(1, 2, 0).numpy()


def _short(name: str) -> str:
    return name if len(name) <= 12 else name[:11] + "…"
