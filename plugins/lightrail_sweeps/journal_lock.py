"""A lock around a journal that several machines write, which the death of its holder does not leave behind."""

from __future__ import annotations

import fcntl
import itertools
import os
import socket
import time
from pathlib import Path
from typing import IO

__all__ = ["JournalLock"]

_COUNT = itertools.count()


class JournalLock:
    """Optuna's interface of a lock, in two layers.

    Between machines the lock is a symbolic link, which file systems make atomically even where they have no locks of
    their own; it names its holder. Within a machine it is the kernel's lock, which ends with its holder: whoever has
    that one and finds a link of this machine's knows that its holder was killed, and need not wait.

    Args:
        journal: The file that is written under the lock.
        patience: Seconds after which the link of another machine, unchanged all the while, counts as left behind.

    Example:
        >>> import tempfile
        >>> lock = JournalLock(Path(tempfile.mkdtemp()) / "journal")
        >>> lock.acquire(), lock.release()
        (True, None)
    """

    def __init__(self, journal: Path, patience: float = 10.0) -> None:
        self._journal = journal
        self._link = journal.with_name(f"{journal.name}.link")
        self._near = journal.with_name(f"{journal.name}.lock")
        self._patience = patience
        self._host = f"{socket.gethostname()}:"
        self._held: IO[str] | None = None
        self._name = ""

    def acquire(self) -> bool:
        """Waits until nobody else writes, and cuts off a line over which somebody was killed."""
        self._held = open(self._near, "a")  # noqa: SIM115  held until it is released
        is_alone_here = _locked(self._held)
        self._name = f"{self._host}{os.getpid()}:{next(_COUNT)}"
        seen, since = "", time.monotonic()
        while True:
            try:
                os.symlink(self._name, self._link)
                break
            except FileExistsError:
                holder = self._holder()
            if holder != seen:
                seen, since = holder, time.monotonic()
            is_ours = is_alone_here and holder.startswith(self._host)
            if holder and (is_ours or time.monotonic() - since > self._patience):
                self._link.unlink(missing_ok=True)
            else:
                time.sleep(0.005)
        self._cut_torn_line()
        return True

    def release(self) -> None:
        """Lets the next one write."""
        if self._holder() == self._name:
            self._link.unlink(missing_ok=True)
        if self._held is not None:
            self._held.close()

    def _holder(self) -> str:
        try:
            return os.readlink(self._link)
        except OSError:
            return ""

    def _cut_torn_line(self) -> None:
        if not self._journal.exists():
            return
        with open(self._journal, "rb+") as journal:
            end = journal.seek(0, os.SEEK_END)
            if not end:
                return
            journal.seek(end - 1)
            if journal.read(1) != b"\n":
                journal.seek(0)
                journal.truncate(journal.read().rfind(b"\n") + 1)


def _locked(file: IO[str]) -> bool:
    """Takes the kernel's lock; false where the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True
