"""Sizes that a model takes from the data where the user gives none."""

from __future__ import annotations

from lightrail.errors import ConfigurationError
from lightrail.options import at_least

__all__ = ["divisible", "known"]


def known(**sizes: int | None) -> list[int]:
    """The sizes, each given and at least 1.

    Raises:
        ConfigurationError: One is ``None`` still, or below 1.

    Example:
        >>> known(in_channels=1, image_size=8)
        [1, 8]
    """
    found = []
    for name, size in sizes.items():
        if size is None:
            raise ConfigurationError(
                f"the model does not know its {name}",
                found=f"{name}=None",
                allowed=f"a number, or data that tells: a method dimensions() whose answer has '{name}'",
                remedy=f"Set model.{name}.",
            )
        at_least(1, **{name: size})
        found.append(size)
    return found


def divisible(divisor: int, why: str, **sizes: int) -> None:
    """Each size is a multiple of ``divisor``.

    Args:
        divisor: At least 1.
        why: What the divisor is, for the error.
        sizes: Options by name.

    Raises:
        ConfigurationError: One is not.

    Example:
        >>> divisible(4, "the heads", width=64)
    """
    for name, size in sizes.items():
        if size % divisor:
            below = size // divisor * divisor
            raise ConfigurationError(
                f"{name} does not fit {why}",
                found=f"{name}={size}",
                allowed=f"a multiple of {divisor} ({why})",
                remedy=f"Set model.{name}={below or divisor}, or change {why}.",
            )
