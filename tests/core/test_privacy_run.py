"""Private runs under the trainer: which records make a step, and what their gradient is without noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from privacy_runs import (
    Module,
    Watch,
    compose,
    flat,
    only,
    points,
    private,
    rows,
    sample_gradients,
    told,
    watched,
)
from torch import Tensor

from lightrail.privacy.audit import audited
from lightrail.privacy.engine import PrivacyEngine

WITHOUT_NOISE = ("privacy.clip_norm=1e6",)
STEADY = ("privacy.deterministic_noise=true",)


def gradients_of(watch: Watch, size: int = 64) -> list[Tensor]:
    """For each step, the gradients of all records at the parameters that it began with."""
    return [sample_gradients(Module(), at, points(size)) for at in watch.before]


def test_every_record_without_noise_is_the_plain_step(tmp_path: Path) -> None:
    plain = watched(compose(tmp_path / "plain", "data.batch_size=64", "trainer.max_steps=4", "trainer.max_epochs=-1"))
    full = watched(
        private(
            tmp_path / "private",
            *WITHOUT_NOISE,
            "privacy.sampling=full",
            "data.batch_size=64",
            "trainer.max_steps=4",
            "trainer.max_epochs=-1",
            noise=0.0,
        )
    )
    assert torch.equal(plain.before[0], full.before[0])
    assert full.sizes == [[64]] * 4
    for a, b in zip(plain.gradients, full.gradients, strict=True):
        # Sums over samples are taken in another order than by autograd.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_a_poisson_batch_is_divided_by_its_expected_size(tmp_path: Path) -> None:
    watch = watched(private(tmp_path, *WITHOUT_NOISE, *STEADY, "trainer.max_steps=6", noise=0.0))
    sizes = [len(each) for each in watch.records]
    assert len(set(sizes)) > 1, "a Poisson batch has no fixed size"
    for gradient, drawn, of_each in zip(watch.gradients, watch.records, gradients_of(watch), strict=True):
        torch.testing.assert_close(gradient, of_each[drawn].sum(0) / 8, rtol=1e-5, atol=1e-7)


def test_clipping_bounds_each_record(tmp_path: Path) -> None:
    watch = watched(private(tmp_path, "privacy.clip_norm=0.1", *STEADY, "trainer.max_steps=3", noise=0.0))
    for gradient, drawn, of_each in zip(watch.gradients, watch.records, gradients_of(watch), strict=True):
        mine = of_each[drawn]
        clipped = mine * (0.1 / mine.norm(dim=1, keepdim=True)).clamp_max(1.0)
        torch.testing.assert_close(gradient, clipped.sum(0) / 8, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("most", [1, 3])
def test_any_size_of_micro_batches_gives_the_same_run(tmp_path: Path, most: int) -> None:
    whole, cut = (
        watched(private(tmp_path / name, *STEADY, f"privacy.max_physical_batch={size}", "optimizer.lr=0.1"))
        for name, size in (("whole", 64), ("cut", most))
    )
    assert [len(each) for each in whole.sizes] == [1] * 8
    assert max(size for sizes in cut.sizes for size in sizes) <= most
    assert whole.records == cut.records
    for a, b in zip(whole.gradients, cut.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_one_by_one_equals_one_pass(tmp_path: Path) -> None:
    one_pass, one_by_one = (
        watched(private(tmp_path / engine, *STEADY, f"privacy.engine={engine}", "optimizer.lr=0.1"))
        for engine in ("one_pass", "one_by_one")
    )
    assert not any(one_pass.early), "a callback saw a gradient before it was private"
    assert not any(one_by_one.early), "a callback saw a gradient before it was private"
    for a, b in zip(one_pass.gradients, one_by_one.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_step_without_records_happens_and_is_accounted(tmp_path: Path) -> None:
    run = private(tmp_path, *STEADY, "data.batch_size=1", "data.size=40", "optimizer.lr=0.01")
    watch = watched(run)
    empty = [not drawn for drawn in watch.records]
    assert 0 < sum(empty) < 40
    assert len(watch.gradients) == 40
    assert all(gradient.std() > 0.5 for gradient, is_empty in zip(watch.gradients, empty, strict=True) if is_empty)
    assert told(only(tmp_path))["events"] == [{"noise": 1.0, "steps": 40, "batch": 1, "records": 40}]


@pytest.mark.parametrize("engine", ["one_pass", "one_by_one"])
def test_the_first_steps_may_have_no_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    def given(self: Any, count: int, step: int) -> Tensor:
        return torch.arange(count) % 8 == 2 if step >= 2 else torch.zeros(count, dtype=torch.bool)

    monkeypatch.setattr(PrivacyEngine, "drawn", given)
    options = (f"privacy.engine={engine}", "trainer.max_steps=4", *WITHOUT_NOISE)
    watch = watched(private(tmp_path, *options, noise=0.0))
    records = list(range(2, 64, 8))
    assert watch.records == [[], [], records, records]
    for gradient, drawn, of_each in zip(watch.gradients, watch.records, gradients_of(watch), strict=True):
        torch.testing.assert_close(gradient, of_each[drawn].sum(0) / 8, rtol=1e-5, atol=1e-7)


def test_sizes_of_batches_are_those_of_coins(tmp_path: Path) -> None:
    run = private(tmp_path, *STEADY, "trainer.max_steps=320", "trainer.max_epochs=-1", "optimizer.lr=0", "logger=[]")
    sizes = torch.tensor([float(len(each)) for each in watched(run).records])
    assert len(sizes) == 320
    mean, variance = 8.0, 64 * (1 / 8) * (7 / 8)
    assert abs(float(sizes.mean()) - mean) < 4 * (variance / 320) ** 0.5
    assert abs(float(sizes.var()) / variance - 1) < 4 * (2 / 320) ** 0.5


@pytest.mark.parametrize(("size", "batch", "steps"), [(93, 1, 93), (100, 32, 3), (70, 20, 4), (5, 8, 1)])
def test_steps_of_an_epoch_and_rate_are_whole_numbers(tmp_path: Path, size: int, batch: int, steps: int) -> None:
    run = private(tmp_path, f"data.size={size}", f"data.batch_size={batch}", "optimizer.lr=0.01", "logger=[]")
    assert run.execute(show_progress=False).summary["steps"] == steps
    event = {"noise": 1.0, "steps": steps, "batch": min(batch, size), "records": size}
    assert told(only(tmp_path))["events"] == [event]


def test_a_limit_is_in_steps(tmp_path: Path) -> None:
    run = private(tmp_path, "trainer.limit_train_batches=3", "trainer.max_epochs=2", "privacy.max_physical_batch=2")
    assert len(watched(run).gradients) == 6
    assert told(only(tmp_path))["events"][0]["steps"] == 6


def test_fixed_batches_take_every_record_once_and_amplify_nothing(tmp_path: Path) -> None:
    watch = watched(private(tmp_path, "privacy.sampling=shuffle", "data.size=70", "trainer.max_epochs=2"))
    epochs = [[record for each in part for record in each] for part in (watch.records[:9], watch.records[9:])]
    assert [sorted(each) for each in epochs] == [list(range(70))] * 2
    assert epochs[0] != epochs[1]
    ledger = told(only(tmp_path))
    assert ledger["events"] == ledger["planned"] == [{"noise": 1.0, "steps": 2, "batch": 70, "records": 70}]
    assert ledger["adjacency"] == "zero out one record"


def test_fixed_batches_with_a_limit_leave_the_rest_out(tmp_path: Path) -> None:
    watch = watched(private(tmp_path, "privacy.sampling=shuffle", "trainer.limit_train_batches=2"))
    assert [len(each) for each in watch.records] == [8, 8]


def test_workers_may_load_ahead(tmp_path: Path) -> None:
    run = private(tmp_path, "data.num_workers=1", "trainer.max_steps=5", "trainer.max_epochs=-1", "logger=[]")
    assert len(watched(run).gradients) == 5


def test_what_is_told_agrees_everywhere(tmp_path: Path) -> None:
    run = private(tmp_path, "optimizer.lr=0.01")
    summary = run.execute(show_progress=False).summary
    folder = only(tmp_path)
    ledger, logged = told(folder), rows(folder)
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False)["lightrail"]["privacy"]
    assert saved["events"] == ledger["events"] == [{"noise": 1.0, "steps": 8, "batch": 8, "records": 64}]
    assert told(folder, "summary.json")["privacy"] == summary["privacy"]
    assert summary["privacy"]["epsilon"] == ledger["epsilon"] == ledger["planned_epsilon"]
    assert float(logged[-1]["epsilon"]) == pytest.approx(ledger["epsilon"], rel=1e-2)
    assert all(not state for state in saved["sources"][0]), "a secret generator was saved"
    for place in (folder, folder / "checkpoints" / "last.ckpt"):
        audit = audited(str(place))
        assert [each.to_dict() for each in audit.ledger.events] == ledger["events"]
        assert audit.spent["rdp"] == pytest.approx(ledger["epsilon"], rel=1e-3)
    # What is logged of sizes is what is expected.
    assert {row["batch_size"] for row in logged if row["batch_size"]} == {"8"}


def test_figures_of_the_training_data_can_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = private(tmp_path, "privacy.public_metrics=false", "optimizer.lr=0.01", "trainer.log_every_n_steps=1")
    result = run.execute(show_progress=True)
    folder = only(tmp_path)
    assert not [name for name in (*rows(folder)[0], *result.metrics) if name.startswith("train")]
    assert "train_" not in capsys.readouterr().err
    assert "train_" not in (folder / "report.html").read_text()
    assert any(row["epsilon"] for row in rows(folder))


def test_figures_of_the_training_data_are_logged_unless_told_otherwise(tmp_path: Path) -> None:
    private(tmp_path, "optimizer.lr=0.01").execute(show_progress=False)
    assert {"train_loss", "epsilon"} <= set(rows(only(tmp_path))[0])


def test_the_noise_is_calibrated_for_the_whole_run(tmp_path: Path) -> None:
    run = compose(tmp_path, "+privacy=dp_sgd", "privacy.epsilon=3", "privacy.accountant=rdp", "optimizer.lr=0.01")
    run.execute(show_progress=False)
    ledger = told(only(tmp_path))
    assert 2.9 < ledger["epsilon"] <= 3.0
    assert ledger["delta"] == 1e-3
    assert flat(run.task).isfinite().all()
