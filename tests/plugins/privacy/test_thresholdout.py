"""Thresholdout: its rule, its ledger, and what a run under it lets out."""

from __future__ import annotations

import csv
import json
import math
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightrail
from lightrail.errors import CompositionError, ConfigurationError, DataError
from lightrail_privacy.thresholdout import Thresholdout
from lightrail_privacy.thresholdout_rule import BudgetExhausted, ThresholdoutRule, laplace, shared_rule

# The rule.


def test_the_same_on_both_sides_is_answered_from_training_and_costs_nothing() -> None:
    # The noise reaches the threshold once in e⁵⁰ questions.
    rule = ThresholdoutRule(threshold=0.2, scale=0.001, budget=3)
    for value in np.linspace(0, 1, 500):
        assert rule.ask(float(value), float(value)) == value
    assert rule.left == 3
    assert rule.queries == 500


def test_without_noise_the_rule_is_a_comparison() -> None:
    rule = ThresholdoutRule(threshold=0.1, scale=0.0, budget=2)
    assert rule.ask(hold=0.5, train=0.59) == 0.59
    assert rule.ask(hold=0.5, train=0.61) == 0.5
    assert rule.ask(hold=0.61, train=0.5) == 0.61
    assert (rule.left, rule.queries, rule.noisy_threshold) == (0, 3, 0.1)


def test_a_spent_budget_answers_nothing() -> None:
    rule = ThresholdoutRule(threshold=0.1, scale=0.0, budget=1)
    rule.ask(0.1, 0.9)
    for hold in (0.1, 0.9):
        with pytest.raises(BudgetExhausted) as error:
            rule.ask(hold, 0.9)
    assert "budget of 1" in error.value.found
    assert rule.queries == 1


def test_the_noise_is_laplace_of_the_scale() -> None:
    drawn = [laplace(0.5) for _ in range(20_000)]
    assert stats.kstest(drawn, "laplace", args=(0, 0.5)).pvalue > 1e-7
    for wrong in (0.45, 0.55):
        assert stats.kstest(drawn, "laplace", args=(0, wrong)).pvalue < 1e-4


def test_threshold_question_and_answer_have_noise_of_two_four_and_one_times_the_scale() -> None:
    s = 0.01
    thresholds = [ThresholdoutRule(0.3, s).noisy_threshold or 0 for _ in range(5000)]
    assert stats.kstest(thresholds, "laplace", args=(0.3, 2 * s)).pvalue > 1e-7
    rule = ThresholdoutRule(0.3, s, budget=10_000)
    answers = [rule.ask(hold=1.0, train=0.0) for _ in range(5000)]
    assert stats.kstest(answers, "laplace", args=(1.0, s)).pvalue > 1e-7
    # P(0 > T + Lap(4s)) for T = 8s and a T̂ without noise is exp(−2) / 2.
    spent = 0
    for _ in range(5000):
        rule = ThresholdoutRule(8 * s, s, budget=1, noisy_threshold=8 * s)
        rule.ask(0.5, 0.5)
        spent += rule.left == 0
    assert stats.binomtest(spent, 5000, math.exp(-2) / 2).pvalue > 1e-7


def test_an_answer_draws_a_new_threshold() -> None:
    rule = ThresholdoutRule(threshold=0.1, scale=0.001)
    before = rule.noisy_threshold
    rule.ask(0.5, 0.5)
    assert rule.noisy_threshold == before
    rule.ask(0.1, 0.9)
    assert rule.noisy_threshold != before


def test_a_rule_goes_on_from_its_state() -> None:
    rule = ThresholdoutRule(threshold=0.1, scale=0.02, budget=30, is_deterministic=True)
    rule.ask(0.1, 0.9)
    again = ThresholdoutRule(**json.loads(json.dumps(rule.state_dict())))
    questions = [(0.1 * k, 0.5) for k in range(10)]
    assert [rule.ask(*question) for question in questions] == [again.ask(*question) for question in questions]
    assert rule == again


