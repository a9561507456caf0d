"""Vectors as whole numbers modulo 2³², whose sum is that of the vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightrail.options import between, positive

__all__ = ["FixedPoint", "weighted_mean", "with_weight"]


@dataclass(frozen=True)
class FixedPoint:
    r"""Clips each entry, and rounds it to one of 2 L + 1 levels.

    .. math:: q_i = \operatorname{round}\big(L \min(\max(x_i, -c), c) / c\big), \qquad L = 2^{b-1} - 1

    A sum over n clients is exact where n L < 2³¹; each client's part of it is within c / (2 L) of its clipped entry.

    Args:
        clip: c, greater than 0.
        bits: b, from 2 to 31.

    Raises:
        ConfigurationError: An option is out of range.

    Example:
        >>> form = FixedPoint(clip=1.0, bits=3)
        >>> q = form.encode(torch.tensor([0.3, -5.0])) + form.encode(torch.tensor([0.4, 0.4]))
        >>> q.tolist(), form.decode(q)
        ([2, -2], tensor([ 0.6667, -0.6667], dtype=torch.float64))
    """

    clip: float = 8.0
    bits: int = 20

    def __post_init__(self) -> None:
        positive(clip=self.clip)
        between(2, 31, closed="both", bits=self.bits)

    @property
    def levels(self) -> int:
        """L."""
        return 2 ** (int(self.bits) - 1) - 1

    def encode(self, x: Tensor) -> Tensor:
        """q, int32 in the shape of x.

        Args:
            x: Finite, floating point.

        Raises:
            ValueError: x has entries that are not finite.
        """
        if not bool(x.isfinite().all()):
            raise ValueError("a vector with entries that are not finite cannot be summed")
        return (x.detach().cpu().double().clamp(-self.clip, self.clip) * (self.levels / self.clip)).round().int()

    def decode(self, total: Tensor) -> Tensor:
        """The sum of the vectors, float64, of the sum of their q modulo 2³², int32."""
        return total.double() * (self.clip / self.levels)


def with_weight(x: Tensor, weight: float) -> Tensor:
    """(w x, w): vectors whose sum holds both sums of a weighted mean.

    Args:
        x: ``[d]``.
        weight: w ≥ 0. It is clipped as entries are: shares of the largest weight, at most 1, are a good choice.

    Returns:
        ``[d + 1]``.

    Example:
        >>> with_weight(torch.tensor([1.0, 2.0]), 0.5)
        tensor([0.5000, 1.0000, 0.5000])
    """
    return torch.cat([weight * x, x.new_tensor([weight])])


def weighted_mean(total: Tensor) -> Tensor:
    """Σ w x / Σ w of a sum of :func:`with_weight`.

    Args:
        total: ``[d + 1]``.

    Returns:
        ``[d]``.

    Raises:
        ValueError: The weights have no positive sum.

    Example:
        >>> weighted_mean(with_weight(torch.tensor([1.0]), 0.5) + with_weight(torch.tensor([4.0]), 1.0))
        tensor([3.])
    """
    if not float(total[-1]) > 0:
        raise ValueError(f"the weights have the sum {float(total[-1])}, which is not above 0")
    return total[:-1] / total[-1]
