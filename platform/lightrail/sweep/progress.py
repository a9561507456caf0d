"""What a terminal shows while a sweep goes on: a line for each trial that ended, and one live line of how many."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from lightrail.launch.job import JobState
from lightrail.report.wording import number
from lightrail.sweep.ledger import Trial
from lightrail.sweep.method import Goal
from lightrail.sweep.results import short_reason, value_of

__all__ = ["SweepProgress"]


class SweepProgress:
    """Tells on standard error how a sweep goes on.

    Args:
        goal: What the sweep is after.
        planned: How many trials it has.
    """

    def __init__(self, goal: Goal, planned: int) -> None:
        self._goal = goal
        self._planned = planned
        self._over = 0
        self._best: tuple[float, int] | None = None
        self._bar: Any = None
        if sys.stderr.isatty():
            form = "{n_fmt} of {total_fmt} over {bar:20} {desc}"
            self._bar = tqdm(total=planned, bar_format=form, dynamic_ncols=True, leave=False, colour="#4c78a8")

    def __enter__(self) -> SweepProgress:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def over(self, trial: Trial, state: JobState) -> None:
        """A trial has ended."""
        self._over += 1
        value = value_of(trial.folder, self._goal) if state.phase == "finished" else None
        if value is not None:
            is_better = self._best is None or (value < self._best[0]) == (self._goal.mode == "min")
            self._best = (value, trial.number) if is_better else self._best
        reason = short_reason(state.reason)
        result = f", {self._goal.metric} {number(value)}" if value is not None else f": {reason}" if reason else ""
        self.said(f"job {trial.number} {state.phase}{result} · {trial.words}")

    def standing(self, over: int, running: int, planned: int) -> None:
        """How many there are."""
        if self._bar is None:
            return
        best = "" if self._best is None else f" · best {number(self._best[0])} (job {self._best[1]})"
        self._bar.n = over
        self._bar.set_description_str(f"{running} running · {planned - over - running} waiting{best}")

    def said(self, sentence: str) -> None:
        """Something else that a user wants to know."""
        if self._bar is None:
            print(sentence, file=sys.stderr, flush=True)
        else:
            self._bar.write(sentence, file=sys.stderr)