def _chosen_by_agreement(guards: bool, n: int = 4000, d: int = 1000, kept: int = 100) -> tuple[float, float]:
    """What is reported of a vote of features that were chosen on pure noise, and what is true of it."""
    generator = np.random.default_rng(0)
    draw = lambda *shape: 2.0 * generator.integers(0, 2, size=shape, dtype=np.int8) - 1  # noqa: E731
    x, y = [draw(n, d) for _ in range(3)], [draw(n) for _ in range(3)]
    train, hold = (0.5 + x[side].T @ y[side] / (2 * n) for side in (0, 1))
    rule = ThresholdoutRule(4 / math.sqrt(n), 0.25 / math.sqrt(n), budget=100)
    if guards:
        hold = np.array([rule.ask(*pair) for pair in zip(hold.tolist(), train.tolist(), strict=True)])
    agreement = np.minimum(abs(train - 0.5), abs(hold - 0.5)) * ((train - 0.5) * (hold - 0.5) > 0)
    best = np.argsort(-agreement)[:kept]
    accuracy = [
        float(((a[:, best] @ np.sign(train[best] - 0.5) > 0) == (b > 0)).mean()) for a, b in zip(x, y, strict=True)
    ]
    return rule.ask(accuracy[1], accuracy[0]) if guards else accuracy[1], accuracy[2]


def test_the_held_out_data_are_overfitted_without_it_and_not_with_it() -> None:
    reported, true = _chosen_by_agreement(guards=False)
    assert reported > true + 0.07
    reported, true = _chosen_by_agreement(guards=True)
    assert abs(reported - true) < 0.05


# The ledger.


def _ask_shared(path: Path, times: int) -> None:
    for _ in range(times):
        with shared_rule(path, ThresholdoutRule(0.1, 0.0, budget=100)) as rule:
            rule.ask(0.1, 0.9)


