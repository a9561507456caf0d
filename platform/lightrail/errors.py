"""Every error that a user can cause, in one tree.

LightrailError
├── UserError                what, found, allowed, remedy; exit code 2, no traceback
│   ├── PluginError          unknown, broken, duplicate, or a missing extra
│   ├── ConfigurationError   unknown key, wrong type, value out of range (also a ValueError)
│   ├── CompositionError     plugins that cannot work together
│   ├── DataError            a data file that is missing, empty or malformed
│   ├── CheckpointError      unreadable, truncated, foreign, or made by other plugins
│   ├── RunFolderError       a run folder that cannot be written
│   ├── NonFiniteLoss        the loss became NaN or infinite
│   ├── LostRank             another rank of the run is gone or stands still; exit code 69
│   └── ClosureError         a method asked its closure for something that it cannot give
└── Interrupted              a signal asked the run to stop; its state is saved
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "LOST_RANK",
    "CheckpointError",
    "ClosureError",
    "CompositionError",
    "ConfigurationError",
    "DataError",
    "Interrupted",
    "LightrailError",
    "LostRank",
    "NonFiniteLoss",
    "PluginError",
    "RunFolderError",
    "UserError",
    "closest",
]


LOST_RANK = 69  # the exit status of a rank that ends because another one is lost: the run can be started again


class LightrailError(Exception):
    """The root of everything that lightrail raises on purpose."""


class UserError(LightrailError):
    """A mistake that the user can mend, told in four parts.

    Args:
        what: One sentence: what is wrong, naming the thing by the word that the user typed.
        found: What was found there.
        allowed: What would have been accepted.
        remedy: What to do now.

    Example:
        >>> print(UserError("optimizer 'sofia' is not installed", found="sofia",
        ...                 allowed="adamw, sophia", remedy="Did you mean 'sophia'?"))
        optimizer 'sofia' is not installed
          found:   sofia
          allowed: adamw, sophia
          remedy:  Did you mean 'sophia'?
    """

    def __init__(self, what: str, *, found: object, allowed: object, remedy: str) -> None:
        self.what = what
        self.found = str(found)
        self.allowed = str(allowed)
        self.remedy = remedy
        super().__init__(what)

    def __str__(self) -> str:
        parts = (("found", self.found), ("allowed", self.allowed), ("remedy", self.remedy))
        lines = [f"  {name + ':':<8} {text.replace(chr(10), chr(10) + ' ' * 11)}" for name, text in parts]
        return "\n".join([self.what, *lines])

    def __reduce__(self) -> tuple[object, ...]:
        # An exception that crosses a process boundary is rebuilt from its arguments; these are keyword-only.
        return (_rebuild, (type(self), self.what, self.found, self.allowed, self.remedy))


def _rebuild(cls: type[UserError], what: str, found: str, allowed: str, remedy: str) -> UserError:
    return cls(what, found=found, allowed=allowed, remedy=remedy)


class PluginError(UserError):
    """A plugin that is unknown, broken, claimed by two distributions, or lacks an extra."""


class ConfigurationError(UserError, ValueError):
    """An unknown key, a value of the wrong type, or one out of its range."""


class CompositionError(UserError):
    """Plugins that cannot work together, found before any data is loaded."""


class DataError(UserError):
    """A data file that is missing, empty or malformed."""


class CheckpointError(UserError):
    """A checkpoint that is unreadable, truncated, foreign, or was made by other plugins."""


class RunFolderError(UserError):
    """A run folder that cannot be made or written."""


class NonFiniteLoss(UserError):
    """The loss became NaN or infinite."""


class LostRank(UserError):
    """Another rank of the run is gone, or has not moved for longer than ``run.rank_timeout``."""


class ClosureError(UserError):
    """A method asked its closure for something that this task or loop cannot give."""


class Interrupted(LightrailError):
    """A signal asked the run to stop; it did so at a batch boundary, with its state saved."""

    def __init__(self, signal_number: int, step: int, folder: str) -> None:
        self.signal_number = signal_number
        self.step = step
        self.folder = folder
        super().__init__(f"stopped by signal {signal_number} after step {step}; resume with run.resume={folder}")


def closest(word: str, among: Iterable[str]) -> str:
    """A sentence that names the nearest of ``among``, with a trailing space; empty where none is near.

    Example:
        >>> closest("sofia", ["adamw", "sophia"])
        "Did you mean 'sophia'? "
    """
    near = difflib.get_close_matches(word, list(among), n=1, cutoff=0.6)
    return f"Did you mean '{near[0]}'? " if near else ""
