"""Blurring: each pixel is a weighted mean of those around it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lightrail.errors import CompositionError, ConfigurationError, DataError
from lightrail.generation import Measurement
from lightrail.options import at_least, one_of, positive
from lightrail.traits import Traits

__all__ = ["BORDERS", "Blur", "convolution_matrix", "gaussian_kernel", "separated"]

BORDERS = ("reflect", "circular")
# What a blur weakens more than this drowns in the rounding of single precision when it is brought back.
SMALLEST_SHARE = 1e-4


def gaussian_kernel(sigma: float, size: int) -> Tensor:
    """Weights of a Gaussian at whole pixels around the middle, ``[size]``, which sum to 1.

    Args:
        sigma: Standard deviation in pixels.
        size: Odd.

    Example:
        >>> [round(each, 4) for each in gaussian_kernel(1.0, 3).tolist()]
        [0.2741, 0.4519, 0.2741]
    """
    places = torch.arange(size, dtype=torch.float64) - size // 2
    weights = torch.exp(-0.5 * (places / sigma) ** 2)
    return weights / weights.sum()


def convolution_matrix(kernel: Tensor, side: int, border: str) -> Tensor:
    """The matrix C ``[side, side]`` of y_i = Σ_j k_j x_{i−j}, with j counted from the kernel's middle.

    Args:
        kernel: k.
        side: Pixels.
        border: ``reflect``, which mirrors at the centres of the outermost pixels, or ``circular``.
    """
    matrix = torch.zeros(side, side, dtype=kernel.dtype)
    for i in range(side):
        for number, weight in enumerate(kernel):
            place = i - (number - len(kernel) // 2)
            if border == "circular":
                place %= side
            else:
                place = abs(place)
                place = 2 * (side - 1) - place if place >= side else place
            matrix[i, place] += weight
    return matrix


def separated(kernel: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Columns u and rows v with Σ u vᵀ = the kernel ``[h, w]``, as few as there can be."""
    left, values, right = torch.linalg.svd(kernel)
    kept = values > 1e-12 * values[0]
    return [(left[:, r] * values[r], right[r]) for r in range(len(values)) if bool(kept[r])]


