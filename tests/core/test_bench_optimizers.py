"""The bench of updates: its rows, its bounds, and what a card shows of measurements."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lightrail.bench import main
from lightrail.bench.optimizers import StillClosure, gpt2_shapes, measure
from lightrail.bench.table import Table
from lightrail.catalogue.signature import schema_of, source_files
from lightrail.traits import Claim, Peer, Traits, traits_of


def test_the_shapes_are_those_of_gpt2() -> None:
    weights = dict(gpt2_shapes(768))
    body = sum(torch.Size(shape).numel() for name, shape in weights.items() if name.startswith(("layers", "norm")))
    assert body == 85_056_000  # GPT-2 small without its embeddings


def test_a_method_stands_beside_adamw_and_its_fastest_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightrail.bench import optimizers

    options = argparse.Namespace(width=16, rounds=2, only=["lion", "smb"], without=["timm"], device="cpu")
    found = optimizers.load
    lion = found("optimizer", "lion")
    peer = Peer("torch.optim.SGD", {"lr": 0.1})
    monkeypatch.setattr(lion, "traits", dataclasses.replace(lion.traits, peers=(peer, Peer("timm.optim.Lion"))))
    table = measure(options)
    rows = {row.name.split(",")[0].strip(): row for row in table.rows}
    assert {"AdamW(foreach)", "AdamW(fused)", "lion", "torch SGD", "lion beside the fastest peer", "smb"} <= set(rows)
    assert "timm Lion" not in rows
    assert rows["lion"].name == "lion, state 1 P"
    assert rows["lion"].bound == pytest.approx(1.3 * 3 / 4, abs=0.01)
    assert rows["smb"].bound is None
    assert rows["lion beside the fastest peer"].bound == 1.0
    assert (table.ratio(rows["lion"]) or 0) > 0


def test_the_bound_is_for_methods_without_matrix_products() -> None:
    from lightrail.bench.optimizers import _is_tensorwise, _Made
    from lightrail.catalogue import load

    found = {name: load("optimizer", name) for name in ("lion", "mars_shampoo", "smb")}
    assert {name: _is_tensorwise(_Made(cls, {}, traits_of(cls))) for name, cls in found.items()} == {
        "lion": True,
        "mars_shampoo": False,
        "smb": False,
    }


def test_ratios_are_taken_beside_the_samples_of_the_same_rounds() -> None:
    table = Table("", "ms", "")
    table.add("peer", [1.0, 1.0])
    table.add("mine", [4.0, 8.0], "peer", beside=[2.0, 4.0])
    assert table.ratio(table.rows[1]) == 2.0


def test_a_closure_that_stands_still_answers_everything() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    closure = StillClosure([p])
    closure()
    assert p.grad is not None
    with closure.at([torch.ones(3)]):
        assert float(closure.loss()) == 0.0
    for answer in (closure.gradient()[1], closure.hvp([p]), closure.sampled(), closure.groups(2)[1]):
        assert answer[0].shape == p.shape


def test_a_bench_writes_its_table_as_a_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "docs" / "table.md"
    words = [
        "optimizers",
        "--width",
        "16",
        "--rounds",
        "1",
        "--only",
        "adamw_is_none",
        "--json",
        str(tmp_path / "a.json"),
    ]
    assert main([*words, "--document", str(document)]) == 0
    text = document.read_text()
    assert text.startswith("Made by `lightrail bench optimizers --width 16")
    assert "AdamW(fused)" in text
    assert "AdamW(fused)" in capsys.readouterr().out


class _Claims(torch.optim.SGD):
    """Promises."""

    traits = Traits(rule="x", paper="y", claim=Claim(sentence="is better"), verified=("by hand",))

    @staticmethod
    def traits_under(options: dict[str, object]) -> Traits:
        return Traits(rule="x", needs_closure=True) if options.get("momentum") else _Claims.traits


def test_options_can_change_what_a_method_needs() -> None:
    assert not traits_of(_Claims).needs_closure
    assert not traits_of(_Claims, {}).needs_closure
    assert traits_of(_Claims, {"momentum": 0.9}).needs_closure


def test_a_card_shows_what_its_package_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("measuring")
    package.__file__ = str(tmp_path / "__init__.py")
    monkeypatch.setitem(sys.modules, "measuring", package)
    monkeypatch.setattr(_Claims, "__module__", "measuring")
    assert str(tmp_path) in source_files(_Claims)
    (tmp_path / "measured.json").write_text(json.dumps({"measuring.Claims": ["is better: reproduces"]}))
    traits = schema_of("optimizer", "measuring.Claims", _Claims).traits
    assert traits["verified"] == ["by hand", "is better: reproduces"]
    assert traits["claim"]["sentence"] == "is better"
    assert str(tmp_path / "measured.json") in source_files(_Claims)
