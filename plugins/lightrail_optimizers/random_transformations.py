"""Random transformations of a batch of inputs, one of its own for each sample, from uniform numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightrail.errors import ClosureError, ConfigurationError, closest
from lightrail.options import between, non_negative

__all__ = ["AFFINE", "check_magnitudes", "numbers_needed", "transformed"]

AFFINE = ("shift", "rotate", "scale", "flip")
_NUMBERS = 5  # of an affine transformation: two shifts, an angle, a scale, a flip


def check_magnitudes(magnitudes: Mapping[str, float]) -> None:
    """Each name is that of a transformation, and each magnitude within its range.

    Raises:
        ConfigurationError: Otherwise.
    """
    known = (*AFFINE, "noise")
    for name, magnitude in magnitudes.items():
        if name not in known:
            raise ConfigurationError(
                f"there is no transformation '{name}'",
                found=f"transformations.{name}={magnitude}",
                allowed=f"{', '.join(known)}, or a node with _target_ for one of your own",
                remedy=f"{closest(name, known)}Choose among these.",
            )
        option: dict[str, Any] = {f"transformations.{name}": magnitude}
        if name in ("shift", "scale"):
            between(0.0, 1.0, **option)
        elif name == "flip":
            between(0.0, 1.0, closed="both", **option)
        else:
            non_negative(**option)


def numbers_needed(x: Tensor, magnitudes: Mapping[str, float]) -> int:
    """How many uniform numbers :func:`transformed` takes for a sample of ``x``."""
    return _NUMBERS + (x[0].numel() if magnitudes.get("noise") else 0)


def transformed(x: Tensor, magnitudes: Mapping[str, float], numbers: Tensor) -> Tensor:
    """Each sample under a transformation of its own; what it moves in from outside is 0.

    Args:
        x: ``[B, …]``; images ``[B, C, H, W]`` for all but ``noise``.
        magnitudes: ``shift``: the largest, along each axis, as a share of the image. ``rotate``: the largest angle, in
            degrees. ``scale``: the largest relative change of size. ``flip``: the probability of a left-right mirror
            image. ``noise``: the standard deviation of what is added to each number.
        numbers: ``[B, numbers_needed]``, uniform in [0, 1): a half is no change, and no noise.

    Raises:
        ClosureError: The inputs are no images.

    Example:
        >>> transformed(torch.ones(1, 1, 1, 4), {"shift": 0.5}, torch.tensor([[1.0, 0.5, 0.5, 0.5, 0.5]])).tolist()
        [[[[0.0, 0.0, 1.0, 1.0]]]]
    """
    if any(magnitudes.get(name) for name in AFFINE):
        if x.dim() != 4:
            raise ClosureError(
                "the inputs are no images, and these transformations are for images",
                found=f"inputs {tuple(x.shape)}; transformations {', '.join(magnitudes)}",
                allowed="images [B, C, H, W]; for inputs of any shape: noise, or a callable of your own",
                remedy="Set transformations={noise: SIZE}, or a node with _target_ that suits the inputs.",
            )
        grid = F.affine_grid(_affine(x, magnitudes, numbers), list(x.shape), align_corners=False)
        x = F.grid_sample(x.to(grid), grid, align_corners=False).to(x)
    if magnitudes.get("noise"):
        # From uniform numbers, which are the same however many are drawn at once; normal ones are not.
        normal = torch.special.ndtri(numbers[:, _NUMBERS:].clamp(1e-7, 1 - 1e-7)).reshape(x.shape)
        x = x + magnitudes["noise"] * normal.to(x)
    return x


def _affine(x: Tensor, magnitudes: Mapping[str, float], numbers: Tensor) -> Tensor:
    """Where each pixel comes from, ``[B, 2, 3]``, in coordinates that run from -1 to 1 over the image."""
    across, down, turn, size, mirror = numbers[:, :_NUMBERS].unbind(1)
    angle = torch.deg2rad(magnitudes.get("rotate", 0.0) * (2 * turn - 1))
    scale = 1 + magnitudes.get("scale", 0.0) * (2 * size - 1)
    flip = torch.where(mirror < magnitudes.get("flip", 0.0), -1.0, 1.0).to(numbers)
    shift = 2 * magnitudes.get("shift", 0.0)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    height, width = x.shape[-2:]
    # A turn is one of pixels, which are not square in these coordinates unless the image is.
    first = torch.stack([flip * cos, -flip * sin * height / width, -shift * (2 * across - 1)], 1)
    second = torch.stack([sin * width / height, cos, -shift * (2 * down - 1)], 1)
    return torch.stack([first, second], 1)
