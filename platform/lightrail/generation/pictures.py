"""Pictures of samples: a grid for images, a scatter for points in the plane."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from lightrail.files import replacing
from lightrail.generation.denoiser import Denoiser, Generated

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["image_grid", "is_images", "observed_figures", "sample_figures", "save_picture", "scatter"]

SHOWN_AT_MOST = 144
SMALLEST_SIDE = 48  # pixels on the page; smaller images are enlarged by a whole factor


def is_images(samples: Tensor) -> bool:
    """Whether samples ``[N, C, H, W]`` can be shown as grey, coloured or transparent images."""
    return samples.ndim == 4 and samples.shape[1] in (1, 3, 4) and min(samples.shape[2:]) > 1


def image_grid(samples: Tensor, columns: int | None = None) -> np.ndarray:
    """Images beside each other on a white ground.

    Args:
        samples: ``[N, C, H, W]`` in [0, 1]; what lies outside is clipped.
        columns: How many in a row; by default about as many as rows.

    Returns:
        ``[height, width, 3 or 4]`` uint8.
    """
    shown = samples[:SHOWN_AT_MOST].float().cpu().clamp(0, 1)
    count, channels, height, width = shown.shape
    columns = columns or math.ceil(math.sqrt(count))
    factor = max(1, math.ceil(SMALLEST_SIDE / min(height, width)))
    gap = max(2, factor // 2)
    pixels = (shown.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    pixels = pixels.repeat(3, axis=-1) if channels == 1 else pixels
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    rows = math.ceil(count / columns)
    tall, wide = height * factor + gap, width * factor + gap
    page = np.full((rows * tall + gap, columns * wide + gap, pixels.shape[-1]), 255, dtype=np.uint8)
    for i, image in enumerate(pixels):
        top, left = (i // columns) * tall + gap, (i % columns) * wide + gap
        page[top : top + height * factor, left : left + width * factor] = image
    return page


def scatter(samples: Tensor, label: Tensor | None = None) -> Figure:
    """Points in the plane, coloured by their label where they have one.

    Args:
        samples: ``[N, 2]``.
        label: ``[N]``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    axes = figure.add_subplot()
    colours = None if label is None else label.cpu().numpy()
    points = samples.float().cpu().numpy()
    palette: Any = {"color": "#3866d6"} if colours is None else {"c": colours, "cmap": "tab10"}
    axes.scatter(points[:, 0], points[:, 1], s=8, alpha=0.7, linewidths=0, **palette)
    axes.set_aspect("equal")
    axes.set_title(f"{len(points)} samples", fontsize=10)
    return figure


def sample_figures(denoiser: Denoiser, generated: Generated) -> dict[str, Figure]:
    """The pictures of a generation: the model's own, and one of the samples where it draws none.

    Args:
        denoiser: The model.
        generated: Its samples.
    """
    figures: dict[str, Figure] = dict(denoiser.figures(generated))
    samples = generated.samples
    if "samples" in figures:
        return figures
    if is_images(samples):
        return {"samples": _framed(image_grid(samples)), **figures}
    if samples.ndim == 2 and samples.shape[1] == 2:
        label = (generated.condition or {}).get("label")
        return {"samples": scatter(samples, label), **figures}
    return figures


def observed_figures(generated: Generated) -> dict[str, Figure]:
    """What was measured, and of what, where that are images."""
    observed = generated.observed
    if observed is None or not is_images(generated.samples):
        return {}
    shown = {"measured": observed.operator.picture(observed.value)}
    if observed.truth is not None:
        shown["truth"] = observed.truth
    return {name: _framed(image_grid(images)) for name, images in shown.items() if is_images(images)}


def _framed(pixels: np.ndarray) -> Figure:
    from matplotlib.figure import Figure

    height, width = pixels.shape[:2]
    inches = min(7.0, width / 90)
    figure = Figure(figsize=(inches, inches * height / width))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(pixels, interpolation="nearest")
    axes.set_axis_off()
    return figure


def save_picture(figures: Mapping[str, Figure], generated: Generated, folder: Path) -> Path | None:
    """Writes ``samples.png``: the images pixel for pixel, else the figure of the samples.

    Args:
        figures: Those of the generation.
        generated: Its samples.
        folder: Where to.

    Returns:
        The file; ``None`` where there is nothing to be seen.
    """
    path = folder / "samples.png"
    if is_images(generated.samples):
        from PIL import Image

        with replacing(path) as temporary:
            Image.fromarray(image_grid(generated.samples)).save(temporary, format="PNG")
        return path
    if "samples" not in figures:
        return None
    with replacing(path) as temporary:
        figures["samples"].savefig(temporary, format="png", dpi=150)
    return path
