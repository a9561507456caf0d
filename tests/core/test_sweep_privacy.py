"""The trials of a sweep read the same records: its table says what each has spent, and what all have together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightrail.launch import JobState
from lightrail.privacy.events import Event
from lightrail.privacy.ledger import Ledger, composed
from lightrail.privacy.trials import spent_together
from lightrail.report.privacy import figure
from lightrail.sweep.ledger import Ledger as SweepLedger
from lightrail.sweep.ledger import Trial
from lightrail.sweep.results import Row
from lightrail.sweep.table import ending

TOGETHER = "whatever is chosen among them is promised no more than this"


def trial(folder: Path, *, data: str = "digits", steps: int = 50, status: str = "finished", **changes: Any) -> dict:
    """The summary of a private trial, whose folder is written."""
    folder.mkdir()
    values: dict[str, Any] = {"delta": 1e-5, "noise": 8.0, "planned": [Event(8.0, 100, 10, 10)], "sampling": "full"}
    account = Ledger(**values | {"events": [Event(8.0, steps, 10, 10)] if steps else [], **changes})
    account.write(folder / "privacy.json")
    said = {"epsilon": account.epsilon() if account.is_private else None, "private": account.is_private}
    return open_trial(folder, data=data, status=status) | {"privacy": said}


def open_trial(folder: Path, *, data: str = "digits", status: str = "finished") -> dict[str, Any]:
    """The summary of a trial without privacy."""
    folder.mkdir(exist_ok=True)
    (folder / "lock.json").write_text(json.dumps({"plugins": [{"kind": "data", "name": data}]}))
    return {"folder": str(folder), "status": status, "metrics": {"test_accuracy": 0.5}}


def test_trials_on_the_same_data_are_composed(tmp_path: Path) -> None:
    trials = [trial(tmp_path / "a"), trial(tmp_path / "b")]
    whole, sentence = spent_together(trials)
    # 50 and 50 full batches at noise 8 are 100 of them.
    assert whole == "privacy  2 trials on digits together: epsilon 5.6796 at delta 1e-5 (PLD)"
    assert TOGETHER in sentence


def test_a_trial_that_failed_counts_with_what_it_released(tmp_path: Path) -> None:
    trials = [trial(tmp_path / "a"), trial(tmp_path / "b", steps=7, status="failed"), trial(tmp_path / "c", steps=0)]
    ledgers = [Ledger.read(Path(each["folder"], "privacy.json")) for each in trials]
    assert f"3 trials on digits together: epsilon {figure(composed(ledgers).epsilon())}" in spent_together(trials)[0]


def test_each_data_set_has_its_own_budget(tmp_path: Path) -> None:
    lines = spent_together([trial(tmp_path / "a"), trial(tmp_path / "b", data="iris")])
    assert ["1 trial on digits" in lines[0], "1 trial on iris" in lines[1], len(lines)] == [True, True, 3]


def test_what_left_nothing_is_named(tmp_path: Path) -> None:
    lines = spent_together([trial(tmp_path / "a"), {}])
    assert "1 trial on digits" in lines[0]
    assert lines[1] == "1 trial left no account: whatever was released there is not in this."


def test_a_trial_that_ended_before_its_plan_released_nothing(tmp_path: Path) -> None:
    before = open_trial(tmp_path / "b", status="failed") | {"privacy": {}}
    assert "2 trials on digits together: epsilon" in spent_together([trial(tmp_path / "a"), before])[0]
    assert "nothing was released" in spent_together([before])[0]


@pytest.mark.parametrize("content", ["", "{}", None])
def test_an_account_that_cannot_be_read_leaves_no_figure(tmp_path: Path, content: str | None) -> None:
    trials = [trial(tmp_path / "a"), trial(tmp_path / "b")]
    (tmp_path / "b" / "privacy.json").unlink()
    if content is not None:
        (tmp_path / "b" / "privacy.json").write_text(content)
    line = spent_together(trials)[0]
    assert "not known: the account of 1 trial cannot be read" in line
    assert "epsilon" not in line


@pytest.mark.parametrize(("changes", "why"), [
    ({"is_private": False}, "its noise can be foretold"),
    ({"noise": 0.0, "planned": [], "events": [Event(0.0, 1, 10, 10)]}, "it has no noise"),
])  # fmt: skip
def test_one_trial_that_is_not_private_leaves_no_promise(tmp_path: Path, changes: dict, why: str) -> None:
    line = spent_together([trial(tmp_path / "a"), trial(tmp_path / "b", **changes)])[0]
    assert line == f"privacy  2 trials on digits together: NOT private: {why}"


def test_nor_does_one_without_privacy(tmp_path: Path) -> None:
    line = spent_together([trial(tmp_path / "a"), open_trial(tmp_path / "b")])[0]
    assert line == "privacy  2 trials on digits together: NOT private: 1 trial trained without privacy"


def test_different_meanings_of_neighbours_do_not_compose(tmp_path: Path) -> None:
    other = trial(tmp_path / "b", adjacency="zero out one record", sampling="shuffle")
    assert "not known: these runs cannot be accounted together" in spent_together([trial(tmp_path / "a"), other])[0]


def test_conditions_stay(tmp_path: Path) -> None:
    conditional = trial(tmp_path / "b", assumptions=["Conditional: no gradient is longer than 3."])
    assert spent_together([trial(tmp_path / "a"), conditional])[0].endswith("(PLD), conditional")


class TestTable:
    def told(self, tmp_path: Path, trials: list[tuple[str, dict]]) -> str:
        """What is told of a sweep over seeds, each trial with its phase and its summary."""
        rows = [
            Row(Trial(number, {"seed": str(number)}, tmp_path), JobState(phase), summary)
            for number, (phase, summary) in enumerate(trials)
        ]
        goal = {"metric": "val_accuracy", "mode": "max"}
        return ending(SweepLedger(tmp_path, {"planned": len(rows), "goal": goal}), rows)

    def test_it_has_a_column_and_a_total(self, tmp_path: Path) -> None:
        trials = [trial(tmp_path / "a"), trial(tmp_path / "b", is_private=False)]
        told = self.told(tmp_path, [("finished", each) for each in trials])
        header, first, second, _, total, sentence = told.splitlines()
        assert header.split() == ["job", "seed", "val_accuracy", "test_accuracy", "epsilon", "state"]
        spent = figure(trials[0]["privacy"]["epsilon"])
        assert first.split() == ["0", "0", "-", "0.5000", spent, "finished"]
        assert "not private" in second
        assert "2 trials on digits together: NOT private" in total
        assert TOGETHER in sentence

    def test_a_trial_that_failed_does_not_break_it_and_one_that_waits_spent_nothing(self, tmp_path: Path) -> None:
        told = self.told(tmp_path, [("failed", {}), ("finished", trial(tmp_path / "a")), ("pending", {})])
        lines = told.splitlines()
        assert lines[1].split() == ["0", "0", "-", "-", "-", "failed"]
        assert "1 trial on digits together: epsilon" in lines[5]
        assert "1 trial left no account" in lines[6]

    def test_sweeps_without_privacy_are_as_they_were(self, tmp_path: Path) -> None:
        told = self.told(tmp_path, [("finished", open_trial(tmp_path / "a"))])
        assert told.splitlines()[0].split() == ["job", "seed", "val_accuracy", "test_accuracy", "state"]
        assert len(told.splitlines()) == 2
