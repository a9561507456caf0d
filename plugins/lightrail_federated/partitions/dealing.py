"""What partitions share: groups of equal labels, and clients that come off too badly."""

from __future__ import annotations

import torch
from torch import Tensor

from lightrail.errors import CompositionError

__all__ = ["as_indices", "filled_up", "require_samples", "seed_of"]


def require_samples(partition: str, samples: int, clients: int, each: int = 1) -> None:
    """Refuses more clients than there are samples for.

    Args:
        partition: Its name.
        samples: How many there are.
        clients: How many clients.
        each: How many samples a client needs.

    Raises:
        CompositionError: There are too few.
    """
    if clients * each > samples:
        needs = "a sample" if each == 1 else f"{each} samples"
        raise CompositionError(
            f"partition '{partition}' has more clients than samples for them",
            found=f"{samples} samples, {clients} clients of at least {needs}",
            allowed=f"at most {samples // each} clients",
            remedy="Take fewer clients, or more data.",
        )


def filled_up(parts: list[list[int]], least: int) -> list[list[int]]:
    """Gives clients with too few samples some of those with the most.

    The first client that has too few takes the last sample of whoever has the most, the first of these where several
    do, and so on until all have enough; nothing is random about it.

    Args:
        parts: Samples of each client, at least ``least`` a client on average.
        least: How many each must have.

    Returns:
        New lists.

    Example:
        >>> filled_up([[], [0, 1, 2, 3], [4]], least=1)
        [[3], [0, 1, 2], [4]]
    """
    parts = [list(part) for part in parts]
    for part in parts:
        while len(part) < least:
            part.append(max(parts, key=len).pop())
    return parts


def seed_of(generator: torch.Generator) -> int:
    """A seed for numpy's random numbers, drawn from torch's."""
    return int(torch.randint(2**62, (1,), generator=generator))


def as_indices(parts: list[list[int]]) -> list[Tensor]:
    """The parts as tensors of int64."""
    return [torch.tensor(part, dtype=torch.int64) for part in parts]
