"""Some of the frequencies of an image, as a scanner measures them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightrail.errors import CompositionError
from lightrail.generation import Measurement, Noise
from lightrail.options import at_least, between, one_of
from lightrail.traits import Traits

__all__ = ["PATTERNS", "MaskFourier", "fourier_mask"]

PATTERNS = ("lines", "random")


def fourier_mask(height: int, width: int, pattern: str, share: float, center: float, seed: int) -> Tensor:
    """Which frequencies are measured, ``[H, W]``, with the mean of the image at ``[0, 0]``.

    Args:
        height: H.
        width: W.
        pattern: ``lines``: whole columns; ``random``: single frequencies.
        share: Of columns or frequencies that are measured.
        center: The share of columns, or of each side, around frequency 0 that is measured in any case.
        seed: Which are drawn.
    """

    def is_central(side: int) -> Tensor:
        return torch.fft.fftfreq(side, dtype=torch.float64).abs() <= center / 2

    central = is_central(width) if pattern == "lines" else is_central(height)[:, None] & is_central(width)
    drawn = Noise(seed, [0], tuple(central.shape)).uniform(0, shape=central.shape)[0]
    order = torch.where(central, -1.0, drawn).flatten().argsort()
    seen = central.flatten()
    seen[order[: max(1, round(share * seen.numel()))]] = True
    return seen.view(central.shape).expand(height, width).clone()


class MaskFourier(Measurement):
    """The Fourier coefficients of every channel that a mask lets through: y = M F x + s z, with F orthonormal.

    Real and imaginary parts stand in the last dimension of y. A real image has the same coefficient, conjugated, at
    −k as at k, so that AᵀA is a filter that passes a frequency by half where only one of the two is measured;
    A⁺ = (AᵀA)⁺ Aᵀ undoes it exactly.

    Args:
        pattern: ``lines``: whole columns of frequencies, as in a scanner; ``random``: single ones.
        share: The share that is measured, in (0, 1].
        center: The share of each side around frequency 0 that is measured in any case, in [0, 1].
        seed: Which ones are drawn.
        noise: s, at least 0, in the units of the samples, of the real and of the imaginary part.

    Raises:
        ConfigurationError: An option is out of range.
        CompositionError: The samples are no images.

    Example:
        >>> operator = MaskFourier(share=0.5)
        >>> operator.prepare((1, 8, 8))
        >>> tuple(operator.apply(torch.ones(2, 1, 8, 8)).shape)
        (2, 1, 32, 2)
    """

    traits: ClassVar[Traits] = Traits(rule="y = M F x + s z", example={"share": 0.5})

    def __init__(
        self, pattern: str = "lines", share: float = 0.5, center: float = 0.1, seed: int = 0, noise: float = 0.0
    ) -> None:
        super().__init__(noise)
        one_of(PATTERNS, pattern=pattern)
        between(0, 1, closed="right", share=share)
        between(0, 1, closed="both", center=center)
        at_least(0, seed=seed)
        self.pattern = pattern
        self.share = share
        self.center = center
        self.seed = seed
        self.mask = torch.ones(0, 0, dtype=torch.bool)

    def prepare(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 3:
            raise CompositionError(
                "only images have the frequencies of this measurement",
                found=f"samples of shape {tuple(shape)}",
                allowed="(channels, height, width)",
                remedy="Choose measurement=inpaint, which measures points too.",
            )
        self.mask = fourier_mask(shape[1], shape[2], self.pattern, self.share, self.center, self.seed)

    def apply(self, x: Tensor) -> Tensor:
        frequencies = torch.fft.fft2(_wide(x), norm="ortho")
        return torch.view_as_real(frequencies[..., self.mask.to(x.device)])

    def adjoint(self, y: Tensor) -> Tensor:
        return torch.fft.ifft2(self._placed(y), norm="ortho").real

    def _placed(self, y: Tensor) -> Tensor:
        values = torch.view_as_complex(_wide(y).contiguous())
        empty = values.new_zeros(*values.shape[:-1], self.mask.numel())
        places = self.mask.flatten().nonzero()[:, 0].to(y.device)
        return empty.index_copy(-1, places, values).unflatten(-1, tuple(self.mask.shape))

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        # The coefficient at −k: every index i becomes −i.
        opposite = self.mask.flip(0, 1).roll((1, 1), (0, 1))
        passed = (self.mask.double() + opposite.double()) / 2
        gain = torch.where(passed > 0, 1 / passed.clamp(min=0.5), 0.0).to(y.device)
        image = self.adjoint(y)
        return torch.fft.ifft2(torch.fft.fft2(image) * gain.to(image.dtype)).real


def _wide(x: Tensor) -> Tensor:
    """In single precision at least, which Fourier transforms need."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
