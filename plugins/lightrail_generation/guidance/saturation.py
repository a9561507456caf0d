"""How saturated samples are: what strong guidance drives up."""

from __future__ import annotations

from torch import Tensor

__all__ = ["saturation"]


def saturation(samples: Tensor) -> float:
    """How far samples lie from the middle of their range: a root mean square over all their numbers.

    Of images, whose pixels lie in [0, 1], it is that of 2 x − 1: 0 for mid-grey, 1 where every pixel is black or
    white, more where pixels overshoot the range. Of points it is the root mean square of their coordinates. Data have a
    value of their own, so it is read beside that of unguided samples.

    Args:
        samples: In the user's units, ``[N, …]``; images are ``[N, channels, height, width]``.

    Example:
        >>> import torch
        >>> round(saturation(torch.tensor([0.0, 1.0, 1.5, -0.5]).view(1, 1, 2, 2)), 3)
        1.581
    """
    wide = samples.double()
    return float((2 * wide - 1 if samples.ndim == 4 else wide).square().mean().sqrt())
