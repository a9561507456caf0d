"""Checks of options, in one wording, for constructors of plugins.

Each takes options by keyword, so that the error names the option by the word that the user typed.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from lightrail.errors import ConfigurationError, closest

__all__ = ["at_least", "between", "non_negative", "one_of", "positive"]


def _refuse(name: str, value: object, allowed: str) -> None:
    raise ConfigurationError(
        f"{name} is out of range", found=f"{name}={value}", allowed=allowed, remedy=f"Set {name} within that range."
    )


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        if hasattr(value, "item"):  # a 0-d tensor, as torch's optimizers take for a learning rate
            return float(value)  # type: ignore[arg-type]
        raise ConfigurationError(
            f"{name} is not a number",
            found=f"{name}={value!r} ({type(value).__name__})",
            allowed="a number",
            remedy=f"Write {name} as a number, without quotes.",
        )
    return float(value)


def positive(**options: float) -> None:
    """Each is finite and greater than 0.

    Example:
        >>> positive(lr=0.1)
    """
    for name, value in options.items():
        if not 0 < _number(name, value) < math.inf:
            _refuse(name, value, "a finite number greater than 0")


def non_negative(**options: float) -> None:
    """Each is finite and at least 0."""
    for name, value in options.items():
        if not 0 <= _number(name, value) < math.inf:
            _refuse(name, value, "a finite number of at least 0")


def at_least(low: int, **options: int) -> None:
    """Each is a whole number of at least ``low``."""
    for name, value in options.items():
        if _number(name, value) != int(value) or value < low:
            _refuse(name, value, f"a whole number of at least {low}")


def between(low: float, high: float, *, closed: str = "left", **options: float) -> None:
    """Each lies between ``low`` and ``high``; ``closed`` is ``left``, ``right``, ``both`` or ``neither``."""
    for name, value in options.items():
        number = _number(name, value)
        above = number >= low if closed in ("left", "both") else number > low
        below = number <= high if closed in ("right", "both") else number < high
        if not (above and below):
            opening, closing = "[" if closed in ("left", "both") else "(", "]" if closed in ("right", "both") else ")"
            _refuse(name, value, f"a number in {opening}{low}, {high}{closing}")


def one_of(allowed: Collection[str], **options: str) -> None:
    """Each is one of the words in ``allowed``."""
    for name, value in options.items():
        if value not in allowed:
            raise ConfigurationError(
                f"{name} has no choice '{value}'",
                found=f"{name}={value}",
                allowed=", ".join(sorted(allowed)),
                remedy=f"{closest(str(value), allowed)}Choose one of the allowed words.",
            )