def test_processes_share_one_budget(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "ledger.json"
    processes = [get_context("fork").Process(target=_ask_shared, args=(path, 20)) for _ in range(3)]
    for each in processes:
        each.start()
    for each in processes:
        each.join()
    found = json.loads(path.read_text())
    assert (found["left"], found["queries"]) == (40, 60)


def test_the_noisy_threshold_is_shared(tmp_path: Path) -> None:
    with shared_rule(tmp_path / "ledger.json", ThresholdoutRule(0.1, 0.01)) as first:
        kept = first.noisy_threshold
    with shared_rule(tmp_path / "ledger.json", ThresholdoutRule(0.1, 0.01)) as second:
        assert second.noisy_threshold == kept


def test_a_ledger_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    _ask_shared(path, 1)
    with pytest.raises(ConfigurationError, match="another budget"), shared_rule(path, ThresholdoutRule(0.1, 0.0, 7)):
        pass
    assert json.loads(path.read_text())["left"] == 99
    for text in ("no json", "{}", '{"threshold": 1, "scale": 0, "other": 2}', "[]"):
        path.write_text(text)
        with pytest.raises(DataError), shared_rule(path, ThresholdoutRule(0.1, 0.0)):
            pass
        assert path.read_text() == text


# Under Lightning.


class Guessing(LightningModule):
    """Says the same of everything, so that what is measured is known: 0.75 right in training, 0.25 held out."""

    monitor: tuple[str, str] = ("val_accuracy", "max")

    def __init__(self, as_metric: bool = True) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)
        self.accuracy = MulticlassAccuracy(2, average="micro") if as_metric else None
        self.gathered: list[int] = []
        self.sizes: list[int] = []

    def _data(self, right: int) -> DataLoader[Any]:
        labels = torch.tensor([0] * right + [1] * (16 - right))
        return DataLoader(TensorDataset(torch.ones(16, 2), labels), 5, shuffle=right == 12)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._data(12)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._data(4)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._data(4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        guess = torch.zeros_like(batch[1])
        self.gathered.append(len(guess))
        self.log("val_loss", self.net(batch[0]).sum(), on_step=True, on_epoch=True)
        if self.accuracy is None:
            self.log("val_accuracy", (guess == batch[1]).float().mean(), prog_bar=True)
        else:
            self.accuracy.update(guess, batch[1])
            self.log("val_accuracy", self.accuracy, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        self.sizes.append(sum(self.gathered))
        self.gathered.clear()
        self.log("val_acc_of_all", 0.25)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_accuracy", (batch[1] == 0).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Watching(Callback):
    """Notes whatever anybody could read of the validation."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def _look(self, trainer: Trainer, *rest: Any) -> None:
        for read in (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics):
            self.seen.append({name: float(value) for name, value in read.items() if name.startswith("val")})

    on_validation_batch_end = on_validation_epoch_end = on_validation_end = _look  # type: ignore[assignment]


def _fitted(tmp_path: Path, guard: Thresholdout, module: Guessing | None = None, **options: Any) -> tuple[Trainer, Any]:
    watching = Watching()
    options = {"max_epochs": 3, "callbacks": [], "logger": False, **options}
    trainer = Trainer(
        **{**options, "callbacks": [guard, *options["callbacks"], watching]},
        default_root_dir=tmp_path,
        accelerator="cpu",
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
    )
    trainer.fit(module or Guessing())
    return trainer, watching


@pytest.mark.parametrize("as_metric", [True, False])
def test_everybody_is_told_the_training_value_where_the_two_agree(tmp_path: Path, as_metric: bool) -> None:
    guard = Thresholdout(threshold=0.6, scale=0.0)
    trainer, watching = _fitted(tmp_path, guard, Guessing(as_metric), logger=CSVLogger(tmp_path))
    assert all(seen.get("val_accuracy", 0.75) == pytest.approx(0.75) for seen in watching.seen)
    assert {name for seen in watching.seen for name in seen} == {"val_accuracy"}
    assert float(trainer.callback_metrics["val_accuracy"]) == pytest.approx(0.75)
    assert guard.guards() == {"thresholdout": {"budget": 100, "left": 100, "queries": 3}}
    assert guard.logged() == {"left": 100, "queries": 3}
    assert trainer.logger is not None
    rows = list(csv.DictReader((Path(trainer.logger.log_dir or "") / "metrics.csv").open()))
    assert [float(row["val_accuracy"]) for row in rows if row.get("val_accuracy")] == pytest.approx([0.75] * 3)
    assert not any("loss" in name for name in rows[0])


def test_the_held_out_value_where_they_do_not_at_the_cost_of_one(tmp_path: Path) -> None:
    guard = Thresholdout(threshold=0.4, scale=0.0, budget=5)
    trainer, _ = _fitted(tmp_path, guard)
    assert float(trainer.callback_metrics["val_accuracy"]) == 0.25
    assert guard.guards()["thresholdout"] == {"budget": 5, "left": 2, "queries": 3}


def test_a_spent_budget_ends_the_run_and_lets_nothing_out(tmp_path: Path) -> None:
    trainers: list[Trainer] = []

    class Keeping(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainers.append(trainer)

    guard = Thresholdout(threshold=0.4, scale=0.1, budget=2, deterministic=True, metrics=["val_accuracy"])
    guard.load_state_dict({**ThresholdoutRule(0.4, 0.0, budget=2).state_dict()})
    with pytest.raises(BudgetExhausted):
        _fitted(tmp_path, guard, callbacks=[Keeping()])
    assert guard.guards()["thresholdout"]["left"] == 0
    assert set(trainers[0].callback_metrics) <= {"val_accuracy"}
    assert "val_loss" not in trainers[0].logged_metrics


def test_default_threshold_and_scale_come_from_the_number_of_held_out_samples(tmp_path: Path) -> None:
    guard = Thresholdout(deterministic=True)
    _fitted(tmp_path, guard, max_epochs=1)
    assert guard.rule is not None
    assert (guard.rule.threshold, guard.rule.scale) == (1.0, 0.25)
    assert guard._loader is not None
    assert len(guard._loader.dataset) == 16  # type: ignore[arg-type]


def test_answers_stay_between_0_and_1(tmp_path: Path) -> None:
    _, watching = _fitted(tmp_path, Thresholdout(threshold=0.0, scale=5.0, budget=1000), max_epochs=20)
    values = {seen["val_accuracy"] for seen in watching.seen if seen}
    assert all(0 <= value <= 1 for value in values)
    assert {0.0, 1.0} & values


def test_training_is_the_same_as_without_it(tmp_path: Path) -> None:
    after = []
    for guard in (Thresholdout(), Callback()):
        torch.manual_seed(0)
        module = Guessing()
        _fitted(tmp_path, guard, module)  # type: ignore[arg-type]
        assert module.sizes == [16] * 3
        assert module.accuracy is not None
        after.append(torch.rand(3))
        assert "log" not in vars(module)
    assert torch.equal(*after)


@pytest.mark.parametrize(("threshold", "left"), [(0.4, 1), (0.6, 5)])
def test_the_budget_survives_a_checkpoint(tmp_path: Path, threshold: float, left: int) -> None:
    guard = Thresholdout(threshold=threshold, scale=0.001, budget=5)
    trainer, _ = _fitted(tmp_path, guard)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = Thresholdout(threshold=threshold, scale=0.001, budget=5)
    again_trainer = Trainer(
        max_epochs=4, callbacks=[again], logger=False, accelerator="cpu", enable_progress_bar=False,
        enable_checkpointing=False, num_sanity_val_steps=0,
    )  # fmt: skip
    again_trainer.fit(Guessing(), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)
    assert guard.rule is not None
    assert again.rule is not None
    assert again.guards()["thresholdout"]["queries"] == 4
    assert again.rule.left == left
    # What has not been spent since is the same noisy threshold.
    assert (again.rule.noisy_threshold == guard.rule.noisy_threshold) is (left == 5)


def test_two_runs_share_one_budget(tmp_path: Path) -> None:
    make = lambda: Thresholdout(threshold=0.4, scale=0.0, budget=5, ledger=str(tmp_path / "ledger.json"))  # noqa: E731
    first = make()
    _fitted(tmp_path, first)
    second = make()
    # A checkpoint of the past does not set a ledger back.
    second.load_state_dict(ThresholdoutRule(0.4, 0.0, budget=5).state_dict())
    with pytest.raises(BudgetExhausted):
        _fitted(tmp_path, second)
    assert first.guards()["thresholdout"]["left"] == 2
    assert second.guards()["thresholdout"] == {"budget": 5, "left": 0, "queries": 5}


# Mistakes.


def test_what_is_selected_by_has_to_be_guarded(tmp_path: Path) -> None:
    module = Guessing()
    module.monitor = ("val_loss", "min")
    with pytest.raises(CompositionError, match="best checkpoint goes by 'val_loss'"):
        _fitted(tmp_path, Thresholdout(), module)
    with pytest.raises(CompositionError, match="EarlyStopping goes by 'val_loss'"):
        _fitted(tmp_path, Thresholdout(), callbacks=[EarlyStopping("val_loss")])


def test_early_stopping_reads_the_answer(tmp_path: Path) -> None:
    stopping = EarlyStopping("val_accuracy", mode="max", patience=50)
    _fitted(tmp_path, Thresholdout(threshold=0.6, scale=0.0), callbacks=[stopping])
    assert float(stopping.best_score) == 0.75


def test_metrics_that_cannot_be_guarded_are_told(tmp_path: Path) -> None:
    for metrics, told in ((["val_accuracy", "val_f1"], "val_f1"), (["val_accuracy", "val_acc_of_all"], "val_acc")):
        with pytest.raises(ConfigurationError, match=told):
            _fitted(tmp_path, Thresholdout(metrics=metrics))
    module = Guessing()
    module.net.weight.data.fill_(3.0)
    with pytest.raises(ConfigurationError, match="'val_loss' cannot be guarded"):
        _fitted(tmp_path, Thresholdout(metrics=["val_accuracy", "val_loss"]), module)


@pytest.mark.parametrize("options", [{"budget": 0}, {"threshold": -0.1}, {"scale": math.inf}, {"budget": 1.5}])
def test_options_out_of_range_are_told(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Thresholdout(**options)


# In a whole run.


def test_a_run_shows_answers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    guard = ["callback=[lightrail_privacy.thresholdout.Thresholdout]"]
    small = ["model=mlp", "data=digits", "trainer.max_epochs=2", "trainer.accelerator=cpu", "logger=[csv]"]
    result = lightrail.compose([*small, *guard]).execute(show_progress=False)
    names = set(result.metrics)
    assert "val_accuracy" in names
    assert not [name for name in names if name.startswith("val") and name != "val_accuracy"]
    assert {"test_accuracy", "test_loss"} <= names
    text = (result.folder / "metrics.csv").read_text()
    assert "val_accuracy" in text
    assert "val_loss" not in text
    assert result.summary["monitor"]["name"] == "val_accuracy"
