"""What a sweep came to: values, means over seeds, what mattered; in a table, for programs and in a page."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from lightrail.command import main
from lightrail.launch import JobState
from lightrail.launch.job import write_outcome
from lightrail.sweep.importance import explained_variance, importance_of
from lightrail.sweep.ledger import Ledger, Trial
from lightrail.sweep.method import Goal
from lightrail.sweep.results import Row, groups_over_seeds, value_of

LESS, MORE = Goal("val_loss", "min"), Goal("val_loss", "max")


def row(number: int, value: float | None, **values: str) -> Row:
    return Row(Trial(number, values, Path("nowhere")), JobState("finished"), {}, value)


def test_the_best_value_is_of_the_goal_and_finite(tmp_path: Path) -> None:
    assert value_of(tmp_path, LESS) is None
    (tmp_path / "metrics.csv").write_text("step,val_loss\n1,0.5\n2,nan\n3,0.25\n4,0.75\n5,inf\n")
    assert (value_of(tmp_path, LESS), value_of(tmp_path, MORE)) == (0.25, 0.75)
    (tmp_path / "summary.json").write_text('{"monitor": {"name": "val_loss", "mode": "min", "best": 0.125}}')
    assert (value_of(tmp_path, LESS), value_of(tmp_path, MORE)) == (0.125, 0.75)
    assert value_of(tmp_path, Goal("test_loss", "min")) is None
    (tmp_path / "summary.json").write_text('{"monitor": {"name": "val_loss", "mode": "min", "best": NaN}}')
    assert value_of(tmp_path, LESS) is None


def test_trials_that_differ_in_their_seed_alone_are_one_group() -> None:
    rows = [row(0, 1.0, lr="1", seed="0"), row(1, 3.0, lr="1", seed="1"), row(2, 1.5, lr="2", seed="0"),
            row(3, None, lr="2", seed="1")]  # fmt: skip
    first, second = groups_over_seeds(rows, LESS)
    assert (first.values, first.count, first.mean) == ({"lr": "2"}, 1, 1.5)
    assert math.isnan(first.deviation)
    assert (second.values, second.count, second.mean, second.deviation) == ({"lr": "1"}, 2, 2.0, math.sqrt(2))
    assert groups_over_seeds([row(0, 1.0, lr="1"), row(1, 2.0, lr="2")], LESS) == []


def test_what_a_key_explains_is_the_variance_between_its_values() -> None:
    # Within: 2 * 0.5 = 1, in all 17; 4 trials in 2 groups: 1 - 1/17 * 3/2.
    assert explained_variance(np.array([0, 0, 1, 1]), np.array([1.0, 2.0, 5.0, 6.0])) == pytest.approx(31 / 34)
    assert explained_variance(np.array([0, 1, 0, 1]), np.array([1.0, 1.0, 2.0, 2.0])) == 0
    assert explained_variance(np.arange(4), np.arange(4.0)) == 0  # each its own group: nothing can be told


@pytest.mark.parametrize("count", [24, 60])
def test_what_mattered_comes_first_and_what_did_not_has_no_share(count: int) -> None:
    draw = random.Random(3)
    rows = []
    for number in range(count):
        optimizer, lr, width = draw.choice(["a", "b", "c"]), 10 ** draw.uniform(-4, -1), draw.choice(["16", "32"])
        value = 2 * (optimizer == "b") + 0.5 * (math.log10(lr) + 2.5)
        rows.append(row(number, value, optimizer=optimizer, **{"optimizer.lr": f"{lr:.5g}"}, width=width))
    found = importance_of(rows)
    assert found is not None
    assert found.keys == ("optimizer", "optimizer.lr", "width")
    # 2 * Bernoulli(1/3) varies by 8/9, 0.5 * uniform(3) by 3/16: shares 0.83 and 0.17.
    assert found.shares[0] == pytest.approx(0.83, abs=0.2)
    assert found.shares[2] < 0.06
    assert ("forest" in found.how) == (count == 60)


def test_nothing_to_compare_has_no_importance() -> None:
    assert importance_of([row(0, 1.0, lr="1"), row(1, 2.0, lr="2")]) is None
    assert importance_of([row(number, 1.0, lr=str(number)) for number in range(5)]) is None


@pytest.fixture
def swept(tmp_path: Path) -> Path:
    """A sweep of two optimizers and two seeds, of which one trial failed and one has not begun."""
    folder = tmp_path / "runs" / "s"
    for number, (optimizer, seed) in enumerate([("adamw", 1), ("adamw", 2), ("<sgd>", 1), ("<sgd>", 2), ("lion", 1)]):
        place = folder / "jobs" / str(number)
        (place / "launch").mkdir(parents=True)
        values = {"optimizer": optimizer, "+seed": str(seed)}
        (place / "trial.json").write_text(json.dumps({"number": number, "values": values}))
        overrides = [f"optimizer={optimizer}", f"++seed={seed}", "launch=here", "++launch.parallel=2"]
        (place / "lock.json").write_text(json.dumps({"overrides": overrides}))
        if number == 3:
            write_outcome(place, JobState("failed", "Traceback (most recent call last):\n  ...\nValueError: no"))
        elif number < 4:
            metrics = {"val_accuracy": 0.5 + number / 8, "test_accuracy": 0.25}
            (place / "summary.json").write_text(json.dumps({"status": "finished", "metrics": metrics}))
            write_outcome(place, JobState("finished"))
    Ledger(folder).write(planned=6, goal={"metric": "val_accuracy", "mode": "max"}, command="train -m …")
    return folder


def test_the_table_and_the_page(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--root", str(swept.parent)]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines[3:9]]
    assert table[:3] == [
        ["job", "optimizer", "seed", "val_accuracy", "test_accuracy", "state"],
        ["2", "<sgd>", "1", "0.7500", "*", "0.2500", "finished"],
        ["1", "adamw", "2", "0.6250", "0.2500", "finished"],
    ]
    assert "failed: ValueError: no" in lines[7]
    assert "pending: not started" in lines[8]
    text = "\n".join(lines)
    assert "1 of 6 trials were not proposed yet" in text
    assert "adamw      2      0.5625 ± 0.08839" in text
    assert "train 'optimizer=<sgd>' seed=1" in text
    page = (swept / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "&lt;sgd&gt;" in page
    assert "<sgd>" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_for_programs(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(swept), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["best"] == {"number": 2, "command": "train 'optimizer=<sgd>' seed=1"}
    assert [each["number"] for each in told["trials"]] == [2, 1, 0, 3, 4]
    assert told["trials"][0]["values"] == {"optimizer": "<sgd>", "seed": "1"}
    assert told["over_seeds"][1] == {"values": {"optimizer": "adamw"}, "count": 2, "mean": 0.5625,
                                     "deviation": pytest.approx(0.0883883)}  # fmt: skip
