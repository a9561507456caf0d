"""What is asked of a source of noise, whatever its numbers are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightrail.errors import ConfigurationError
from lightrail.options import at_least, non_negative

__all__ = ["DRAWS", "NoiseSource"]

# Of how many normals one is made.
DRAWS = 4

# Numbers whose noise is drawn at once, before it is added.
AT_ONCE = 1 << 20

# Records of which it is decided at once whether they are drawn.
RECORDS = 1 << 18


class NoiseSource(ABC):
    """Gaussian noise for gradients, and the coins of Poisson sampling.

    Each normal is the sum of ``draws`` independent ones divided by √draws: the last bits of a single one tell which
    floating-point numbers it can have been added to.

    Attributes:
        name: What it is, for the ledger.
        is_secret: Whether nobody can repeat it; without that a run is not private.

    Args:
        draws: Normals in a sum, at least 1.

    Reference:
        N. Holohan and S. Braghin (2021), Secure Random Sampling in Differential Privacy, ESORICS, section 5.
    """

    name: str
    is_secret: bool

    def __init__(self, draws: int = DRAWS) -> None:
        at_least(1, draws=draws)
        self.draws = draws

    def normal_like(self, tensors: Sequence[Tensor], std: float) -> list[Tensor]:
        """Independent N(0, std²) in the shape, dtype and device of each tensor.

        Drawn in float64 for float64 and in float32 for all others, and cast last. The real and the imaginary part of a
        complex number have each the standard deviation ``std``.

        Args:
            tensors: Floating-point or complex, of any shape.
            std: At least 0.

        Returns:
            One contiguous tensor each.

        Raises:
            ConfigurationError: ``std`` is negative or not finite, or a tensor holds whole numbers.
        """
        _check(tensors, std)
        return [noise.to(tensor.dtype) for noise, tensor in zip(self._drawn(tensors, std), tensors, strict=True)]

    @torch.no_grad()
    def add_to(self, tensors: Sequence[Tensor], std: float) -> None:
        """Adds independent N(0, std²) to each tensor in place; a sum of low precision is rounded once, after it.

        Args:
            tensors: Floating-point or complex, of any shape.
            std: At least 0.

        Raises:
            ConfigurationError: ``std`` is negative or not finite, or a tensor holds whole numbers.
        """
        _check(tensors, std)
        for some in _few(tensors) if std else ():
            if (
                some[0].dtype in (torch.float32, torch.float64)
                and some[0].numel() >= AT_ONCE
                and some[0].is_contiguous()
            ):
                self._add(some[0].view(-1), std)
                continue
            pairs = list(zip(some, self._drawn(some, std), strict=True))
            same = [(tensor, noise) for tensor, noise in pairs if tensor.dtype == noise.dtype]
            if same:
                torch._foreach_add_([tensor for tensor, _ in same], [noise for _, noise in same])
            for tensor, noise in pairs:
                if tensor.dtype != noise.dtype:
                    tensor.copy_(noise.add_(tensor))

    def bernoulli(self, count: int, batch: int, records: int) -> Tensor:
        """Which of ``count`` records are drawn, each with probability exactly batch / records, independently.

        The binary digits of the probability are compared with random ones, 32 at a time, until they differ.

        Args:
            count: How many records are decided on.
            batch: The expected number of those drawn of all ``records``; between 0 and ``records``.
            records: How many there are; at least 1.

        Returns:
            bool ``[count]``, on the processor.

        Raises:
            ConfigurationError: ``batch`` is more than ``records``, or a number is negative.

        Example:
            >>> from lightrail.privacy.noise import DeterministicNoise
            >>> int(DeterministicNoise(seed=0).bernoulli(8, batch=3, records=3).sum())
            8
        """
        at_least(0, count=count, batch=batch)
        at_least(1, records=records)
        if batch > records:
            raise ConfigurationError(
                "a batch is larger than the data",
                found=f"batch={batch}, records={records}",
                allowed=f"a batch of at most {records}",
                remedy="Lower the batch size.",
            )
        if batch in (0, records):
            return torch.full((count,), batch == records, device="cpu")
        parts = [self._coins(min(RECORDS, count - first), batch, records) for first in range(0, count, RECORDS)]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool, device="cpu")

    def _coins(self, count: int, batch: int, records: int) -> Tensor:
        digit, remainder = divmod(batch << 32, records)
        digits = self._digits(count)
        # Random digits are those of signed numbers, so that no wider type is needed.
        drawn = digits < digit - (1 << 31)
        undecided = (digits == digit - (1 << 31)).nonzero()[:, 0]
        if remainder and len(undecided):
            drawn[undecided] = self._coins(len(undecided), remainder, records)
        return drawn

    def _drawn(self, tensors: Sequence[Tensor], std: float) -> list[Tensor]:
        """The noise of each tensor in the precision in which it is drawn; what can be is drawn at once."""
        places: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for place, tensor in enumerate(tensors):
            is_double = tensor.dtype in (torch.float64, torch.complex128)
            places.setdefault((torch.float64 if is_double else torch.float32, tensor.device), []).append(place)
        drawn: dict[int, Tensor] = {}
        for (dtype, device), some in places.items():
            sizes = [tensors[place].numel() * (2 if tensors[place].is_complex() else 1) for place in some]
            flat = torch.zeros(sum(sizes), dtype=dtype, device=device)
            if std and flat.numel():
                self._fill(flat, std)
            drawn.update(zip(some, flat.split(sizes), strict=True))
        return [_shaped(drawn[place], tensor) for place, tensor in enumerate(tensors)]

    def _add(self, flat: Tensor, std: float) -> None:
        """Adds N(0, std²) to a long vector of float32 or float64, a part at a time."""
        for part in flat.split(AT_ONCE):
            noise = torch.empty_like(part)
            self._fill(noise, std)
            part.add_(noise)

    @abstractmethod
    def _fill(self, out: Tensor, std: float) -> None:
        """Writes N(0, std²) into a vector of float32 or float64."""

    @abstractmethod
    def _digits(self, count: int) -> Tensor:
        """Uniform int32 ``[count]`` over all values, on the processor."""

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on from here; nothing where the noise is not to be repeated."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        del state


def _shaped(flat: Tensor, tensor: Tensor) -> Tensor:
    return torch.complex(*flat.view(2, *tensor.shape)) if tensor.is_complex() else flat.view(tensor.shape)


def _few(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors whose noise is drawn at once: many small ones, or a large one."""
    some: list[Tensor] = []
    for tensor in tensors:
        if tensor.numel() >= AT_ONCE:
            yield [tensor]
            continue
        some.append(tensor)
        if sum(each.numel() for each in some) >= AT_ONCE:
            yield some
            some = []
    if some:
        yield some


def _check(tensors: Sequence[Tensor], std: float) -> None:
    non_negative(std=std)
    for tensor in tensors:
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise ConfigurationError(
                "noise is asked for a tensor of whole numbers",
                found=f"{tensor.dtype}",
                allowed="a floating-point or complex tensor",
                remedy="Make noise for parameters and gradients only.",
            )
