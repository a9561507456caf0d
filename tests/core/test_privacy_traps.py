"""What has gone wrong in private training elsewhere, and must not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from privacy_models import Partly
from privacy_runs import PRIVATE, Module, compose, flat, only, points, private, sample_gradients, told, watched

import lightrail
from lightrail.errors import ClosureError, CompositionError, ConfigurationError, UserError

STEADY = "privacy.deterministic_noise=true"


def refused(tmp_path: Path, words: str, *overrides: str, data: str = "privacy_runs.Untouchable", **names: Any) -> Any:
    """The error of a run that touches no data."""
    with pytest.raises(UserError, match=words) as error:
        private(tmp_path, *overrides, data=data, **names).execute(show_progress=False)
    assert not list(tmp_path.glob("*/checkpoints/*.ckpt"))
    return error.value


# The noise is there.


def test_enough_noise_destroys_what_is_learned(tmp_path: Path) -> None:
    exact, noisy = (
        private(tmp_path / f"{noise:g}", "trainer.max_epochs=3", "logger=[]", noise=noise).execute(show_progress=False)
        for noise in (0.0, 1e4)
    )
    assert exact.metrics["val_accuracy"] > 0.8
    assert noisy.metrics["val_loss"] > 10 * exact.metrics["val_loss"]


def test_the_noise_has_its_size_in_every_step(tmp_path: Path) -> None:
    run = private(tmp_path, "optimizer.lr=0", "privacy.clip_norm=1e-9", "trainer.max_epochs=4", "logger=[]", noise=3e9)
    gradients = torch.stack(watched(run).gradients)
    # Divided by the expected size of a batch, 8: clip_norm · noise / 8.
    count = gradients.numel()
    assert abs(float((gradients * 8 / 3).square().mean()) - 1) < 4 * (2 / count) ** 0.5
    lagged = (gradients[1:] * gradients[:-1]).mean() * 64 / 9
    assert abs(float(lagged)) < 4 / count**0.5


def test_neither_noise_nor_records_follow_from_the_seed(tmp_path: Path) -> None:
    first, second = (watched(private(tmp_path / name, "seed=3")) for name in "ab")
    assert torch.equal(first.before[0], second.before[0])
    assert not torch.equal(first.gradients[0], second.gradients[0])
    assert first.records != second.records


def test_noise_from_the_seed_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = private(tmp_path, STEADY)
    run.execute(show_progress=False)
    assert any("NOT private" in note for note in run.notes)
    ledger = told(only(tmp_path))
    assert ledger["is_private"] is False
    assert ledger["epsilon"] is None
    assert told(only(tmp_path), "summary.json")["privacy"]["private"] is False
    assert "no: the noise is zero or can be foretold" in capsys.readouterr().err


# What sees the gradient.


def test_the_trainers_clipping_acts_on_the_private_gradient(tmp_path: Path) -> None:
    run = private(tmp_path, STEADY, "+trainer.gradient_clip_val=1e-3", "optimizer.lr=1")
    watch = watched(run)
    steps = [b - a for a, b in zip(watch.before, [*watch.before[1:], flat(run.task)], strict=True)]
    assert min(gradient.norm() for gradient in watch.gradients) > 0.1
    for step, gradient in zip(steps, watch.gradients, strict=True):
        torch.testing.assert_close(step, -1e-3 * gradient / gradient.norm(), rtol=1e-2, atol=1e-6)


def test_nobody_sees_a_gradient_before_it_is_private(tmp_path: Path) -> None:
    one_pass = watched(private(tmp_path / "1", "trainer.max_steps=2"))
    one_by_one = watched(private(tmp_path / "2", "trainer.max_steps=2", "privacy.engine=one_by_one"))
    run = private(tmp_path / "3", "trainer.max_steps=2", task="privacy_models.Partly", is_own=True)
    partly = watched(run)
    assert not any(one_pass.early + one_by_one.early + partly.early)
    assert partly.gradients[0].numel() == sum(p.numel() for p in Partly().net[2].parameters())
    assert all(p.grad is None for p in run.task.get_submodule("net.0").parameters())


def test_optimizers_transforms_and_schedules_work_on_it(tmp_path: Path) -> None:
    run = compose(
        tmp_path, *PRIVATE, "privacy.noise=1", "optimizer=adamw", "schedule=cosine", "+transform=[centralize,clip_norm]"
    )
    assert run.execute(show_progress=False).summary["steps"] == 8


# Single records.


@pytest.mark.parametrize("engine", ["one_pass", "one_by_one"])
def test_a_record_that_is_not_finite_only_takes_itself_out(tmp_path: Path, engine: str) -> None:
    options = ("privacy.sampling=full", f"privacy.engine={engine}", "trainer.max_epochs=2", "optimizer.lr=0.1")
    watch = watched(private(tmp_path, *options, "data.poisoned=1", noise=0.0))
    assert len(watch.gradients) == 2
    others = [i for i in range(64) if i != 1]
    for gradient, at in zip(watch.gradients, watch.before, strict=True):
        mine = sample_gradients(Module(), at, points())[others]
        clipped = mine * (1.0 / mine.norm(dim=1, keepdim=True)).clamp_max(1.0)
        torch.testing.assert_close(gradient, clipped.sum(0) / 64, rtol=1e-4, atol=1e-6)


def test_a_record_whose_gradient_is_infinite_only_takes_itself_out(tmp_path: Path) -> None:
    watch = watched(private(tmp_path, "privacy.sampling=full", task="privacy_models.Exploding", noise=0.0))
    mine = sample_gradients(Module(), watch.before[0], points())[[i for i in range(64) if i != 1]]
    clipped = mine * (1.0 / mine.norm(dim=1, keepdim=True)).clamp_max(1.0)
    torch.testing.assert_close(watch.gradients[0], clipped.sum(0) / 64, rtol=1e-4, atol=1e-6)


def test_records_none_of_which_is_finite_leave_the_noise(tmp_path: Path) -> None:
    run = private(tmp_path, "task.all_of_them=true", task="privacy_models.Exploding")
    watch = watched(run)
    assert len(watch.gradients) == 8
    assert all(gradient.isfinite().all() for gradient in watch.gradients)
    assert all(gradient.abs().sum() > 0 for gradient in watch.gradients)


def test_unused_parameters_get_noise_and_frozen_ones_none(tmp_path: Path) -> None:
    run = private(tmp_path, "trainer.max_steps=1", task="privacy_models.Unused")
    before = {name: p.detach().clone() for name, p in run.task.named_parameters()}
    run.execute(show_progress=False)
    moved = {name: not torch.equal(before[name], p) for name, p in run.task.named_parameters()}
    assert moved["unused.weight"]
    assert moved["unused.bias"]
    assert not moved["frozen.weight"]
    assert not moved["frozen.bias"]


# What else of the data could come out.


def test_data_that_is_fitted_to_is_refused_by_name(tmp_path: Path) -> None:
    error = refused(tmp_path, "divides by the largest value of the training data", data="privacy_models.Fitted")
    assert "privacy_models.Fitted" in error.found
    refused(tmp_path, "which fits", data="privacy_models.MaybeFitted")
    run = private(tmp_path / "not", "data.fits=false", "trainer.max_steps=1", data="privacy_models.MaybeFitted")
    run.execute(show_progress=False)


def test_tables_are_standardised_by_their_rows_and_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("a,b,y\n" + "".join(f"{i},{i % 7},{i % 2}\n" for i in range(40)))
    with pytest.raises(CompositionError, match="standardises columns"):
        lightrail.compose(["data=csv", f"data.path={path}", "data.target=y", "task=regression", "model=mlp", *PRIVATE])


def test_an_average_of_the_weights_is_allowed(tmp_path: Path) -> None:
    run = private(tmp_path, "+callback=[ema]", "optimizer.lr=0.01", "trainer.max_steps=2")
    assert run.execute(show_progress=False).summary["steps"] == 2


REFUSED = {
    "sam": ("'sam' evaluates the data more than once", ["+transform=[sam]"], {}),
    "lbfgs": ("'lbfgs' evaluates the data more than once", ["optimizer=lbfgs"], {}),
    "second-of-two": ("'sam' evaluates the data more than once", ["+transform=[centralize,sam]"], {}),
    "batching": ("batching, which decides", ["batching=constant", "batching.batch_size=8"], {}),
    "accumulate": ("accumulation", ["trainer.accumulate=2"], {}),
    "half": ("half precision", ["trainer.precision=16-mixed"], {}),
    "batch-norm": ("BatchNorm", [], {"task": "privacy_models.Normed", "extra": "privacy.replace_batch_norm=false"}),
    "max-norm": ("an embedding that rescales", [], {"task": "privacy_models.Rescaling"}),
    "cat-metric": ("logs the values of single samples", [], {"task": "privacy_models.Collecting"}),
    "manual": ("steps its optimizers itself", [], {"task": "privacy_models.Manual", "is_own": True}),
    "game": ("several players", ["optimizer=sgd"], {"task": "test_players.AtOnce"}),
    "share": ("a share of the batches", ["trainer.limit_train_batches=0.5"], {}),
    "overfit": ("a part of the batches", ["+trainer.overfit_batches=2"], {}),
    "fsdp": ("whole parameters on every rank", ["trainer.strategy=fsdp"], {}),
    "deepspeed": ("whole parameters on every rank", ["trainer.strategy=deepspeed"], {}),
    "model-parallel": ("whole parameters on every rank", ["trainer.strategy=model_parallel"], {}),
}


def test_an_optimizer_that_draws_labels_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CompositionError, match="'sophia' evaluates the data more than once"):
        lightrail.compose(["data=digits", "model=mlp", "optimizer=sophia", f"run.root={tmp_path}", *PRIVATE])


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_private_is_refused_before_data_is_touched(tmp_path: Path, name: str) -> None:
    words, overrides, names = REFUSED[name]
    names = dict(names)
    overrides = [*overrides, names.pop("extra")] if "extra" in names else overrides
    refused(tmp_path, words, *overrides, **names)


@pytest.mark.parametrize(
    ("words", "task", "overrides"),
    [
        ("depends on the other samples", "Contrastive", []),
        ("depends on the other samples", "BatchWeights", []),
        ("the sum over the samples", "Summed", []),
        ("activation checkpointing", "Checkpointed", []),
        ("buffers that training moves", "Running", []),
        ("buffers that training moves", "Running", ["privacy.engine=one_by_one"]),
    ],
)
def test_what_mixes_or_keeps_samples_is_refused_in_the_first_step(
    tmp_path: Path, words: str, task: str, overrides: list[str]
) -> None:
    run = private(tmp_path, *overrides, task=f"privacy_models.{task}")
    with pytest.raises(CompositionError) as error:
        run.execute(show_progress=False)
    assert words in str(error.value)
    assert told(only(tmp_path))["events"] == []


def test_batches_that_do_not_tell_their_size_are_no_empty_batches(tmp_path: Path) -> None:
    run = private(tmp_path, data="privacy_models.Opaque")
    with pytest.raises(CompositionError, match="does not say how many samples"):
        run.execute(show_progress=False)


def test_remedies_work(tmp_path: Path) -> None:
    run = private(tmp_path / "1", "privacy.replace_batch_norm=true", task="privacy_models.Normed")
    run.execute(show_progress=False)
    assert any("GroupNorm" in note for note in run.notes)
    summed = watched(private(tmp_path / "2", STEADY, "privacy.loss=sum", task="privacy_models.Summed"))
    mean = watched(private(tmp_path / "3", STEADY))
    for a, b in zip(summed.gradients, mean.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "overrides", "names"),
    [
        ("how many records there are", [], {"data": "privacy_models.Stream"}),
        ("must know how long it is", ["trainer.max_epochs=-1"], {"data": "privacy_runs.Points"}),
        ("delta", ["privacy.delta=0.05"], {"data": "privacy_runs.Points"}),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused(
    tmp_path: Path, words: str, overrides: list[str], names: dict[str, Any]
) -> None:
    refused(tmp_path, words, *overrides, **names)


def test_a_target_that_no_noise_meets_is_refused(tmp_path: Path) -> None:
    run = compose(tmp_path, *PRIVATE, "privacy.epsilon=1e-9", "privacy.delta=1e-9")
    with pytest.raises(ConfigurationError, match="no noise keeps this run"):
        run.execute(show_progress=False)


def test_a_question_to_the_closure_is_refused_where_no_trait_foretold_it(tmp_path: Path) -> None:
    run = private(tmp_path, "+transform=[privacy_models.Secretly]")
    with pytest.raises(ClosureError, match="evaluates the private data again"):
        run.execute(show_progress=False)


def test_masks_of_a_private_run_do_not_follow_from_its_seed(tmp_path: Path) -> None:
    drawn = {}
    for name, options in {"secret": (), "known": ("privacy.deterministic_noise=true",)}.items():
        after = []
        for turn in "ab":
            private(tmp_path / name / turn, "seed=3", "trainer.max_steps=1", *options).execute(show_progress=False)
            after.append(torch.rand(4))
        drawn[name] = torch.equal(*after)
    assert drawn == {"secret": False, "known": True}
    state = torch.load(only(tmp_path / "secret" / "a") / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["lightrail"]["positions"][0]["random"] is None
