"""The trials of a sweep read the same records: its table says what each has spent, and what all have together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightrail.sweep import running as sweep
from lightrail.privacy.events import Event
from lightrail.privacy.ledger import Ledger, composed
from lightrail.privacy.trials import spent_together
from lightrail.report.privacy import figure

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
    def swept(self, monkeypatch: pytest.MonkeyPatch, outcomes: list[tuple[int, dict]]) -> int:
        results = iter(outcomes)
        values = ",".join(str(number) for number in range(1, len(outcomes) + 1))
        monkeypatch.setattr("lightrail.configuration.compose", lambda *_, **__: None)
        monkeypatch.setattr(sweep, "_run_job", lambda *_: next(results))
        return sweep.run_sweep([f"seed={values}"])

    def test_it_has_a_column_and_a_total(self, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
        trials = [trial(tmp_path / "a"), trial(tmp_path / "b", is_private=False)]
        assert self.swept(monkeypatch, [(0, each) for each in trials]) == 0
        header, first, second, _, total, sentence = capsys.readouterr().out.splitlines()
        assert header.split() == ["job", "test_accuracy", "epsilon", "run", "folder"]
        spent = figure(trials[0]["privacy"]["epsilon"])
        assert first.split() == ["seed=1", "0.5000", spent, str(tmp_path / "a")]
        assert "not private" in second
        assert "2 trials on digits together: NOT private" in total
        assert TOGETHER in sentence

    def test_a_trial_that_failed_does_not_break_it(self, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
        assert self.swept(monkeypatch, [(1, {}), (0, trial(tmp_path / "a"))]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert lines[1].split() == ["seed=1", "-", "-", "failed", "with", "status", "1"]
        assert "1 trial on digits together: epsilon" in lines[4]
        assert "1 trial left no account" in lines[5]

    def test_sweeps_without_privacy_are_as_they_were(self, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
        assert self.swept(monkeypatch, [(0, open_trial(tmp_path / "a"))]) == 0
        out = capsys.readouterr().out
        assert out.splitlines()[0].split() == ["job", "test_accuracy", "run", "folder"]
        assert len(out.splitlines()) == 2
