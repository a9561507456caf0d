"""Claims: equal budgets, the search for a rate, what counts as borne out, and what is written down."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightrail.bench.claims import measure
from lightrail.bench.claims.document import Document
from lightrail.bench.claims.outcome import Trial
from lightrail.bench.claims.problem import CountedClosure
from lightrail.bench.claims.record import Measured, read_record, write_record
from lightrail.bench.claims.trial import run_trial
from lightrail.bench.claims.tuning import search
from lightrail.bench.claims.verdict import compare, verdict
from lightrail.traits import Claim


def trial(*merits: float) -> Trial:
    return Trial(tuple(10.0 * i for i in range(len(merits))), merits)


def test_a_closure_counts_a_hessian_vector_product_twice_and_a_bare_loss_a_third() -> None:
    w = torch.nn.Parameter(torch.ones(2))
    closure = CountedClosure(lambda: (w**2).sum(), [w])
    closure()
    assert closure.passes == 1
    closure.hvp([torch.ones(2)])
    assert closure.passes == 3
    closure.loss()
    assert closure.passes == pytest.approx(3 + 1 / 3)


def test_the_search_climbs_by_decades_then_halves_and_keeps_to_its_trials() -> None:
    best, tried = search(lambda lr: (math.log10(lr) - 1.4) ** 2, start=1e-3, trials=8)
    assert len(tried) == 8
    assert best == pytest.approx(10**1.5, rel=1e-3)
    assert {1e-3, 1e-2, 1e-1, 1.0, 10.0} <= set(tried)


def test_the_search_goes_down_from_where_everything_diverges() -> None:
    best, tried = search(lambda lr: math.inf if lr > 1e-4 else 1 + lr, start=1e-2, trials=5)
    assert best < 1e-4
    assert len(tried) == 5


def test_passes_to_a_merit_lie_between_two_marks() -> None:
    assert trial(4, 2, 1).passes_to(3) == 5.0
    assert trial(4, 2, 1).passes_to(0.5) == math.inf
    assert trial(math.inf, 2, 1).passes_to(3) == 10.0


@pytest.mark.parametrize(
    ("mine", "expected"),
    [
        ((0.8, 0.9, 0.85), "reproduces"),
        ((1.2, 1.1, 1.15), "does not reproduce"),
        ((0.7, 1.3, 1.0), "cannot be seen at this size"),
        ((math.inf, 0.5, 0.5), "does not reproduce"),
    ],
)
def test_a_lower_loss_is_seen_only_beyond_the_noise(mine: tuple[float, ...], expected: str) -> None:
    found = compare([trial(3, value) for value in mine], [trial(3, 1.0)] * 3, 10)
    assert verdict(Claim(sentence="lower"), found) == expected


def test_as_good_allows_a_margin() -> None:
    found = compare([trial(3, value) for value in (1.01, 1.011, 1.009)], [trial(3, 1.0)] * 3, 10)
    assert verdict(Claim(sentence="as good", margin=0.02), found) == "reproduces"
    assert verdict(Claim(sentence="lower"), found) == "does not reproduce"


@pytest.mark.parametrize(
    ("merits", "expected"),
    [
        ((3, 0.9, 0.9, 0.9), "reproduces"),
        ((3, 1.5, 0.9, 0.9), "cannot be seen at this size"),
        ((3, 2, 2, 2), "does not reproduce"),
    ],
)
def test_speed_is_the_share_of_the_passes_to_the_baseline(merits: tuple[float, ...], expected: str) -> None:
    found = compare([trial(*merits)] * 3, [trial(3, 2, 1.5, 1.0)] * 3, 30)
    assert verdict(Claim(sentence="half the steps", steps=0.5), found) == expected


def test_a_trial_spends_its_passes_and_repeats_itself() -> None:
    first, second = (run_trial("saddle", "optimizer", "sgd", {"lr": 0.5}, seed=3) for _ in range(2))
    assert first == second
    assert first.passes[-1] == 300
    assert first.final < 0.1 * first.merits[0]
    assert run_trial("saddle", "optimizer", "sgd", {"lr": 0.5}, seed=4) != first


def test_extra_evaluations_are_paid_from_the_same_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightrail.bench.claims import trial as module

    spent: list[float] = []

    class Spends(torch.optim.SGD):
        def step(self, closure: CountedClosure) -> Tensor:  # type: ignore[override]
            loss = closure()
            closure.gradient()
            spent.append(closure.passes)
            return loss

    found = module.load
    monkeypatch.setattr(module, "load", lambda kind, name: Spends if name == "spends" else found(kind, name))
    run_trial("saddle", "optimizer", "spends", {"lr": 0.5}, seed=3)
    assert sum(spent) == 300
    assert len(spent) == 150


def test_a_trial_that_diverges_ends_at_infinity() -> None:
    found = run_trial("saddle", "optimizer", "sgd", {"lr": 1e6}, seed=3)
    assert found.final == math.inf
    assert found.passes[-1] == 300


def test_a_record_comes_back_from_its_file(tmp_path: Path) -> None:
    measured = Measured("optimizer", "saddle", "sgd", {"momentum": 0.9}, "abc", 0.1, (trial(3, 1), trial(3, math.inf)))
    write_record(tmp_path / "record.json", {measured.key: measured})
    assert read_record(tmp_path / "record.json") == {measured.key: measured}
    assert read_record(tmp_path / "none.json") == {}


def test_the_document_says_what_was_found_and_fills_the_cards(tmp_path: Path) -> None:
    record = [
        Measured("optimizer", "docs_lm", "adamw", rate=1e-3, trials=(trial(3, 1.0), trial(3, 1.1))),
        Measured("optimizer", "docs_lm", "lion", rate=1e-4, trials=(trial(3, 0.5), trial(3, 0.6))),
    ]
    document = Document("optimizer", {each.key: each for each in record}, trials=6, seeds=2)
    document.write(tmp_path)
    text = (tmp_path / "optimizer.md").read_text()
    assert "| lion | 0.0001 | 0.5500 ± 0.0707 | -0.5000 ± 0.0000 |" in text
    assert "reproduces" in text
    assert (tmp_path / "optimizer.svg").read_text().lstrip().startswith("<?xml")
    cards = tmp_path / "measured.json"
    cards.write_text(json.dumps({"another.Method": ["stays"]}))
    document.write_cards(cards)
    found = json.loads(cards.read_text())
    assert found["another.Method"] == ["stays"]
    assert "reproduces (docs_lm: -0.5000" in found["lightrail_optimizers.lion.Lion"][0]


def test_a_card_names_the_options_under_which_a_verdict_holds(tmp_path: Path) -> None:
    options = {"adamw_lr": 3e-3}
    record = [
        Measured("optimizer", "docs_lm", "adamw", rate=1e-3, trials=(trial(3, 1.0), trial(3, 1.1))),
        Measured("optimizer", "docs_lm", "muon", options, rate=1e-2, trials=(trial(3, 0.5), trial(3, 0.6))),
    ]
    cards = tmp_path / "measured.json"
    Document("optimizer", {each.key: each for each in record}, trials=6, seeds=2).write_cards(cards)
    assert "(docs_lm adamw_lr=0.003: -0.5" in json.loads(cards.read_text())["lightrail_optimizers.muon.Muon"][0]


def test_what_is_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightrail.bench import claims

    options = argparse.Namespace(kind="optimizer", only=["lion"], trials=1, seeds=1, cards=None)
    options.folder, options.processes = tmp_path, 1
    done = [
        dataclasses.replace(each, rate=0.1, trials=(trial(3, 1.0),)) for each in claims._wanted("optimizer", ["lion"])
    ]
    assert {each.method for each in done} == {"lion", "adamw"}
    write_record(tmp_path / "optimizer.json", {each.key: each for each in done})
    monkeypatch.setattr(claims, "_measure", lambda *_: pytest.fail("measured again"))
    assert "lion" in measure(options).text()
