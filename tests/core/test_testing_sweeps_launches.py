"""The suites of sweep methods and of launches find what is wrong, and nothing else."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from lightrail import Launch, SweepMethod, Traits
from lightrail.launch import Job, JobState, Order
from lightrail.sweep import Choices
from lightrail.testing import LaunchSuite, SweepSuite


class Drawn(SweepMethod):
    """Draws every trial at random."""

    traits = Traits(paper="chance", is_stochastic=True)
    past_the_end = False
    forgets = False
    fails_with_failures = False
    tells_again = False

    def __init__(self, space: Any, folder: Any, goal: Any, *, trials: int = 20, seed: int = 0) -> None:
        super().__init__(space, folder, goal, trials=trials)
        self.seed = seed
        self.drawn: dict[str, dict[str, str]] = {}

    def ask(self, number: int) -> dict[str, str]:
        draw = random.Random(None if self.forgets else f"{self.seed} {number} {self.told()}")
        record = self.folder / "drawn.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.forgets and record.exists():
            self.drawn = json.loads(record.read_text())
        if str(number) not in self.drawn:
            self.drawn[str(number)] = {
                key: draw.choice(each.values)
                if isinstance(each, Choices)
                else each.typed(draw.uniform(each.low, each.high))
                for key, each in self.space.items()
            }
            if self.past_the_end:
                self.drawn[str(number)]["model.width"] = "65"
            record.write_text(json.dumps(self.drawn))
        return self.drawn[str(number)]

    def tell(self, number: int, value: float | None) -> None:
        if self.fails_with_failures and value is None:
            raise ZeroDivisionError
        (self.folder / f"told_{number}").write_text("again" if self.told(number) and self.tells_again else "once")

    def told(self, number: int | str = "*") -> list[str]:
        return sorted(path.read_text() for path in self.folder.glob(f"told_{number}"))


def failures(suite: type[Any], made: Any) -> dict[str, str]:
    found = type("Made", (suite,), {"plugin": made}).outcomes()
    return {outcome.check: outcome.reason for outcome in found if outcome.state == "failed"}


def test_a_sound_method_passes():
    assert failures(SweepSuite, Drawn) == {}


@pytest.mark.parametrize(
    ("flaw", "check", "told"),
    [
        ("past_the_end", "proposes_within_the_space", "model.width=65 is not in"),
        ("forgets", "survives_a_restart", "after a restart it answers otherwise"),
        ("fails_with_failures", "accepts_failures", ""),
        ("tells_again", "tells_once", "telling a trial twice"),
    ],
)
def test_a_flaw_is_found(flaw, check, told):
    made = type("Flawed", (Drawn,), {flaw: True, "__doc__": "Draws with a flaw."})
    found = failures(SweepSuite, made)
    assert check in found
    assert told in found[check]


class Idle(Launch):
    """Takes orders, and says that they are done."""

    def start(self, order: Order) -> Job:
        return self.job(order, "1")

    def state(self, job: Job) -> JobState:
        return JobState("finished")

    def cancel(self, job: Job) -> None:
        (Path(job.folder) / "cancelled").touch()


def test_a_launch_that_carries_nothing_out_is_found():
    found = failures(LaunchSuite, Idle)
    assert "finished without a summary" in found.pop("carries_out_an_order")
    assert "does not begin" in found.pop("cancels_a_job")
    assert found == {}
