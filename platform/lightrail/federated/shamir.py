"""Secrets that t of n together can tell, and fewer cannot."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence

from lightrail.errors import UserError

__all__ = ["PRIME", "SHARE_BYTES", "TooFewClients", "joined_secret", "require_enough", "shared_secret"]

PRIME = 2**256 + 297
"""The least prime above all secrets of 32 bytes."""
SHARE_BYTES = 33


class TooFewClients(UserError):
    """Fewer clients are left than it takes to unmask a sum."""


def shared_secret(secret: bytes, points: Sequence[int], threshold: int) -> dict[int, int]:
    r"""Shares of a secret: values of a random polynomial that is the secret at 0.

    .. math:: f(x) = s + a_1 x + \dots + a_{t-1} x^{t-1} \pmod p, \qquad a_j \text{ uniform}

    Args:
        secret: s, 32 bytes.
        points: x of each share, different and not 0 mod p.
        threshold: t: how many shares tell the secret, from 1 to the number of points.

    Returns:
        f(x) by x, each in [0, p).

    Example:
        >>> shares = shared_secret(bytes(range(32)), [1, 2, 3], threshold=2)
        >>> joined_secret({1: shares[1], 3: shares[3]}) == bytes(range(32))
        True

    Reference:
        A. Shamir (1979), How to Share a Secret, Communications of the ACM 22(11).
    """
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return {x: _value(coefficients, x) for x in points}


def joined_secret(shares: Mapping[int, int]) -> bytes:
    r"""The secret of at least t shares.

    .. math:: s = \sum_i f(x_i) \prod_{j \ne i} \frac{x_j}{x_j - x_i} \pmod p

    Args:
        shares: f(x) by x, at least t of them.

    Returns:
        32 bytes.

    Raises:
        ValueError: The shares do not belong to one secret of 32 bytes. Not every lie can be told.

    Example:
        >>> joined_secret({1: 5, 2: 3})[-1]
        7
    """
    secret = 0
    for i, share in shares.items():
        numerator = denominator = 1
        for j in shares:
            if j != i:
                numerator = numerator * j % PRIME
                denominator = denominator * (j - i) % PRIME
        secret += share * numerator * pow(denominator, -1, PRIME)
    secret %= PRIME
    if secret >= 1 << 256:
        raise ValueError("the shares do not belong to one secret")
    return secret.to_bytes(32, "big")


def require_enough(clients: Iterable[int], threshold: int, did: str) -> None:
    """Refuses to go on with fewer clients than it takes to unmask a sum.

    Args:
        clients: Those who are left.
        threshold: t.
        did: What they have in common, for the error.

    Raises:
        TooFewClients: There are fewer than t.
    """
    found = len(set(clients))
    if found < threshold:
        raise TooFewClients(
            "too few clients are left to unmask a sum",
            found=f"{found} that {did}",
            allowed=f"at least threshold={threshold}",
            remedy="Lower the threshold, take more clients a round, or repeat the round.",
        )


def _value(coefficients: Sequence[int], x: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % PRIME
    return value
