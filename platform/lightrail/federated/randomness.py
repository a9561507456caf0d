"""Seeds of a federated run: each depends on what it is for, so that no order of clients or engines changes them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightrail.step.randomness import RandomState

__all__ = ["generator_for", "seed_for", "seeded"]


def seed_for(seed: int, *purpose: str | int) -> int:
    """A seed for one purpose of a run.

    Args:
        seed: Of the run.
        purpose: Words and numbers that name it.

    Example:
        >>> seed_for(1, "client", 3) == seed_for(1, "client", 3) != seed_for(1, "client", 4)
        True
    """
    words = "/".join(map(str, (seed, *purpose))).encode()
    return int.from_bytes(hashlib.sha256(words).digest()[:8], "little") >> 1


def generator_for(seed: int, *purpose: str | int) -> torch.Generator:
    """A generator of its own for one purpose of a run."""
    return torch.Generator().manual_seed(seed_for(seed, *purpose))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """All generators seeded inside, and as they were outside."""
    with RandomState.kept():
        RandomState.seed(seed)
        yield
