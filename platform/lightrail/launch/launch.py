"""The contract of the kind `launch`: where a run is carried out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from lightrail.launch.job import Job, JobState
from lightrail.launch.order import Order
from lightrail.options import at_least

__all__ = ["Launch"]


class Launch(ABC):
    """Starts orders somewhere, and knows how they fare.

    ``train launch=NAME`` writes an :class:`~lightrail.launch.Order` into a new run folder and hands it over;
    ``train -m launch=NAME`` hands over many, at most ``parallel`` at a time. What is started has to carry out
    ``order.command`` in ``order.directory`` (a supervisor around the run: it restarts what died without a word and
    hands signals on), or ``order.rank_command`` once a process where several make one run. Carrying an order out again
    goes on from its last checkpoint, so that whatever is requeued or restarted just starts the same command again.

    Args:
        parallel: Jobs of a sweep at a time, at least 1; ``None`` for as many as there are.
        restarts: How often a job that died without making progress is started again, at least 0; a death after
            progress does not count.
    """

    in_this_process: ClassVar[bool] = False
    """Whether `train` carries a single run out itself, without an order."""

    def __init__(self, *, parallel: int | None = None, restarts: int = 2) -> None:
        if parallel is not None:
            at_least(1, parallel=parallel)
        at_least(0, restarts=restarts)
        self.parallel = parallel
        self.restarts = restarts
        self.name = ""
        self.options: dict[str, Any] = {}

    def job(self, order: Order, number: str, **known: Any) -> Job:
        """The record of an order that this launch has started.

        Args:
            order: What it carries out.
            number: By which it is known there.
            known: What else it takes to find it again.
        """
        return Job(order.folder, self.name, number, self.options, known=known)

    def check(self, trainer: dict[str, object]) -> None:  # noqa: B027  most launches refuse nothing
        """Refuses what cannot be started, before anything is written.

        Args:
            trainer: The ``trainer`` group of the configuration that is to be carried out.

        Raises:
            UserError: Machines, an extra or a service that are not there; options that contradict the trainer's.
        """

    @abstractmethod
    def start(self, order: Order) -> Job:
        """Starts an order, or puts it into a queue, and returns at once.

        Args:
            order: What to carry out.

        Returns:
            How to find it again, from :meth:`job`; the caller keeps it in the run folder.

        Raises:
            UserError: It was refused.
        """

    @abstractmethod
    def state(self, job: Job) -> JobState:
        """How a job fares, asked of whoever carries it out; the job's own outcome, where there is one, is known."""

    @abstractmethod
    def cancel(self, job: Job) -> None:
        """Asks a job to stop: it saves at the next batch boundary where it can. One that is over is left alone."""

    def carry_out(self, order: Order) -> int:
        """What `train` does with a single run: start it, say how to follow it, and return.

        Args:
            order: What to carry out.

        Returns:
            The exit status of the command.
        """
        job = self.start(order).keep()
        print(f"{job.launch} job {job.number} · {order.folder}")
        print(f"  lightrail jobs {job.number} --follow\n  lightrail jobs {job.number} --cancel")
        return 0
