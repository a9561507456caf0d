"""Carrying a sweep out: trials are started while there is room, waited for, and found again by whoever comes after."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from lightrail.errors import UserError
from lightrail.launch.job import Job, JobState, clear_outcome, outcome_of, write_outcome
from lightrail.launch.launch import Launch
from lightrail.launch.node import is_held
from lightrail.launch.order import read_order
from lightrail.sweep.ledger import Ledger, Trial
from lightrail.sweep.method import SweepMethod

__all__ = ["Controller", "Watcher"]

TICK = 0.05  # seconds between looks at the outcomes that jobs write
ASKED_HERE, ASKED_ELSEWHERE = 0.5, 10.0  # seconds between questions to the launch: a queue is not to be pestered
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Watcher(Protocol):
    """Who is told how a sweep goes on."""

    def over(self, trial: Trial, state: JobState) -> None:
        """A trial has ended."""

    def standing(self, over: int, running: int, planned: int) -> None:
        """How many there are; called often."""

    def said(self, sentence: str) -> None:
        """Something else that a user wants to know."""


class Controller:
    """Carries a sweep out, from wherever it stands.

    Args:
        ledger: The sweep.
        launch: Who carries its trials out.
        watcher: Who is told.
        method: What proposes trials; ``None`` where all are written.
        propose: Writes the next trial that the method proposes.
        retry: Whether trials that failed are started again.
    """

    def __init__(
        self,
        ledger: Ledger,
        launch: Launch,
        watcher: Watcher,
        *,
        method: SweepMethod | None = None,
        propose: Callable[[int], Trial] | None = None,
        retry: bool = False,
    ) -> None:
        self._ledger, self._launch, self._watcher = ledger, launch, watcher
        self._method, self._propose, self._retry = method, propose, retry
        self.signal_number: int | None = None
        self._waiting: list[Trial] = []
        self._running: dict[int, tuple[Trial, Job]] = {}
        self._over = 0
        self._written = 0
        self._lost_once: set[int] = set()
        self._asked: dict[int, float] = {}
        self._cancelled: dict[int, float] = {}

    def run(self) -> int:
        """Carries the sweep out to its end; the ledger is to be held meanwhile.

        Returns:
            0 where every trial finished, 1 where one did not, 128 + N where signal N asked for a stop.

        Raises:
            KeyboardInterrupt: A second signal asked to leave at once.
        """
        with self._listening():
            self._take_stock()
            while True:
                self._settle()
                if self.signal_number is None:
                    self._fill()
                elif self._launch.in_this_process:
                    self._stop()
                else:
                    break
                self._watcher.standing(self._over, len(self._running), self._ledger.planned)
                if not self._running and (self.signal_number is not None or not self._has_more()):
                    break
                time.sleep(TICK)
        if self.signal_number is not None:
            return 128 + self.signal_number
        return int(any(not _is_finished(trial) for trial in self._ledger.trials()))

    def hand_over(self) -> int:
        """Starts every trial that waits, and waits for none; the ledger is to be held meanwhile.

        Returns:
            How many were started.
        """
        self._take_stock()
        waiting, self._waiting = self._waiting, []
        for trial in waiting:
            self._start(trial)
        return len(waiting)

    def _take_stock(self) -> None:
        trials = self._ledger.trials()
        self._written = len(trials)
        for trial in trials:
            outcome = outcome_of(trial.folder)
            if outcome is not None and not self._goes_on(outcome):
                self._end(trial, outcome, is_news=False)
                continue
            job = Job.of(trial.folder)
            if outcome is None and job is not None and not self._launch.state(job).is_over:
                self._running[trial.number] = trial, job
            else:
                self._waiting.append(trial)

    def _goes_on(self, outcome: JobState) -> bool:
        return outcome.phase == "stopped" or (self._retry and outcome.phase == "failed")

    def _has_more(self) -> bool:
        return bool(self._waiting) or (self._method is not None and self._written < self._ledger.planned)

    def _fill(self) -> None:
        """Starts trials while there is room."""
        room = self._launch.parallel or self._ledger.planned
        passed: list[Trial] = []
        while len(self._running) < room and self.signal_number is None:
            if self._waiting:
                trial = self._waiting.pop(0)
                # What ended is let go first: its supervisor holds the order for a moment more.
                if outcome_of(trial.folder) is not None and is_held(trial.folder):
                    passed.append(trial)
                else:
                    self._start(trial)
            elif self._propose is not None and self._has_more():
                self._start_proposed(self._propose(self._written))
            else:
                break
        self._waiting = passed + self._waiting

    def _start_proposed(self, trial: Trial) -> None:
        self._written += 1
        refused = outcome_of(trial.folder)
        if refused is None:
            self._start(trial)
        else:
            self._end(trial, refused)

    def _start(self, trial: Trial) -> None:
        outcome = outcome_of(trial.folder)
        if outcome is not None and not self._goes_on(outcome):
            # It was under way though nobody had noted it: who started it was killed in that moment.
            self._end(trial, outcome)
            return
        if outcome is not None:
            clear_outcome(trial.folder)
        try:
            job = self._launch.start(read_order(trial.folder)).keep()
        except UserError as error:
            state = JobState("failed", str(error))
            write_outcome(trial.folder, state)
            self._end(trial, state)
            return
        self._running[trial.number] = trial, job
        self._asked[trial.number] = time.monotonic()

    def _settle(self) -> None:
        """Looks which trials have ended."""
        for trial, job in list(self._running.values()):
            state = self._state(trial, job)
            if state is None or not state.is_over:
                continue
            del self._running[trial.number]
            if state.phase == "lost" and self.signal_number is None and trial.number not in self._lost_once:
                self._lost_once.add(trial.number)
                self._watcher.said(f"job {trial.number} was lost ({state.reason}); it goes on from its last checkpoint")
                self._waiting.insert(0, trial)
            else:
                self._end(trial, state)

    def _state(self, trial: Trial, job: Job) -> JobState | None:
        """How a trial fares; ``None`` where it has not ended and it is not time to ask."""
        outcome = outcome_of(trial.folder)
        pause = ASKED_HERE if self._launch.in_this_process else ASKED_ELSEWHERE
        if outcome is not None or time.monotonic() - self._asked.get(trial.number, 0.0) < pause:
            return outcome
        self._asked[trial.number] = time.monotonic()
        state = self._launch.state(job)
        return (outcome_of(trial.folder) or state) if state.is_over else state

    def _end(self, trial: Trial, state: JobState, *, is_news: bool = True) -> None:
        self._over += 1
        if self._method is not None and state.phase != "stopped":
            from lightrail.sweep.results import value_of

            value = value_of(trial.folder, self._method.goal) if state.phase == "finished" else None
            self._method.tell(trial.number, value)
        if is_news:
            self._watcher.over(trial, state)

    def _stop(self) -> None:
        """Asks those that still run to stop, and again after a while, as one may have begun just then."""
        if not self._cancelled:
            self._watcher.said("the jobs save at their next batch boundary and stop; once more to leave them to it")
            self._cancelled[-1] = time.monotonic()
        for trial, job in self._running.values():
            if time.monotonic() - self._cancelled.get(trial.number, float("-inf")) > ASKED_ELSEWHERE:
                self._launch.cancel(job)
                self._cancelled[trial.number] = time.monotonic()

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        former = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _frame: Any) -> None:
        if self.signal_number is not None:
            raise KeyboardInterrupt
        self.signal_number = number


def _is_finished(trial: Trial) -> bool:
    outcome = outcome_of(trial.folder)
    return outcome is not None and outcome.phase == "finished"
