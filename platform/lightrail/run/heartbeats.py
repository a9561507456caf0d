"""What each rank of a run says of itself, once a second, from a thread: a step is not touched by it."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightrail.launch.liveness import birth_of, is_alive

__all__ = ["Beat", "Heartbeats"]

_LIBRARIES = (f"{os.sep}torch{os.sep}", f"{os.sep}lightning{os.sep}", "threading.py", __file__)


@dataclass(frozen=True)
class Beat:
    """One word of one rank.

    Args:
        number: Counts up with each.
        host: The machine's name.
        space: The process numbers that it counts in: a container has its own.
        process: Its number there.
        born: When that process began.
        step: Optimizer steps so far.
        place: The line at which its main thread stands, that of a library left out.
        waits: Whether it stands in a library, as one does that waits for other ranks.
        ended: Why it has ended; empty for a good end, ``None`` while it goes on.
    """

    number: int
    host: str
    space: str
    process: int
    born: Any
    step: int = 0
    place: str = ""
    waits: bool = False
    ended: str | None = None

    @classmethod
    def of_this_process(cls, number: int, step: int = 0, ended: str | None = None) -> Beat:
        """What this process can say of itself."""
        place, waits = _where_main_thread_is()
        return cls(
            number, socket.gethostname(), _space(), os.getpid(), birth_of(os.getpid()), step, place, waits, ended
        )

    @classmethod
    def read(cls, text: bytes) -> Beat:
        """The inverse of :meth:`text`."""
        return cls(**json.loads(text))

    def text(self) -> str:
        """As it is sent."""
        return json.dumps(asdict(self))

    @property
    def is_near(self) -> bool:
        """Whether it is of this machine, whose processes can be asked for directly."""
        return self.host == socket.gethostname() and self.space == _space()

    @property
    def is_dead(self) -> bool:
        """Whether its process is known to be gone."""
        return self.is_near and not is_alive(self.process, self.born)


def _space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _where_main_thread_is() -> tuple[str, bool]:
    innermost = frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and frame.f_back is not None and _is_library(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None or innermost is None:
        return "", False
    waits = _is_library(innermost.f_code.co_filename) or innermost.f_code.co_name == "_agreed"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}", waits


def _is_library(path: str) -> bool:
    return any(part in path for part in _LIBRARIES) or path.startswith("<")


class Heartbeats:
    """Says where this rank is and hears where the others are, through a store that all of them reach.

    Args:
        connect: Opens a connection of its own to the store, so that nothing else waits behind it.
        rank: The number of this rank.
        count: How many there are.
        step: Optimizer steps so far.
    """

    def __init__(self, connect: Callable[[], Any], rank: int, count: int, step: Callable[[], int]) -> None:
        self.rank, self.count = rank, count
        self.interval = max(1.0, count / 50)
        self.heard: dict[int, tuple[Beat, float]] = {}
        self.answered = time.monotonic()  # when the store last did
        self.is_store_gone = False
        self._connect, self._step = connect, step
        self._number = 0
        self._closing = threading.Event()
        self._keys = [f"beat/{each}" for each in range(count)]
        self._store: Any = None
        self._thread = threading.Thread(target=self._exchange, name="heartbeats", daemon=True)

    def begin(self) -> None:
        """Says the first word; from then on the others can expect it."""
        self._store = self._connect()
        self._say(None)

    def start(self) -> None:
        """Goes on by itself, once every rank has begun."""
        self._thread.start()

    def close(self, ended: str) -> None:
        """Says the last word.

        Args:
            ended: Why this rank ends; empty for a good end.
        """
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(2 * self.interval)
        if not self._thread.is_alive() and not self.is_store_gone and self._store is not None:
            self._guarded(lambda: self._say(ended))

    def linger(self, patience: float) -> None:
        """Waits until every other rank has ended too; the one with the store would take it away from them.

        Args:
            patience: How long at most, in seconds.
        """
        end = time.monotonic() + patience
        while time.monotonic() < end and not self.is_store_gone and not self._thread.is_alive():
            self._guarded(self._hear)
            others = [beat for rank, (beat, _) in self.heard.items() if rank != self.rank]
            if all(beat.ended is not None or beat.is_dead for beat in others):
                return
            time.sleep(0.1)

    def _exchange(self) -> None:
        while not self._closing.wait(self.interval) and not self.is_store_gone:
            self._guarded(lambda: self._say(None))
            self._guarded(self._hear)

    def _guarded(self, ask: Callable[[], None]) -> None:
        try:
            ask()
        except RuntimeError:
            self.is_store_gone = True

    def _say(self, ended: str | None) -> None:
        self._number += 1
        beat = Beat.of_this_process(self._number, self._step(), ended)
        self._store.set(self._keys[self.rank], beat.text())

    def _hear(self) -> None:
        texts = self._store.multi_get(self._keys)
        now = time.monotonic()
        for rank, text in enumerate(texts):
            beat = Beat.read(text)
            known = self.heard.get(rank)
            if known is None or known[0].number != beat.number:
                self.heard[rank] = (beat, now)
        self.answered = now
