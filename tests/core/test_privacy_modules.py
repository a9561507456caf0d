"""Modules of all sorts in private: their own optimizers, dropout, compiled layers, half precision, experiments."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from privacy_runs import PRIVATE, compose, flat, private, watched

import lightrail
from lightrail.errors import CompositionError

STEADY = "privacy.deterministic_noise=true"


@pytest.mark.parametrize("form", ["alone", "dict", "list", "lists"])
def test_a_task_with_its_own_optimizer(tmp_path: Path, form: str) -> None:
    run = compose(tmp_path, *PRIVATE, "privacy.noise=1", f"task.form={form}", task="privacy_models.Own", is_own=True)
    watch = watched(run)
    assert len(watch.gradients) == 8
    steps = [a - b for a, b in zip(watch.before, [*watch.before[1:], flat(run.task)], strict=True)]
    for t, (step, gradient) in enumerate(zip(steps, watch.gradients, strict=True)):
        rate = 0.5 * (1 - t / 8) if form in ("dict", "lists") else 0.5
        torch.testing.assert_close(step, rate * gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["several", "none"])
def test_a_task_with_several_optimizers_is_refused(tmp_path: Path, form: str) -> None:
    run = compose(tmp_path, *PRIVATE, "privacy.noise=1", f"task.form={form}", task="privacy_models.Own", is_own=True)
    with pytest.raises(CompositionError, match="several optimizers, or none"):
        run.execute(show_progress=False)


@pytest.mark.parametrize(
    ("task", "overrides"),
    [
        ("Dropping", []),
        ("Counting", []),
        ("Compiled", []),
        ("Checkpointed", ["privacy.engine=one_by_one"]),
        ("Counting", ["trainer.precision=bf16-mixed"]),
        ("Counting", ["trainer.precision=64-true"]),
    ],
)
def test_ordinary_modules_train(tmp_path: Path, task: str, overrides: list[str]) -> None:
    run = private(tmp_path, "trainer.max_steps=3", "logger=[]", *overrides, task=f"privacy_models.{task}")
    assert run.execute(show_progress=False).summary["steps"] == 3


def test_a_compiled_layer_gives_the_gradients_of_a_plain_one(tmp_path: Path) -> None:
    compiled = watched(private(tmp_path / "1", STEADY, task="privacy_models.Compiled"))
    plain = watched(private(tmp_path / "2", STEADY))
    for a, b in zip(compiled.gradients, plain.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("experiment", ["docs_lm", "digits_diffusion"])
def test_whole_experiments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experiment: str) -> None:
    monkeypatch.chdir(tmp_path)
    private_steps = [*PRIVATE, "privacy.noise=1", "trainer.max_epochs=-1", "trainer.max_steps=2", "data.batch_size=4"]
    little = [
        "+trainer.limit_val_batches=1",
        "+trainer.limit_test_batches=1",
        "trainer.accelerator=cpu",
        "logger=[]",
        "callback=[]",
    ]
    run = lightrail.compose([f"experiment={experiment}", *private_steps, *little, f"run.root={tmp_path / 'runs'}"])
    assert run.execute(show_progress=False).summary["steps"] == 2
