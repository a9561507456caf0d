"""A rank that is gone, or stands still: the others say which, where and at what step, and end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lightrail.errors import LOST_RANK, Interrupted, LostRank, UserError
from lightrail.files import replace_file
from lightrail.run.heartbeats import Beat, Heartbeats

__all__ = ["Watch"]

# How long a rank may take to end by itself once another is known to be lost, in seconds.
_PATIENCE = 10.0


class Watch:
    """Watches over the other ranks of a run.

    Args:
        heartbeats: What they say.
        timeout: How long a rank may be silent or stand still, in seconds.
        keeper: The rank that keeps the store; ``None`` where none of them does.
        advice: What the run can be resumed with, and its last checkpoint.
        error_file: Where an error is left for whoever started the run, if that is wanted.
    """

    def __init__(
        self,
        heartbeats: Heartbeats,
        timeout: float,
        keeper: int | None,
        advice: Callable[[], tuple[str, str]],
        error_file: Path | None = None,
    ) -> None:
        self._heartbeats = heartbeats
        self._timeout = timeout
        self._keeper = keeper
        self._advice = advice
        self._error_file = error_file
        self._closed = threading.Event()
        self._stands: tuple[Any, float] = (None, time.monotonic())
        self._thread = threading.Thread(target=self._watch, name="watch-over-ranks", daemon=True)

    def start(self) -> None:
        """Begins, in a thread."""
        self._thread.start()

    def leave_together(self) -> None:
        """Waits for the others at the end of what the ranks do together."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        self._close("")

    def leave(self, error: BaseException) -> LostRank | None:
        """Ends the watch because of an error.

        Returns:
            Which rank was lost, where that is what the error means.
        """
        lost = self._explained(error)
        self._close("" if isinstance(error, Interrupted) else _first_line(lost or error))
        if lost is not None:
            self._end_stopped()
        return lost

    def _close(self, ended: str) -> None:
        self._closed.set()
        self._heartbeats.close(ended)
        if self._keeper == self._heartbeats.rank:
            self._heartbeats.linger(3.0)

    def _explained(self, error: BaseException) -> LostRank | None:
        """The error of a collective operation says what broke; the other ranks, who did not come."""
        if not is_of_communication(error):
            return None
        end = time.monotonic() + 3 * self._heartbeats.interval
        while not (lost := self._lost()) and time.monotonic() < end:
            time.sleep(0.1)
        return self._error(lost or self._behind(), error)

    def _watch(self) -> None:
        known_since = None
        while not self._closed.wait(0.5):
            lost = self._lost() or self._standing_still()
            if not lost:
                known_since = None
                continue
            known_since = known_since or time.monotonic()
            if time.monotonic() - known_since > _PATIENCE:
                self._end(self._error(lost))

    def _lost(self) -> dict[int, str]:
        """Who is known to be gone or silent, and why."""
        beats, now = self._heartbeats, time.monotonic()
        lost: dict[int, str] = {}
        for rank, (beat, heard) in sorted(dict(beats.heard).items()):
            if rank == beats.rank:
                continue
            if beat.ended:
                lost[rank] = f"ended: {beat.ended}"
            elif beat.ended is None and beat.is_dead:
                lost[rank] = "its process is gone"
            elif beat.ended is None and now - heard > self._timeout and not beats.is_store_gone:
                lost[rank] = f"silent for {now - heard:.0f} s"
        if not lost and self._keeper not in (None, beats.rank):
            if beats.is_store_gone:
                lost[self._keeper or 0] = "its connection is closed"
            elif now - beats.answered > self._timeout:
                lost[self._keeper or 0] = f"silent for {now - beats.answered:.0f} s"
        elif not lost and beats.is_store_gone:
            return dict.fromkeys(self._others(), "what started the ranks is gone")
        return lost

    def _standing_still(self) -> dict[int, str]:
        """Nobody is silent, and nobody gets on: who holds the others up."""
        stands = [(beat.step, beat.place) for beat, _ in dict(self._heartbeats.heard).values()]
        if stands != self._stands[0]:
            self._stands = (stands, time.monotonic())
        return self._behind() if time.monotonic() - self._stands[1] > self._timeout else {}

    def _behind(self) -> dict[int, str]:
        """Those that hold the others up: the furthest back, and among these who waits for nobody."""
        heard = {rank: beat for rank, (beat, _) in dict(self._heartbeats.heard).items() if rank in self._others()}
        if not heard:
            return dict.fromkeys(self._others(), "nothing was heard of it")
        least = min(beat.step for beat in heard.values())
        back = {rank: beat for rank, beat in heard.items() if beat.step == least}
        busy = {rank: beat for rank, beat in back.items() if not beat.waits} or back
        return dict.fromkeys(busy, "it stands still")

    def _others(self) -> Sequence[int]:
        return [rank for rank in range(self._heartbeats.count) if rank != self._heartbeats.rank]

    def _error(self, lost: dict[int, str], cause: BaseException | None = None) -> LostRank:
        checkpoint, resume = self._advice()
        known = {rank: beat for rank, (beat, _) in dict(self._heartbeats.heard).items()}
        found = [_described(rank, reason, known.get(rank)) for rank, reason in lost.items()]
        if cause is not None:
            found.append(f"said by the operation that broke off: {_first_line(cause)}")
        found.append(f"the last good checkpoint is {checkpoint}")
        names = ", ".join(map(str, lost))
        return LostRank(
            f"rank {names} is lost" if len(lost) == 1 else f"ranks {names} are lost",
            found="\n".join(found),
            allowed=f"{self._heartbeats.count} ranks that all take part in each step, "
            f"none silent for more than run.rank_timeout={self._timeout:g} s",
            remedy=f"Look at what that rank printed (out of memory?), and go on with run.resume={resume}; "
            "raise run.rank_timeout where a step may take longer.",
        )

    def _end(self, error: LostRank) -> None:
        """The main thread stands in an operation that will never end, and cannot be woken."""
        if self._closed.is_set():
            return
        print(f"\n{error}", file=sys.stderr, flush=True)
        leave_error(self._error_file, error)
        self._end_stopped()
        os._exit(LOST_RANK)

    def _end_stopped(self) -> None:
        """A process of this machine that was stopped would otherwise stay for ever."""
        for rank in self._lost():
            beat = self._heartbeats.heard[rank][0] if rank in self._heartbeats.heard else None
            if beat is not None and beat.ended is None and beat.is_near and not beat.is_dead:
                with contextlib.suppress(OSError):
                    os.kill(beat.process, signal.SIGKILL)


def leave_error(place: Path | None, error: BaseException) -> None:
    """Leaves an error for whoever started the run, unless the rank that caused it has done so.

    Args:
        place: The file; ``None`` where nobody asked for one.
        error: The error.
    """
    if place is not None and not place.exists():
        with contextlib.suppress(UserError):
            replace_file(place, str(error).encode())


def _described(rank: int, reason: str, beat: Beat | None) -> str:
    if beat is None:
        return f"rank {rank}: {reason}"
    stood = f", at {beat.place}" if beat.place else ""
    return f"rank {rank} (process {beat.process} on {beat.host}): {reason}; last seen at step {beat.step}{stood}"


def _first_line(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return line if isinstance(error, UserError) else f"{type(error).__name__}: {line}"


def is_of_communication(error: BaseException) -> bool:
    """Whether an operation broke off that ranks carry out together."""
    if not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
