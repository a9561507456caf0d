"""Inpainting: some entries of a sample are seen, the others are not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lightrail.errors import CompositionError, ConfigurationError, DataError
from lightrail.generation import Measurement, Noise
from lightrail.options import at_least, between
from lightrail.traits import Traits

__all__ = ["Inpaint", "box_mask", "random_mask", "read_mask"]

HIDDEN_BOX = (0.25, 0.25, 0.75, 0.75)


def box_mask(sides: Sequence[int], box: Sequence[float]) -> Tensor:
    """Which pixels are seen, ``[H, W]``: those outside a box.

    Args:
        sides: H and W.
        box: Top, left, bottom and right of what is hidden, as shares of the sides.

    Example:
        >>> box_mask((4, 4), (0.25, 0.5, 0.75, 1.0)).int().sum(1).tolist()
        [4, 2, 2, 4]
    """
    top, left, bottom, right = (round(share * sides[i % 2]) for i, share in enumerate(box))
    seen = torch.ones(*sides, dtype=torch.bool)
    seen[top:bottom, left:right] = False
    return seen


def random_mask(sides: Sequence[int], share: float, seed: int) -> Tensor:
    """Which entries are seen, ``[*sides]``: all but a random share.

    Args:
        sides: Of a sample, without its channels.
        share: How many are hidden, in (0, 1); at least one is seen and one hidden.
        seed: Which ones.
    """
    count = math.prod(sides)
    hidden = min(max(1, round(share * count)), count - 1)
    order = torch.from_numpy(Noise(seed, [0], (count,)).uniform(0, shape=(count,)).numpy()[0]).argsort()
    seen = torch.ones(count, dtype=torch.bool)
    seen[order[:hidden]] = False
    return seen.view(*sides)


def read_mask(file: Path) -> Tensor:
    """A mask from a picture, white where it is seen, or from an array of numbers that are not 0 there.

    Args:
        file: ``.npy``, or a picture such as ``.png``.

    Raises:
        DataError: It cannot be read.
    """
    import numpy as np
    from PIL import Image

    try:
        if file.suffix.lower() == ".npy":
            return torch.from_numpy(np.load(file, allow_pickle=False) != 0)
        with Image.open(file) as opened:
            return torch.from_numpy(np.asarray(opened.convert("L")) > 127)
    except (OSError, ValueError) as error:
        raise DataError(
            "the mask cannot be read",
            found=f"{file}: {str(error).partition(chr(10))[0]}",
            allowed="a picture, white where it is seen, or a .npy array that is not 0 there",
            remedy="Set measurement.mask to a file that opens elsewhere.",
        ) from error


class Inpaint(Measurement):
    """The entries that a mask lets through: y = M x + s z, with one row of the identity for each that is seen.

    M Mᵀ = I, so that A⁺ = Mᵀ. In images all channels of a pixel are seen or hidden together. Without any option the
    middle half of either side is hidden; of points, the second half of the entries.

    Args:
        box: Top, left, bottom and right of what is hidden of an image, as shares of its sides in [0, 1].
        share: The share of pixels or entries, drawn at random, that are hidden, in (0, 1).
        mask: A file: a picture, white where it is seen, or a ``.npy`` array that is not 0 there, of the sample's size.
        hidden: The numbers of the hidden entries of a point, from 0.
        seed: Which entries a ``share`` hides.
        noise: s, at least 0, in the units of the samples (pixels from 0 to 1).

    Raises:
        ConfigurationError: More than one of the ways to hide is chosen, or one is out of range.
        CompositionError: The mask does not fit the samples, or hides nothing or everything.
        DataError: The file cannot be read.

    Example:
        >>> operator = Inpaint(hidden=[1])
        >>> operator.prepare((3,))
        >>> operator.apply(torch.tensor([[1.0, 2.0, 3.0]])).tolist()
        [[1.0, 3.0]]
        >>> operator.pseudo_inverse(torch.tensor([[1.0, 3.0]])).tolist()
        [[1.0, 0.0, 3.0]]
    """

    traits: ClassVar[Traits] = Traits(rule="y = M x + s z", example={"hidden": [1]})

    def __init__(
        self,
        box: Sequence[float] | None = None,
        share: float | None = None,
        mask: str | None = None,
        hidden: Sequence[int] | None = None,
        seed: int = 0,
        noise: float = 0.0,
    ) -> None:
        super().__init__(noise)
        ways = {"box": box, "share": share, "mask": mask, "hidden": hidden}
        chosen = [name for name, value in ways.items() if value is not None]
        if len(chosen) > 1:
            raise ConfigurationError(
                "it is not clear what is hidden",
                found=" and ".join(f"{name}={ways[name]}" for name in chosen),
                allowed="one of box, share, mask and hidden",
                remedy=f"Leave {chosen[1]} out.",
            )
        if box is not None:
            _check_box(box)
        if share is not None:
            between(0, 1, closed="neither", share=share)
        at_least(0, seed=seed)
        self.box = box
        self.share = share
        self.mask = mask
        self.hidden = hidden
        self.seed = seed
        self.seen = torch.ones(0, dtype=torch.bool)

    def prepare(self, shape: tuple[int, ...]) -> None:
        seen = self._seen(shape)
        sides = shape[1:] if len(shape) == 3 else shape
        if tuple(seen.shape) not in (sides, shape):
            raise _misfit(f"a mask of shape {tuple(seen.shape)}", sides, "Give the mask the size of a sample.")
        self.seen = seen.expand(shape).clone()
        if not bool(self.seen.any()) or bool(self.seen.all()):
            what = "all" if bool(self.seen.all()) else "none"
            raise _misfit(f"a mask that lets {what} through", sides, "Hide some entries, and not all of them.")

    def _seen(self, shape: tuple[int, ...]) -> Tensor:
        sides = shape[1:] if len(shape) == 3 else shape
        if self.mask is not None:
            return read_mask(Path(self.mask))
        if self.share is not None:
            return random_mask(sides, self.share, self.seed)
        if len(shape) == 3 and self.hidden is None:
            return box_mask(sides, HIDDEN_BOX if self.box is None else self.box)
        if len(shape) != 1:
            raise _misfit(f"hidden={self.hidden}", sides, "Hide pixels with box, share or mask.")
        if self.box is not None:
            raise _misfit(f"box={list(self.box)}", sides, "Hide entries of points with hidden or share.")
        hidden = range((shape[0] + 1) // 2, shape[0]) if self.hidden is None else self.hidden
        if any(not 0 <= each < shape[0] for each in hidden):
            raise _misfit(f"hidden={list(hidden)}", sides, f"Number the entries from 0 to {shape[0] - 1}.")
        seen = torch.ones(shape, dtype=torch.bool)
        seen[list(hidden)] = False
        return seen

    def _places(self, like: Tensor) -> Tensor:
        return self.seen.flatten().nonzero()[:, 0].to(like.device)

    def apply(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, self._places(x)]

    def adjoint(self, y: Tensor) -> Tensor:
        empty = y.new_zeros(len(y), self.seen.numel())
        return empty.index_copy(1, self._places(y), y).view(len(y), *self.seen.shape)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        return self.adjoint(y)

    def picture(self, y: Tensor) -> Tensor:
        """What was seen, with grey where nothing was."""
        return self.adjoint(y) + 0.5 * (~self.seen).to(y.device, y.dtype)

    def from_picture(self, picture: Tensor) -> Tensor:
        """The entries that are seen; what stands in the place of the others does not matter."""
        return self.apply(picture)


def _check_box(box: Sequence[float]) -> None:
    is_four = len(box) == 4 and all(0 <= each <= 1 for each in box)
    if not is_four or box[0] >= box[2] or box[1] >= box[3]:
        raise ConfigurationError(
            "box is not a box",
            found=f"box={list(box)}",
            allowed="[top, left, bottom, right], shares of the sides in [0, 1], top below bottom and left below right",
            remedy="Write measurement.box=[0.25,0.25,0.75,0.75] for the middle.",
        )


def _misfit(found: str, sides: Sequence[int], remedy: str) -> CompositionError:
    return CompositionError(
        "what is hidden does not fit the samples",
        found=found,
        allowed=f"some entries, and not all, of samples of {' by '.join(map(str, sides))}",
        remedy=remedy,
    )
