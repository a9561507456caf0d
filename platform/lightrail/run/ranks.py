"""The ranks of a run: they meet, say where they are, watch over each other, and end together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from lightning.pytorch import Trainer

from lightrail.run.heartbeats import Heartbeats
from lightrail.run.lost_ranks import Watch
from lightrail.run.rendezvous import Rendezvous

__all__ = ["Ranks"]


class Ranks:
    """The ranks of a trainer that is not yet running; nothing is done for one that is alone.

    Args:
        trainer: Of the run.
        timeout: How long a rank may be silent or stand still, in seconds.
        step: Optimizer steps so far.
        advice: The last good checkpoint, and what the run can be resumed with.
        error_file: Where an error is left for whoever started the run, if that is wanted.
    """

    def __init__(
        self,
        trainer: Trainer,
        timeout: float,
        step: Callable[[], int],
        advice: Callable[[], tuple[str, str]],
        error_file: Path | None = None,
    ) -> None:
        self._timeout, self._step, self._advice, self._error_file = timeout, step, advice, error_file
        self._rendezvous = Rendezvous(trainer, timeout) if trainer.world_size > 1 else None
        self._heartbeats: Heartbeats | None = None
        self._watch: Watch | None = None

    def begin(self, name: str) -> None:
        """Says the first word; the ranks have to wait for each other before :meth:`watch`.

        Args:
            name: The run's, the same on every rank and for no other run.
        """
        rendezvous = self._rendezvous
        if rendezvous is None or self._heartbeats is not None:
            return
        self._heartbeats = Heartbeats(lambda: rendezvous.connect(name), rendezvous.rank, rendezvous.count, self._step)
        self._heartbeats.begin()

    def watch(self) -> None:
        """From here on a rank that is lost is noticed."""
        if self._rendezvous is None or self._heartbeats is None or self._watch is not None:
            return
        keeper = None if self._rendezvous.is_kept_elsewhere else 0
        self._watch = Watch(self._heartbeats, self._timeout, keeper, self._advice, self._error_file)
        self._heartbeats.start()
        self._watch.start()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Around all that the ranks do together.

        Raises:
            LostRank: One of them did not come, or was lost.
        """
        try:
            yield
            if self._watch is not None:
                self._watch.leave_together()
        except BaseException as error:
            if self._watch is not None:
                lost = self._watch.leave(error)
            else:
                lost = None if self._rendezvous is None else self._rendezvous.lost_since(error)
            if self._rendezvous is not None:
                self._rendezvous.end_children()
            if lost is None:
                raise
            raise lost from error
