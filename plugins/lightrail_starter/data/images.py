"""From a picture to a tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightrail_starter.extras import require

__all__ = ["as_tensor", "pillow"]


def pillow(plugin: str) -> Any:
    """Pillow's ``Image`` module.

    Raises:
        PluginError: Pillow is not installed.
    """
    return require("PIL.Image", extra="images", plugin=plugin)


def as_tensor(picture: Any, size: int, grayscale: bool) -> Tensor:
    """A Pillow picture as ``[C, size, size]`` float32 in [0, 1].

    Args:
        picture: Of any mode and shape; it is squeezed into a square.
        size: Pixels a side.
        grayscale: One channel in place of three.
    """
    picture = picture.convert("L" if grayscale else "RGB")
    if picture.size != (size, size):
        picture = picture.resize((size, size), resample=2)  # bilinear, which widens its support when it shrinks
    pixels = torch.from_numpy(np.array(picture, dtype=np.uint8))
    pixels = pixels[None] if grayscale else pixels.permute(2, 0, 1)
    return pixels.float() / 255
