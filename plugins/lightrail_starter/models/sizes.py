"""Sizes that a model takes from the data where the user gives none."""

from __future__ import annotations

from lightrail.errors import ConfigurationError
from lightrail.options import at_least

__all__ = ["known"]


def known(**sizes: int | None) -> list[int]:
    """The sizes, each given and at least 1.

    Raises:
        ConfigurationError: One is ``None`` still, or below 1.

    Example:
        >>> known(in_features=64, out_features=10)
        [64, 10]
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
