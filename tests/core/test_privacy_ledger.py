"""The account of a run: what it adds up to, that it survives files and resumes, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from lightrail.errors import CheckpointError, ConfigurationError
from lightrail.privacy.events import Event
from lightrail.privacy.ledger import (
    ADD_OR_REMOVE,
    ZERO_OUT,
    Ledger,
    check_delta,
    composed,
    default_delta,
    plan_table,
)

pytest.importorskip("dp_accounting")

STEP = Event(1.5, 1, 64, 1437)


def ledger_of(steps=0, **options):
    given = {
        "delta": 1e-5,
        "noise": 1.5,
        "planned": [replace(STEP, steps=440)],
        "accountant": "rdp",
        "target_epsilon": 3.1,
        "clip": "flat at 1",
        "assumptions": ["Nobody sees the noise."],
        "guards": {"thresholdout": {"budget": 100, "spent": 3}},
    }
    ledger = Ledger(**{**given, **options})
    for _ in range(steps):
        ledger.record(STEP)
    return ledger


def parts(error):
    return all((error.value.found, error.value.allowed, error.value.remedy))


def test_equal_neighbours_are_counted():
    ledger = ledger_of()
    for noise in (1.5, 1.5, 2.0, 1.5):
        ledger.record(replace(STEP, noise=noise))
    assert ledger.events == [replace(STEP, steps=2), replace(STEP, noise=2.0), STEP]


def test_epsilon_grows_from_nothing_to_what_was_planned():
    assert ledger_of().epsilon() == 0
    some, all_steps = ledger_of(100).epsilon(), ledger_of(440)
    assert 0 < some < all_steps.epsilon()
    assert all_steps.epsilon() == all_steps.planned_epsilon


def test_a_resumed_run_keeps_what_it_spent(tmp_path):
    straight = ledger_of(30)
    before = ledger_of(20)
    torch.save({"privacy": before.to_dict()}, tmp_path / "last.ckpt")
    after = Ledger.from_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["privacy"])
    assert after == before
    for _ in range(10):
        after.record(STEP)
    assert after == straight
    assert after.epsilon() > before.epsilon()


def test_a_copy_shares_nothing():
    ledger = ledger_of(3)
    copy = Ledger.from_dict(ledger.to_dict())
    copy.record(STEP)
    copy.guards["thresholdout"]["spent"] = 99
    copy.assumptions.append("More.")
    assert ledger == ledger_of(3)


def test_privacy_json_holds_the_figures_and_the_ledger(tmp_path):
    ledger = ledger_of(10)
    ledger.write(tmp_path / "privacy.json")
    told = json.loads((tmp_path / "privacy.json").read_text())
    assert told["epsilon"] == ledger.epsilon()
    assert told["planned_epsilon"] == ledger.planned_epsilon
    assert told["delta"] == 1e-5
    assert Ledger.read(tmp_path / "privacy.json") == ledger
    assert [path.name for path in tmp_path.iterdir()] == ["privacy.json"]


def test_without_noise_nothing_is_private(tmp_path):
    bare = ledger_of(2)
    bare.record(replace(STEP, noise=0.0))
    for ledger in (bare, ledger_of(2, is_private=False), ledger_of(2, planned=[replace(STEP, noise=0.0)])):
        assert not ledger.is_private
        assert ledger.epsilon() == math.inf
        ledger.write(tmp_path / "privacy.json")
        text = (tmp_path / "privacy.json").read_text()
        assert json.loads(text, parse_constant=pytest.fail)["epsilon"] is None
        assert not Ledger.read(tmp_path / "privacy.json").is_private
        assert plan_table(ledger)[0][0] == "private"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: path.write_text(""),
        lambda path: path.write_bytes(b"\xff\xfe{"),
        lambda path: path.write_text("[1, 2]"),
        lambda path: path.write_text('{"epsilon": 3}'),
        lambda path: ledger_of(2).write(path) or path.write_text(path.read_text()[:200]),
        lambda path: path.write_text(json.dumps({**ledger_of().to_dict(), "schema": 2})),
        lambda path: path.write_text(json.dumps({k: v for k, v in ledger_of().to_dict().items() if k != "events"})),
        lambda path: path.write_text(json.dumps({**ledger_of().to_dict(), "events": 5})),
        lambda path: path.write_text(json.dumps({**ledger_of().to_dict(), "events": [5]})),
        lambda path: path.write_text(json.dumps({**ledger_of().to_dict(), "delta": "small"})),
        lambda path: path.write_text(json.dumps({**ledger_of().to_dict(), "delta": None})),
    ],
)
def test_a_file_that_is_no_ledger_is_refused(tmp_path, spoil):
    spoil(tmp_path / "privacy.json")
    with pytest.raises((CheckpointError, ConfigurationError)) as caught:
        Ledger.read(tmp_path / "privacy.json")
    assert parts(caught)


def test_shuffled_batches_do_not_amplify():
    whole = Event(1.5, 1, 1437, 1437)
    ledger = ledger_of(sampling="shuffle", planned=[replace(whole, steps=20)], adjacency=ZERO_OUT)
    ledger.record(whole)
    with pytest.raises(ConfigurationError, match="Poisson") as caught:
        ledger.record(STEP)
    assert parts(caught)
    assert ledger.events == [whole]
    for sampling in ("shuffle", "full"):
        with pytest.raises(ConfigurationError, match="Poisson"):
            ledger_of(sampling=sampling)


@pytest.mark.parametrize(
    "options",
    [
        {"accountant": "gdp"},
        {"delta": 0.0},
        {"delta": 1.0},
        {"adjacency": "replace one record"},
        {"sampling": "uniform"},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigurationError) as caught:
        ledger_of(**options)
    assert parts(caught)


def test_runs_on_the_same_data_add_up():
    one, other = ledger_of(30), ledger_of(40, delta=1e-6, noise=2.0, clip="automatic at 1")
    total = composed([one, other])
    assert total.events == [replace(STEP, steps=70)]
    assert total.delta == 1e-6
    assert total.noise is None
    assert total.clip == "flat at 1; automatic at 1"
    assert total.epsilon() == ledger_of(70, delta=1e-6).epsilon()
    assert sorted(total.guards) == ["thresholdout (run 1)", "thresholdout (run 2)"]
    assert total.assumptions[0] == "Nobody sees the noise."
    assert "2 runs" in total.assumptions[-1]
    assert composed([one]) == one
    assert one == ledger_of(30)


def test_one_run_without_privacy_spoils_the_total():
    assert composed([ledger_of(3), ledger_of(3, is_private=False)]).epsilon() == math.inf


@pytest.mark.parametrize("ledgers", [[], [ledger_of(), ledger_of(adjacency=ZERO_OUT)]])
def test_what_cannot_be_added_is_refused(ledgers):
    with pytest.raises(ConfigurationError, match="together") as caught:
        composed(ledgers)
    assert parts(caught)


def test_the_plan_is_told_in_rows():
    rows = dict(plan_table(ledger_of()))
    assert rows["epsilon"].endswith("(target 3.100)")
    assert rows["sampling rate"] == "64/1437"
    assert rows["steps"] == "440"
    assert rows["noise multiplier"] == "1.500"
    assert rows["accountant"] == "RDP"
    assert rows["neighbours"] == ADD_OR_REMOVE
    two = ledger_of(planned=[Event(10.0, 4, 64, 1437), Event(70.0, 196, 64, 1437)], noise=None)
    assert dict(plan_table(two))["noise multiplier"] == "10.00 (4 steps), 70.00 (196 steps)"
    assert dict(plan_table(two))["sampling rate"] == "64/1437"
    many = ledger_of(planned=[replace(STEP, noise=1.0 + n) for n in range(9)], noise=None)
    assert dict(plan_table(many))["noise multiplier"] == "1.000 to 9.000, in 9 kinds of steps"


def test_delta_is_small_for_its_data():
    assert [default_delta(n) for n in (1, 9, 10, 11, 60000, 100000)] == [0.1, 0.01, 0.01, 0.001, 1e-6, 1e-6]
    for n in (1, 7, 93, 1437, 10**6):
        assert default_delta(n) * 10 * n <= 1 + 1e-12
        assert default_delta(n) * 100 * n > 1 - 1e-12
        assert check_delta(default_delta(n), n) == default_delta(n)
    for n in (93, 100, 1437):
        with pytest.raises(ConfigurationError, match="delta is too large") as caught:
            check_delta(1 / n, n)
        assert parts(caught)
