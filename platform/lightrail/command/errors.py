"""How a command ends: a user's mistake is told in four parts, without a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lightrail.errors import UserError

__all__ = ["Outcome", "reporting_errors"]


@dataclass
class Outcome:
    """How a command ended.

    Args:
        status: Its exit status; 2 for a mistake that the user can mend.
    """

    status: int = 0


@contextmanager
def reporting_errors() -> Iterator[Outcome]:
    """Prints a :class:`UserError` to standard error and sets the status to 2.

    With ``LIGHTRAIL_TRACEBACK=1`` the error passes through, traceback and all.

    Example:
        >>> with reporting_errors() as outcome:
        ...     outcome.status = 0
        >>> outcome.status
        0
    """
    outcome = Outcome()
    try:
        yield outcome
        sys.stdout.flush()  # here, where a reader that is gone can be told from an error
    except UserError as error:
        if os.environ.get("LIGHTRAIL_TRACEBACK") == "1":
            raise
        sys.stdout.flush()
        print(error, file=sys.stderr)
        outcome.status = 2
    except KeyboardInterrupt:
        # A run catches the signal itself, to save first; this is a command that had nothing to save yet.
        print("interrupted", file=sys.stderr)
        outcome.status = 130
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; Python would complain once more when it closes the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
