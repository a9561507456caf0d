"""``lightrail privacy``: plans that hold, audits that notice, and bad words told in four parts."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch

from lightrail.command.errors import reporting_errors
from lightrail.command.privacy import main
from lightrail.errors import CheckpointError, ConfigurationError
from lightrail.privacy.accounting import epsilon_of
from lightrail.privacy.audit import audited
from lightrail.privacy.events import Event
from lightrail.privacy.ledger import Ledger

pytest.importorskip("dp_accounting")

KIND = Event(4.0, 440, 64, 1437)


def ledger_of(steps=300, **options):
    given = {"assumptions": ["Nobody sees the noise."], "guards": {"thresholdout": {"budget": 100, "spent": 3}}}
    ledger = Ledger(delta=1e-5, noise=4.0, planned=[KIND], accountant="rdp", **{**given, **options})
    if steps:
        ledger.record(replace(KIND, steps=steps))
    return ledger


def run_of(folder, ledger, saved=None):
    """A run folder as `train` leaves it: privacy.json, and a checkpoint with the same account or another."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "lock.json").write_text("{}")
    ledger.write(folder / "privacy.json")
    if saved is not None:
        checkpoint = {"lightrail": {"privacy": saved.to_dict()}, "loops": {}}
        torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    return folder


def told(capsys, *words):
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_plan_says_the_noise_of_a_target(capsys):
    found = told(capsys, "plan", "epsilon=3", "delta=1e-5", "rate=1/100", "steps=1000")
    assert found["noise"] == found["noise_by_accountant"]["pld"] == pytest.approx(0.81363, abs=2e-4)
    assert found["noise_by_accountant"]["rdp"] == pytest.approx(0.86468, abs=2e-4)
    assert found["epsilon_by_steps"][-1]["steps"] == 1000
    assert 2.99 < found["epsilon_by_steps"][-1]["pld"] <= 3
    assert [row["steps"] for row in found["epsilon_by_steps"]] == [100, 250, 500, 1000]


def test_a_plan_says_the_epsilon_of_a_noise(capsys):
    found = told(capsys, "plan", "noise=8", "delta=1e-5", "rate=1", "steps=100", "accountant=rdp")
    assert found["epsilon_by_steps"][-1]["pld"] == pytest.approx(5.679587, abs=1e-5)
    assert found["epsilon_by_steps"][-1]["rdp"] == pytest.approx(6.122758, rel=1e-6)
    assert found["noise"] == 8
    assert found["noise_by_accountant"] == {}


@pytest.mark.parametrize(
    ("rate", "exact"), [("0.01", "1/100"), ("1e-2", "1/100"), ("64/1437", "64/1437"), ("1", "1/1")]
)
def test_typed_rates_are_exact(capsys, rate, exact):
    assert told(capsys, "plan", "noise=9", "delta=1e-5", f"rate={rate}", "steps=2")["rate"] == exact


@pytest.mark.parametrize("records", [93, 99, 105, 117])
def test_epochs_are_counted_in_integers(capsys, records):
    found = told(capsys, "plan", "noise=9", "batch=1", f"records={records}", "epochs=3")
    assert found["steps"] == 3 * records
    assert found["delta"] == (1e-3 if records < 100 else 1e-4)


def test_a_plan_is_told_in_aligned_columns(capsys):
    assert main(["plan", "epsilon=1", "batch=64", "records=1437", "epochs=2", "accountant=rdp"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "epsilon 1 at delta 1e-5 · rate 64/1437 · 44 steps"
    noises = [line.split() for line in lines[3:5]]
    assert [name for name, _ in noises] == ["PLD", "RDP"]
    assert lines[6] == f"epsilon with the noise multiplier {noises[1][1]}:"
    table = lines[8:]
    assert len({len(line) for line in table}) == 1
    assert [line.split()[0] for line in table[1:]] == ["5", "11", "22", "44"]
    # The noise is shown rounded up: typed again it still meets the target.
    assert epsilon_of([Event(float(noises[1][1]), 44, 64, 1437)], 1e-5, "rdp") <= 1


BASE = ["plan", "epsilon=3", "delta=1e-5", "rate=0.1", "steps=10"]


def plan(*words, without=()):
    return [word for word in BASE if word.partition("=")[0] not in without] + list(words)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["plam"], "no command 'plam'"),
        (["--fast"], "no command"),
        (plan("noise=1"), "epsilon and noise are given at once"),
        (plan(without=["epsilon"]), "needs epsilon or noise"),
        (plan(without=["delta"]), "needs delta"),
        (plan(without=["rate"]), "needs rate or batch"),
        (plan("batch=3", without=["rate"]), "needs records"),
        (plan("batch=3", "records=30"), "rate and batch are given at once"),
        (plan(without=["steps"]), "needs steps or epochs"),
        (plan("epochs=3"), "steps and epochs are given at once"),
        (plan("epsilan=3"), "no 'epsilan'"),
        (plan("fast"), "not KEY=VALUE"),
        (plan("rate=0"), "rate is out of range"),
        (plan("rate=3/2"), "rate is out of range"),
        (plan("rate=1/0"), "rate is out of range"),
        (plan("rate=often"), "rate is out of range"),
        (plan("steps=0"), "steps is out of range"),
        (plan("steps=1.5"), "steps is out of range"),
        (plan("delta=0"), "delta is out of range"),
        (plan("delta=1"), "delta is out of range"),
        (plan("records=30", "delta=0.1"), "delta is too large"),
        (plan("epsilon=0"), "epsilon is out of range"),
        (plan("epsilon=nan"), "epsilon is out of range"),
        (plan("noise=0", without=["epsilon"]), "noise is out of range"),
        (plan("batch=31", "records=30", without=["rate"]), "larger than the data"),
        (plan("accountant=gdp"), "no accountant 'gdp'"),
        (["audit"], "needs a run"),
        (["audit", "--fast"], "no option '--fast'"),
    ],
)
def test_bad_words_are_told_in_four_parts(words, what):
    with pytest.raises(ConfigurationError, match=what) as caught:
        main(words)
    assert all((caught.value.found, caught.value.allowed, caught.value.remedy))