class Blur(Measurement):
    """A convolution of every channel with one kernel: y = k ∗ x + s z.

    It is a sum of few products of a matrix for the columns and one for the rows, A x = Σ R x Cᵀ, whose transpose is
    exact at the borders too. A⁺ is exact with a Gaussian, or with circular borders; what the blur weakens ten
    thousand-fold counts as lost. With another kernel and reflecting borders it is found by conjugate gradients.

    Args:
        sigma: The standard deviation of a Gaussian kernel, in pixels, above 0.
        size: Its size in pixels, odd; ``None`` for what holds three standard deviations to either side, or as much of
            that as the borders allow.
        kernel: A file with a kernel of yours, in place of the Gaussian: a ``.npy`` array ``[h, w]``, or a grey
            picture, which is scaled to sum to 1.
        border: ``reflect`` or ``circular``: what lies beyond the sides.
        noise: s, at least 0, in the units of the samples.

    Raises:
        ConfigurationError: An option is out of range.
        CompositionError: The samples are no images, or smaller than the kernel.
        DataError: The file cannot be read.

    Example:
        >>> operator = Blur(sigma=1.0, size=3)
        >>> operator.prepare((1, 4, 4))
        >>> bool(torch.allclose(operator.apply(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4)))
        True
    """

    traits: ClassVar[Traits] = Traits(rule="y = k ∗ x + s z", example={"sigma": 1.0})

    def __init__(
        self,
        sigma: float = 1.0,
        size: int | None = None,
        kernel: str | None = None,
        border: str = "reflect",
        noise: float = 0.0,
    ) -> None:
        super().__init__(noise)
        positive(sigma=sigma)
        one_of(BORDERS, border=border)
        if size is not None:
            at_least(1, size=size)
            if size % 2 == 0:
                raise ConfigurationError(
                    "size is even", found=f"size={size}", allowed="an odd number", remedy=f"Set size={size + 1}."
                )
        self.sigma = sigma
        self.size = size
        self.kernel = None if kernel is None else _read_kernel(Path(kernel))
        self.border = border
        self._sides = (0, 0)
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def prepare(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 3:
            raise CompositionError(
                "only images can be blurred",
                found=f"samples of shape {tuple(shape)}",
                allowed="(channels, height, width)",
                remedy="Choose measurement=inpaint, which measures points too.",
            )
        self._sides = height, width = shape[1], shape[2]
        if self.kernel is None:
            reach = min(round(3 * self.sigma), min(height, width) - (self.border == "reflect"))
            weights = gaussian_kernel(self.sigma, self.size or 2 * reach + 1)
            kernels = [(weights, weights)]
        else:
            kernels = separated(self.kernel)
        tall, wide = len(kernels[0][0]), len(kernels[0][1])
        if max(tall // 2 - height, wide // 2 - width) >= (0 if self.border == "reflect" else 1):
            raise CompositionError(
                "the kernel is larger than the images",
                found=f"a kernel of {tall} by {wide} for images of {height} by {width}",
                allowed="a kernel that reaches no further than an image",
                remedy="Set a smaller measurement.size.",
            )
        self._pairs = [
            (convolution_matrix(u, height, self.border), convolution_matrix(v, width, self.border)) for u, v in kernels
        ]

    def apply(self, x: Tensor) -> Tensor:
        pairs = [(rows.to(x), columns.to(x)) for rows, columns in self._pairs]
        return torch.stack([rows @ x @ columns.T for rows, columns in pairs]).sum(0)

    def adjoint(self, y: Tensor) -> Tensor:
        pairs = [(rows.to(y), columns.to(y)) for rows, columns in self._pairs]
        return torch.stack([rows.T @ y @ columns for rows, columns in pairs]).sum(0)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        if len(self._pairs) == 1:
            (left, s, right), (above, t, below) = (torch.linalg.svd(each.to(y.device)) for each in self._pairs[0])
            return (right.T @ _divided(left.T @ y.double() @ above, s[:, None] * t) @ below).to(y.dtype)
        if self.border == "reflect":
            return super().pseudo_inverse(y)
        impulse = torch.zeros(1, 1, *self._sides, dtype=torch.float64)
        impulse[..., 0, 0] = 1
        response = torch.fft.fft2(self.apply(impulse)).to(y.device)
        return torch.fft.ifft2(_divided(torch.fft.fft2(y.double()), response)).real.to(y.dtype)

    def picture(self, y: Tensor) -> Tensor:
        """The blurred images."""
        return y


def _divided(values: Tensor, gains: Tensor) -> Tensor:
    """The values by their gains; 0 where a gain is as good as none."""
    is_kept = gains.abs() > SMALLEST_SHARE * gains.abs().max()
    return torch.where(is_kept, values / torch.where(is_kept, gains, 1.0), 0.0)


def _read_kernel(file: Path) -> Tensor:
    import numpy as np
    from PIL import Image

    try:
        if file.suffix.lower() == ".npy":
            kernel = torch.from_numpy(np.load(file, allow_pickle=False)).double()
        else:
            with Image.open(file) as opened:
                kernel = torch.from_numpy(np.asarray(opened.convert("L")).copy()).double()
            kernel = kernel / kernel.sum()
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            "the kernel cannot be read",
            found=f"{file}: {str(error).partition(chr(10))[0]}",
            allowed="a .npy array of two dimensions, or a picture",
            remedy="Set measurement.kernel to a file that opens elsewhere.",
        ) from error
    if kernel.ndim != 2 or not bool(kernel.isfinite().all()) or not bool(kernel.any()):
        raise DataError(
            "the kernel is not one",
            found=f"{file} of shape {tuple(kernel.shape)}",
            allowed="two dimensions of finite numbers, not all 0",
            remedy="Mend the file.",
        )
    return kernel
