"""Mollification: the schedules, which batches are noisy, that all evaluations of a step see one, and resuming."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning_runs  # type: ignore[import-not-found]
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightrail import Transform
from lightrail.errors import CompositionError, ConfigurationError
from lightrail.run.loops import install_loops
from lightrail.step import TransformedOptimizer
from lightrail.testing.quiet_trainer import quiet_trainer
from lightrail.traits import Traits
from lightrail_starter.callbacks.mollification import Mollification, noise_power
from lightrail_starter.data.rows import Rows, as_is

STEPS = 8  # an epoch


class Task(LightningModule):
    """Remembers every batch that it was given, by stage."""

    def __init__(self, clean: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.clean = clean
        self.seen: dict[str, list[Any]] = {"train": [], "val": [], "test": []}

    def loss(self, batch: Any) -> Tensor:
        return self.layer(batch[1]).square().mean() if isinstance(batch[1], Tensor) else self.layer.weight.sum()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen["train"].append(batch)
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["val"].append(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["test"].append(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def clean() -> tuple[Tensor, Tensor, Tensor]:
    """Whole numbers come first: they are no inputs that noise could be added to."""
    generator = torch.Generator().manual_seed(3)
    return torch.arange(4 * STEPS), torch.randn(4 * STEPS, 3, generator=generator), torch.randn(4 * STEPS, 1)


def loader(*tensors: Tensor) -> Any:
    return DataLoader(Rows(*tensors), batch_size=4, collate_fn=as_is)


def fit(callback: Callback | list[Callback], epochs: int = 2, task: Any = None, **arguments: Any) -> Task:
    torch.manual_seed(0)
    task = task or Task(clean())
    callbacks = callback if isinstance(callback, list) else [callback]
    with quiet_trainer(max_epochs=epochs, callbacks=callbacks, num_sanity_val_steps=2, **arguments) as trainer:
        trainer.fit(task, loader(*task.clean), loader(*task.clean))
        trainer.test(task, loader(*task.clean), verbose=False)
        assert "batch_to_device" not in vars(trainer.strategy)
    return task


def test_the_schedules_are_the_published_ones() -> None:
    def published(t: float, start: float = 0, end: float = 3, tau: float = 0.7) -> float:
        first, last, here = (1 / (1 + np.exp(-x / tau)) for x in (start, end, t * (end - start) + start))
        return float((last - here) / (last - first))

    for t in (0.0, 0.1, 0.25, 0.5, 0.9, 0.999):
        assert noise_power(t) == pytest.approx(published(t), abs=1e-12)
        assert noise_power(t, "cosine") == pytest.approx(0.5 + 0.5 * math.cos(math.pi * t), abs=1e-12)
        assert noise_power(t, "linear") == 1 - t
    for name in ("sigmoid", "cosine", "linear"):
        values = [noise_power(r / 50, name) for r in range(60)]
        assert values == sorted(values, reverse=True)
        assert (values[0], values[50], values[59]) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("schedule", ["sigmoid", "cosine", "linear"])
def test_signal_and_noise_share_one_variance(schedule: str) -> None:
    callback = Mollification(schedule=schedule, until=0.8)
    for step in range(0, 100, 7):
        keep, level = callback.at(step, 100)
        assert keep**2 + level**2 == pytest.approx(1)
        assert level**2 == pytest.approx(noise_power(step / 80, schedule))


def test_training_batches_are_those_computed_by_hand_and_no_others_are_touched() -> None:
    task = fit(Mollification(until=0.5))
    order, x, y = task.clean
    callback = Mollification(until=0.5)
    levels = []
    assert len(task.seen["train"]) == 2 * STEPS
    for step, (i, noisy, target) in enumerate(task.seen["train"]):
        rows = slice(4 * (step % STEPS), 4 * (step % STEPS) + 4)
        keep, level = callback.at(step, 2 * STEPS)
        levels.append(level)
        assert torch.equal(i, order[rows])
        assert torch.equal(target, y[rows])
        if level == 0:
            assert torch.equal(noisy, x[rows])
        else:
            residual = (noisy - keep * x[rows]) / level
            assert 0.2 < residual.std() < 2.5
    assert levels[0] == 1
    assert levels[STEPS - 1] > 0 == levels[STEPS] == levels[-1]
    for stage in ("val", "test"):
        for step, (_, seen, _) in enumerate(task.seen[stage][-STEPS:]):
            assert torch.equal(seen, x[4 * step : 4 * step + 4])


def test_validation_is_clean_where_a_task_stays_in_training_mode_for_it() -> None:
    class Staying(Task):
        def on_validation_model_eval(self) -> None:
            pass

    task = fit(Mollification(kind="constant", noise=1.0), task=Staying(clean()))
    for step, (_, seen, _) in enumerate(task.seen["val"][-STEPS:]):
        assert torch.equal(seen, task.clean[1][4 * step : 4 * step + 4])


def test_the_noise_is_drawn_from_the_global_generator() -> None:
    class Seed(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            torch.manual_seed(11)

    task = fit([Seed(), Mollification(until=1.0, schedule="linear")], epochs=1)
    torch.manual_seed(11)
    for step, (_, noisy, _) in enumerate(task.seen["train"]):
        gamma = 1 - step / STEPS
        x, noise = task.clean[1][4 * step : 4 * step + 4], torch.randn(4, 3)
        assert torch.allclose(noisy, math.sqrt(1 - gamma) * x + math.sqrt(gamma) * noise, atol=1e-6)


@pytest.mark.parametrize(("options", "first", "last"), [
    ({"kind": "constant", "noise": 0.3}, 0.3, 0.3),
    ({"noise": 0.3, "until": 0.5}, 0.3, 0.0),
])  # fmt: skip
def test_instance_noise_is_added_to_whole_inputs(options: dict[str, Any], first: float, last: float) -> None:
    data = (torch.arange(4 * STEPS), torch.full((4 * STEPS, 3), 100.0), torch.zeros(4 * STEPS, 1))
    task = fit(Mollification(**options), task=Task(data))
    deviations = torch.stack([noisy - 100 for _, noisy, _ in task.seen["train"]])
    assert deviations[0].abs().mean() == pytest.approx(first * math.sqrt(2 / math.pi), rel=0.5)
    assert (deviations[-1].abs().mean() > 0) == (last > 0)
    assert deviations.abs().max() < 2
    callback = Mollification(**options)
    assert (callback.at(0, 100), callback.at(100, 100)) == ((1.0, first), (1.0, last))


class Twice(Transform):
    """Evaluates the window a second time, as SAM does."""

    traits = Traits(needs_closure=True, extra_evaluations=1)

    def before_step(self, params: list[Tensor], closure: Any) -> None:
        closure.loss()


def test_all_evaluations_of_a_step_see_one_noisy_batch() -> None:
    class Transformed(Task):
        def configure_optimizers(self) -> Any:
            return TransformedOptimizer(torch.optim.SGD(self.parameters(), lr=0.01), [Twice()])

    torch.manual_seed(0)
    task = Transformed(clean())
    callback = Mollification(kind="constant", noise=1.0)
    with quiet_trainer(max_epochs=1, callbacks=[callback], accumulate_grad_batches=2) as trainer:
        install_loops(trainer, window=True, skips_non_finite=False)
        trainer.fit(task, loader(*task.clean))
    seen = [batch[1] for batch in task.seen["train"]]
    assert len(seen) == 2 * STEPS
    for first in range(0, len(seen), 4):
        assert torch.equal(seen[first], seen[first + 2])
        assert torch.equal(seen[first + 1], seen[first + 3])
        assert not torch.equal(seen[first], seen[first + 1])


def test_micro_batches_of_a_step_have_one_level() -> None:
    levels: list[float] = []

    class Look(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            levels.append(callback.logged()["noise"])

    callback = Mollification(until=1.0, schedule="linear")
    fit([callback, Look()], epochs=1, accumulate_grad_batches=2)
    assert levels == [math.sqrt(1 - (i // 2) / (STEPS / 2)) for i in range(STEPS)]


def test_hooks_of_task_and_data_come_before_the_noise_and_nothing_is_left_behind() -> None:
    class Data(LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader(*clean())

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0], batch[1] * 0 + 7, batch[2]

    torch.manual_seed(0)
    task = Task(clean())
    with quiet_trainer(max_epochs=1, callbacks=[Mollification(kind="constant", noise=0.01)]) as trainer:
        trainer.fit(task, datamodule=Data())
        assert "batch_to_device" not in vars(trainer.strategy)
    for _, noisy, _ in task.seen["train"]:
        assert 0 < (noisy - 7).abs().max() < 0.1


def test_a_run_that_fails_leaves_nothing_behind() -> None:
    class Failing(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise RuntimeError("out of luck")

    with quiet_trainer(max_epochs=1, callbacks=[Mollification()]) as trainer:
        strategy = trainer.strategy
        with pytest.raises(RuntimeError, match="out of luck"):
            trainer.fit(Failing(clean()), loader(*clean()))
        assert "batch_to_device" not in vars(strategy)


def test_a_batch_that_is_only_looked_at_in_evaluation_mode_is_clean() -> None:
    looked: list[Tensor] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            pl_module.eval()
            looked.append(trainer.strategy.batch_to_device((clean()[0], clean()[1]), dataloader_idx=0)[1])
            pl_module.train()

    fit([Mollification(kind="constant", noise=1.0), Look()], epochs=1)
    assert torch.equal(looked[0], clean()[1])


class KilledError(Exception):
    pass


class KillAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise KilledError


@pytest.mark.parametrize("options", [{"until": 0.8}, {"kind": "constant", "noise": 0.5}], ids=str)
def test_a_resumed_run_equals_one_that_was_never_stopped_bit_for_bit(tmp_path: Path, options: Any) -> None:
    def adamw(params: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=1e-2)

    def run(folder: str, *others: Callback, **arguments: Any) -> LightningModule:
        callbacks = [Mollification(**options), *others]
        return lightning_runs.fit(tmp_path / folder, adamw, max_epochs=2, every=1, callbacks=callbacks, **arguments)[0]

    whole, plain = run("whole"), lightning_runs.fit(tmp_path / "plain", adamw, max_epochs=2)[0]
    assert not torch.equal(whole.net[0].weight, plain.net[0].weight)  # type: ignore[index, union-attr]
    for step in (5, 12):
        with pytest.raises(KilledError):
            run(str(step), KillAt(step))
        resumed = run(str(step), seed=99, checkpoint=tmp_path / str(step) / "checkpoints" / "last.ckpt")
        for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_tokens_are_refused() -> None:
    data = (torch.arange(4 * STEPS), torch.arange(4 * STEPS), torch.arange(4 * STEPS))
    with pytest.raises(CompositionError, match="nothing in a batch") as caught:
        fit(Mollification(), task=Task(data))
    assert caught.value.found == "torch.int64"


def test_a_run_without_an_end_is_refused_unless_the_noise_is_constant() -> None:
    with pytest.raises(CompositionError, match="no horizon"):
        fit(Mollification(), epochs=-1)

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = True

    fit([Mollification(kind="constant", noise=0.1), Stop()], epochs=-1)


@pytest.mark.parametrize("options", [
    {"kind": "some"}, {"schedule": "step"}, {"until": 0.0}, {"until": 1.5}, {"noise": 0.0}, {"noise": -1.0},
    {"kind": "constant"},
])  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Mollification(**options)
