"""The space of a sweep, out of a command line in Hydra's own grammar."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from lightrail.configuration.command_line import Token
from lightrail.errors import ConfigurationError
from lightrail.sweep.method import Choices, Dimension, Interval

__all__ = ["space_of"]

# What carries a sweep out is one for all of its trials.
_ONE_FOR_ALL = ("sweep", "launch")
_ALLOWED = "a,b,c · choice(a,b) · range(start,stop,step) · glob(pattern) · interval(low,high) · int(interval(low,high))"


def space_of(
    overrides: Sequence[str], config_dirs: Sequence[str | os.PathLike[str]] = ()
) -> tuple[dict[str, Dimension], list[str]]:
    """What a command line leaves open, and what it says.

    ``interval(low,high)`` is an interval, ``int(interval(low,high))`` one of whole numbers, and ``tag(log, …)`` around
    either spreads logarithms evenly; everything that a sweep over a grid accepts is a choice.

    Args:
        overrides: As typed.
        config_dirs: The user's own folders of configurations.

    Returns:
        The dimensions by key, as it was typed with its operator, and the overrides that hold for every trial.

    Raises:
        ConfigurationError: Nothing varies, or a dimension cannot be searched.

    Example:
        >>> space_of(["optimizer.lr=tag(log, interval(1e-4,1e-1))", "+seed=1,2", "run.root=out"])[0]
        {'optimizer.lr': Interval(low=0.0001, high=0.1, log=True, whole=False), '+seed': Choices(values=('1', '2'))}
    """
    from lightrail.configuration.composing import parse
    from lightrail.configuration.sweeps import GroupOptions

    space: dict[str, Dimension] = {}
    fixed: dict[str, str] = {}
    for text, override in zip(overrides, parse(overrides, GroupOptions(config_dirs)), strict=True):
        token = Token.parse(text)
        key = f"{token.operator}{token.key}"
        # Of a key that is given twice the last word counts.
        for former in [each for each in space if each.lstrip("+") == token.key]:
            del space[former]
        fixed.pop(token.key, None)
        if override.is_sweep_override():
            space[key] = _dimension(token, text, override)
        else:
            fixed[token.key] = text
    if not space:
        raise ConfigurationError(
            "the sweep has nothing to vary",
            found=" ".join(overrides) or "no overrides",
            allowed=_ALLOWED,
            remedy="Give a key several values, such as 'optimizer.lr=tag(log, interval(1e-4,1e-1))'.",
        )
    return space, list(fixed.values())


def _dimension(token: Token, text: str, override: Any) -> Dimension:
    if token.key.partition(".")[0] in _ONE_FOR_ALL:
        raise ConfigurationError(
            f"'{token.key}' cannot vary within a sweep",
            found=text,
            allowed="keys of the runs themselves; launch and sweep are one for all of them",
            remedy=f"Give {token.key} one value, or start a sweep for each.",
        )
    found = override.value()
    is_interval = override.is_interval_sweep()
    unknown = sorted(set(getattr(found, "tags", ())) - ({"log"} if is_interval else set()))
    if unknown:
        raise ConfigurationError(
            f"'{token.key}' has a tag that says nothing here",
            found=text,
            allowed="tag(log, interval(low,high)); choices have no tags",
            remedy=f"Leave the tag '{unknown[0]}' out.",
        )
    if not is_interval:
        return Choices(tuple(dict.fromkeys(map(str, override.sweep_string_iterator()))))
    return _interval(token, text, found.start, found.end, "log" in found.tags)


def _interval(token: Token, text: str, low: Any, high: Any, log: bool) -> Interval:
    is_number = all(isinstance(each, int | float) and math.isfinite(each) for each in (low, high))
    if not is_number or low >= high:
        raise ConfigurationError(
            f"'{token.key}' has no numbers between its ends",
            found=text,
            allowed="interval(low,high) with finite numbers, low below high",
            remedy="Swap the ends." if is_number and low > high else "Set two finite ends, the lower one first.",
        )
    if log and low <= 0:
        raise ConfigurationError(
            f"'{token.key}' is spread by its logarithm, and {low:g} has none",
            found=text,
            allowed="tag(log, interval(low,high)) with low above 0",
            remedy=f"Begin a little above 0, such as interval({abs(high) / 1e4:g},{high:g})."
            if high > 0
            else "Leave tag(log, …) out.",
        )
    return Interval(low, high, log, whole=isinstance(low, int) and isinstance(high, int))