@pytest.mark.parametrize("words", [[], ["--help"], ["plan", "-h"], ["audit", "--help"]])
def test_help_shows_examples(capsys, words):
    assert main(words) == 0
    assert "lightrail privacy plan epsilon=3" in capsys.readouterr().out


def test_an_audit_recomputes_what_a_run_says(tmp_path, capsys):
    run = run_of(tmp_path / "run", ledger_of(), ledger_of())
    assert main(["audit", str(run)]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0] == str(run)
    assert f"{ledger_of().epsilon():.4f}" in text
    assert "300 of 440" in text
    assert "  - Nobody sees the noise." in text
    assert "  - thresholdout: budget 100, spent 3" in text
    pld = epsilon_of([replace(KIND, steps=300)], 1e-5)
    for word in (run, run / "privacy.json", run / "checkpoints" / "last.ckpt"):
        found = told(capsys, "audit", str(word))["runs"][0]
        assert found["epsilon"] == {"pld": pld, "rdp": ledger_of().epsilon()}
        assert found["said"] == (None if word.suffix == ".ckpt" else ledger_of().epsilon())


def test_an_audit_notices_a_figure_that_was_changed(tmp_path):
    run = run_of(tmp_path / "run", ledger_of())
    values = json.loads((run / "privacy.json").read_text())
    spent, planned = values["epsilon"], values["planned_epsilon"]
    wrong = [{"epsilon": spent * 0.99}, {"epsilon": spent * 1.01}, {"epsilon": None}, {"epsilon": "2"}]
    wrong += [{"planned_epsilon": planned * 0.9}, {"is_private": False}, {"delta": 1e-4}]
    wrong += [{"events": [{**values["events"][0], "steps": 100}]}]
    for change in wrong:
        (run / "privacy.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(CheckpointError, match="does not say what its events come to"):
            audited(str(run))
    (run / "privacy.json").write_text(json.dumps({**values, "epsilon": spent * 1.0005}))
    assert audited(str(run)).spent["rdp"] == spent


def test_an_audit_notices_two_accounts(tmp_path, capsys):
    run = tmp_path
    for number, other in enumerate((ledger_of(200), ledger_of(is_private=False), Ledger(1e-5, 4.0, [KIND]))):
        run = run_of(tmp_path / str(number), ledger_of(), other)
        with reporting_errors() as outcome:
            main(["audit", str(run)])
        assert outcome.status == 2
        assert "disagree" in capsys.readouterr().err
    torch.save({"lightrail": {}, "loops": {}}, run / "checkpoints" / "last.ckpt")
    with pytest.raises(CheckpointError, match="disagree"):
        audited(str(run))


def test_a_run_without_an_account_is_refused(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    words = [str(run), str(tmp_path / "nowhere")]
    torch.save({"lightrail": {}, "loops": {}}, run / "last.ckpt")
    words.append(str(run / "last.ckpt"))
    for word in words:
        with pytest.raises(CheckpointError) as caught:
            audited(word)
        assert all((caught.value.found, caught.value.allowed, caught.value.remedy))


def test_latest_is_the_newest_run_under_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no run 'latest'"):
        audited("latest")
    for age, name in enumerate(("b", "a")):
        run = run_of(tmp_path / "runs" / name, ledger_of(300 + age))
        for file in run.glob("*.json"):
            os.utime(file, (1000 + age, 1000 + age))
    assert told(capsys, "audit", "latest")["runs"][0]["run"] == os.path.join("runs", "a")


def test_several_runs_come_to_more_than_each(tmp_path, capsys):
    words = [str(run_of(tmp_path / name, ledger_of(steps))) for name, steps in (("a", 100), ("b", 200))]
    found = told(capsys, "audit", *words)
    assert found["together"]["epsilon"]["rdp"] == ledger_of(300).epsilon()
    assert main(["audit", *words]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("2 runs together")
    assert f"{ledger_of(300).epsilon():.4f} (RDP)" in last


def test_a_run_without_privacy_is_told_as_such(tmp_path, capsys):
    run = run_of(tmp_path / "run", ledger_of(is_private=False))
    found = told(capsys, "audit", str(run))["runs"][0]
    assert found["epsilon"] == {"pld": None, "rdp": None}
    assert not found["is_private"]
    assert main(["audit", str(run)]) == 0
    text = capsys.readouterr().out
    assert "∞" in text
    assert "foretold" in text
