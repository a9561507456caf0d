"""Seeds of single trials."""

from __future__ import annotations

import hashlib

__all__ = ["seed_of_trial"]


def seed_of_trial(seed: int, number: int) -> int:
    """A seed for one trial of a sweep, so that a proposal needs no random state that a kill would lose.

    Args:
        seed: The sweep's.
        number: The trial's.

    Returns:
        A number in [0, 2³²).

    Example:
        >>> seed_of_trial(0, 1) != seed_of_trial(1, 0)
        True
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:4], "little")
