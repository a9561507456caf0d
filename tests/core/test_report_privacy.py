"""What the report and the end of a run say of privacy: what was spent, on which conditions, and no more than holds."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_report import LOCK, SUMMARY, Page, run_folder

from lightrail.privacy.events import Event
from lightrail.privacy.ledger import Ledger
from lightrail.report import result_table, write_report
from lightrail.report.curves import charts, draw
from lightrail.report.privacy import figure, spending

PLANNED = [Event(8.0, 100, 10, 10)]  # epsilon 5.68 at delta 1e-5
PRIVATE_LOCK = LOCK | {"plugins": [*LOCK["plugins"], {"kind": "privacy", "name": "dp_sgd", "options": None}]}


def ledger(**changes: Any) -> Ledger:
    values: dict[str, Any] = {
        "delta": 1e-5, "noise": 8.0, "planned": PLANNED, "events": [Event(8.0, 50, 10, 10)], "sampling": "full",
        "target_epsilon": 6, "clip": "flat, norm 1", "accountant": "rdp",
        "assumptions": ["The guarantee covers the training data.", "Noise: from the system."],
    }  # fmt: skip
    return Ledger(**values | changes)


def told(account: Ledger) -> dict[str, Any]:
    """What the summary says of it."""
    return {
        "epsilon": account.epsilon() if account.is_private else None, "delta": account.delta,
        "target_epsilon": account.target_epsilon, "noise": account.noise, "private": account.is_private,
    }  # fmt: skip


def private_run(folder: Path, account: Ledger) -> Path:
    run_folder(folder, lock=PRIVATE_LOCK, summary=SUMMARY | {"privacy": told(account)})
    (folder / "metrics.csv").unlink()  # its pictures take time
    account.write(folder / "privacy.json")
    return folder


def page(folder: Path) -> Page:
    return Page(write_report(folder))


@pytest.mark.parametrize(("epsilon", "shown"), [
    (2.99901, "2.9991"), (2.9991, "2.9991"), (3, "3.0000"), (0.0, "0.0000"), (1e-9, "0.0001"), (None, "∞"),
    (float("inf"), "∞"), (12345.2, "12,346"),
])  # fmt: skip
def test_epsilon_is_never_rounded_down(epsilon: float | None, shown: str) -> None:
    assert figure(epsilon) == shown


class TestPage:
    def test_it_says_what_was_spent_and_on_what_that_rests(self, tmp_path: Path) -> None:
        guards = {"thresholdout": {"budget": 20, "left": 18, "queries": 3}}
        account = ledger(guards=guards)
        text = page(private_run(tmp_path, account)).text
        for words in (
            "Privacy", "Epsilon spent", figure(account.epsilon()), "of 6", "delta 1e-5", "RDP", "Noise multiplier",
            "8.000", "10/10", "every record in every step", "flat, norm 1", "add or remove one record",
            "The guarantee covers the training data.", "Noise: from the system.", "Epsilon is of this run alone",
            "Thresholdout", "budget 20 · left 18 · queries 3", "privacy.json",
        ):  # fmt: skip
            assert words in text, words
        assert "NOT private" not in text
        assert "conditions" not in text

    def test_a_run_that_is_half_done_has_spent_half_of_its_steps(self, tmp_path: Path) -> None:
        account = ledger()
        assert account.epsilon() < account.planned_epsilon
        found = page(private_run(tmp_path, account))
        (bar,) = [each["style"] for each in found.all("i") if "style" in each]
        assert bar == f"width:{account.epsilon() / 6:.1%}"

    def test_without_a_target_there_is_no_bar(self, tmp_path: Path) -> None:
        found = page(private_run(tmp_path, ledger(target_epsilon=None)))
        assert "Epsilon spent" in found.text
        assert not [each for each in found.all("i") if "style" in each]

    @pytest.mark.parametrize(("changes", "why"), [
        ({"noise": 0.0, "planned": [Event(0.0, 5, 10, 10)], "events": []}, "It has no noise."),
        ({"is_private": False}, "Its noise can be foretold."),
    ])  # fmt: skip
    def test_a_run_that_is_not_private_says_so_first(self, tmp_path: Path, changes: dict, why: str) -> None:
        found = page(private_run(tmp_path, ledger(**changes)))
        assert f"This run is NOT private.{why}" in found.text
        assert found.text.index("NOT private") < found.text.index("0.9778")
        assert {"class": "alarm", "role": "alert"} in found.all("div")
        for words in ("Epsilon spent", "of 6", "What this rests on", "delta 1e-5"):
            assert words not in found.text

    def test_conditions_stand_beside_the_figure(self, tmp_path: Path) -> None:
        account = ledger(assumptions=["Conditional: no gradient is longer than 3."])
        text = page(private_run(tmp_path, account)).text
        assert "under the conditions below" in text
        assert "no gradient is longer than 3" in text
        assert str(result_table(SUMMARY | {"privacy": told(account)}, tmp_path)).count("(RDP), conditional") == 1

    @pytest.mark.parametrize("content", [None, "", "{", "[1]"])
    def test_an_account_that_is_lost_is_said(self, tmp_path: Path, content: str | None) -> None:
        (private_run(tmp_path, ledger()) / "privacy.json").unlink()
        if content is not None:
            (tmp_path / "privacy.json").write_text(content)
        text = page(tmp_path).text
        assert "Nothing says what this run has spent of its privacy." in text
        assert "privacy.json is not in this folder" in text or "privacy.json could not be read" in text
        assert "Epsilon spent" not in text

    @pytest.mark.parametrize("change", [{"schema": 99}, {"planned": "none"}, {"accountant": "mine"}])
    def test_a_plan_that_cannot_be_read_is_said(self, tmp_path: Path, change: dict) -> None:
        private_run(tmp_path, ledger())
        values = json.loads((tmp_path / "privacy.json").read_text())
        (tmp_path / "privacy.json").write_text(json.dumps(values | change))
        assert "The plan cannot be shown" in page(tmp_path).text

    def test_a_file_without_the_word_private_promises_nothing(self, tmp_path: Path) -> None:
        private_run(tmp_path, ledger())
        (tmp_path / "privacy.json").write_text(json.dumps({"epsilon": 1.0}))
        assert "This run is NOT private." in page(tmp_path).text

    def test_a_run_without_privacy_does_not_mention_it(self, tmp_path: Path) -> None:
        text = page(run_folder(tmp_path)).text
        assert "privacy" not in text.lower()

    def test_whatever_an_account_holds_is_text(self, tmp_path: Path) -> None:
        evil = "<script>alert('x')</script>"
        account = ledger(clip=evil, assumptions=[evil], guards={evil: {evil: 1}})
        found = page(private_run(tmp_path, account))
        assert not found.all("script")
        assert found.open == []
        assert found.text.count("<script>") == 4


class TestCurve:
    METRICS = {"epsilon": [(9, 1.0), (19, 1.5)], "lr": [(1, 1.0), (2, 1.0)], "train_loss": [(1, 1.0), (2, 1.0)]}  # noqa: RUF012
    SUMMARY = {"steps": 40, "privacy": {"epsilon": 2.0, "target_epsilon": 3}}  # noqa: RUF012

    def test_it_ends_at_what_was_spent_below_its_target(self) -> None:
        (loss, epsilon, _) = charts(self.METRICS, self.SUMMARY)
        assert (loss.base, loss.limit, epsilon.base, epsilon.limit) == ("loss", None, "epsilon", 3)
        assert list(zip(*(epsilon.series[0].steps, epsilon.series[0].values), strict=True)) == [
            (9, 1.0), (19, 1.5), (39, 2.0)
        ]  # fmt: skip
        assert epsilon.remark == "dashed: the target 3"
        axes = draw(epsilon).axes[0]
        assert axes.get_ylim() == pytest.approx((0.0, 3.24))
        assert list(axes.lines[1].get_ydata()) == [3, 3]  # type: ignore[call-overload]

    @pytest.mark.parametrize("privacy", [{}, None, {"epsilon": None, "target_epsilon": None}])
    def test_without_an_account_it_is_what_was_logged(self, privacy: dict | None) -> None:
        epsilon = next(c for c in charts(self.METRICS, {"steps": 40, "privacy": privacy}) if c.base == "epsilon")
        assert (list(epsilon.series[0].values), epsilon.limit) == ([1.0, 1.5], None)

    def test_a_value_at_the_last_step_gives_way(self) -> None:
        epsilon = next(c for c in charts(self.METRICS, self.SUMMARY | {"steps": 20}) if c.base == "epsilon")
        assert list(epsilon.series[0].values) == [1.0, 2.0]


class TestTerminal:
    def test_one_line(self, tmp_path: Path) -> None:
        account = ledger()
        text = str(result_table(SUMMARY | {"privacy": told(account)}, private_run(tmp_path, account)))
        assert f"\nprivacy  epsilon {figure(account.epsilon())} of 6 at delta 1e-5 (RDP)\n" in text

    def test_without_the_file_the_summary_suffices(self, tmp_path: Path) -> None:
        account = ledger(target_epsilon=None)
        text = str(result_table(SUMMARY | {"privacy": told(account)}, tmp_path))
        assert f"privacy  epsilon {figure(account.epsilon())} at delta 1e-5\n" in text

    @pytest.mark.parametrize("content", ["", "[]", "{"])
    def test_a_broken_file_costs_nothing(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "privacy.json").write_text(content)
        assert "privacy  epsilon" in str(result_table({"privacy": told(ledger())}, tmp_path))

    def test_what_is_not_private(self, tmp_path: Path) -> None:
        account = ledger(is_private=False)
        assert "privacy  NOT private: its noise can be foretold" in str(
            result_table(SUMMARY | {"privacy": told(account)}, private_run(tmp_path, account))
        )

    def test_in_colour_too(self, tmp_path: Path) -> None:
        console = Console(file=io.StringIO(), width=300)
        console.print(result_table({"privacy": told(ledger(is_private=False))}, tmp_path))
        assert "privacy  NOT private: its noise can be foretold" in console.file.getvalue()  # type: ignore[attr-defined]

    def test_a_run_that_ended_before_its_plan(self, tmp_path: Path) -> None:
        assert "privacy  not known" in str(result_table({"privacy": {}}, tmp_path))

    def test_other_runs_have_no_such_line(self, tmp_path: Path) -> None:
        assert "privacy" not in str(result_table(SUMMARY, tmp_path))

    def test_an_epsilon_without_a_bound(self) -> None:
        assert spending({"is_private": True, "epsilon": None, "delta": 1e-5}) == "epsilon ∞ at delta 1e-5"
