"""Signals: the first one asks for a stop at the next batch boundary, a second SIGINT stops at once.

SIGTERM, SIGUSR1 and SIGUSR2 are those by which clusters warn of a time limit or of preemption.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightrail.errors import UserError

__all__ = ["Interruption", "StoppedAtOnce"]


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StoppedAtOnce(UserError):
    """A second SIGINT arrived before the run could save."""


class Interruption:
    """Remembers that a signal arrived; saving is left to the batch boundary, where it is safe.

    A checkpoint that is written inside a signal handler can hang or tear, so the handlers only set a flag.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.last_checkpoint: str = "no checkpoint yet"
        self._on_child: Any = None

    @contextmanager
    def listening(self) -> Iterator[Interruption]:
        """The signals are ours inside; the former handlers come back on the way out."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        former = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        try:
            yield self
        finally:
            if self._on_child is not None:
                former[signal.SIGCHLD] = self._on_child
            for number, handler in former.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _frame: Any) -> None:
        if number == signal.SIGINT and self.signal_number == signal.SIGINT:
            raise StoppedAtOnce(
                "the run was stopped at once, by a second SIGINT, before it could save",
                found=f"two SIGINT; the last good checkpoint is {self.last_checkpoint}",
                allowed="one SIGINT: the run then saves at the next batch boundary and stops",
                remedy="Resume from the last good checkpoint with run.resume=latest.",
            )
        self.signal_number = number
        if self._on_child is None:
            # A cluster signals every process of a job, which ends the workers of data loaders. torch would make that
            # an error of the run, which no longer needs them.
            self._on_child = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return  # a terminal signals every rank; one says so
        print(
            f"\n{signal.Signals(number).name}: saving at the next batch boundary; once more to stop at once, unsaved",
            file=sys.stderr,
            flush=True,
        )
