"""The exponential moving average: its value, its swaps, its checkpoints."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.step import Transform, TransformedOptimizer
from lightrail.traits import Traits
from lightrail_starter.callbacks.ema import EMA
from lightrail_starter.data.rows import Rows, as_is
from lightrail_starter.problems.behaviour_cloning import BehaviourCloning

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


class Task(LightningModule):
    """A model with all that an average must cope with: BatchNorm, dropout, tied weights, integer and lost buffers."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.3)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.enter.weight
        self.register_buffer("lost", torch.zeros(2), persistent=False)
        self.evaluated: list[torch.Tensor] = []

    def loss(self, x):
        return self.tied(self.dropout(self.norm(self.enter(x)).relu())).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch[0])

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.evaluated.append(self.enter.weight.detach().clone())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class SeedEachStep(Callback):
    """Makes dropout the same in a resumed run."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(trainer.global_step)


class Recorder(Callback):
    """The state after every optimizer step, before the average sees it."""

    def __init__(self):
        self.states = []
        self.steps = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > self.steps:
            self.steps = trainer.global_step
            self.states.append({k: v.detach().clone() for k, v in pl_module.state_dict().items()})


def loaders() -> Any:
    torch.manual_seed(9)
    rows = Rows(torch.randn(24, 4))
    loader = DataLoader(rows, batch_size=4, collate_fn=as_is)
    return {"train_dataloaders": loader, "val_dataloaders": DataLoader(rows, batch_size=12, collate_fn=as_is)}


def fit(callbacks, epochs=2, ckpt_path=None, **options):
    torch.manual_seed(0)
    task = Task()
    trainer = Trainer(
        max_epochs=epochs, callbacks=callbacks, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", num_sanity_val_steps=0, **options,
    )  # fmt: skip
    trainer.fit(task, **loaders(), ckpt_path=ckpt_path, weights_only=True)
    return task, trainer


def by_hand(states, decays):
    average = {name: value.clone() for name, value in states[0].items()}
    for state, decay in zip(states[1:], decays, strict=True):
        for name, value in state.items():
            if value.is_floating_point():
                average[name] = average[name] + (1 - decay) * (value - average[name])
            else:
                average[name] = value
    return average


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], atol=1e-6), name


def test_the_average_is_the_one_computed_by_hand():
    recorder = Recorder()
    task, _ = fit([recorder, EMA(decay=0.8, warmup=False)])
    assert len(recorder.states) == 12
    close(task.state_dict(), by_hand(recorder.states, [0.8] * 11))
    assert task.tied.weight is task.enter.weight


def test_the_warm_up_shortens_the_memory_of_the_first_updates():
    recorder = Recorder()
    task, _ = fit([recorder, EMA(decay=0.5)])
    close(task.state_dict(), by_hand(recorder.states, [min(0.5, (1 + n) / (10 + n)) for n in range(1, 12)]))


@pytest.mark.parametrize(("decay", "start"), [(0.999999, 0), (1.0, 0), (1.0, 5)])
def test_power_one_is_the_mean_of_all_points_since_the_start(decay, start):
    recorder = Recorder()
    task, _ = fit([recorder, EMA(decay=decay, power=1, start_step=start)])
    points = recorder.states[start:]
    for name, value in task.state_dict().items():
        if value.is_floating_point():
            mean = torch.stack([point[name].double() for point in points]).mean(0)
            assert torch.allclose(value.double(), mean, rtol=1e-6, atol=1e-7), name
        else:
            assert torch.equal(value, points[-1][name]), name


def test_the_weight_of_a_point_falls_with_the_power_down_to_the_floor():
    callback = EMA(decay=0.9, power=0.5)
    assert [callback.weight(t) for t in (1, 4, 25, 100, 101, 10_000)] == [1, 0.5, 0.2, *[pytest.approx(0.1)] * 3]
    recorder = Recorder()
    task, _ = fit([recorder, EMA(decay=0.6, power=0.67)])
    close(task.state_dict(), by_hand(recorder.states, [1 - max(0.4, t**-0.67) for t in range(2, 13)]))


def test_warm_up_and_power_exclude_each_other():
    assert (EMA().warmup, EMA(power=0.5).warmup, EMA(warmup=False, power=0.5).power) == (True, False, 0.5)
    with pytest.raises(ConfigurationError, match="warmup and power") as caught:
        EMA(warmup=True, power=0.5)
    assert "power=0.5" in caught.value.found


def test_start_and_stride():
    recorder = Recorder()
    task, _ = fit([recorder, EMA(decay=0.8, start_step=2, every=3, warmup=False)])
    close(task.state_dict(), by_hand(recorder.states[2::3], [0.8] * 3))


def test_steps_are_those_of_the_optimizer_under_accumulation():
    recorder = Recorder()
    task, _ = fit([recorder, EMA(decay=0.8, warmup=False)], accumulate_grad_batches=2)
    assert len(recorder.states) == 6
    close(task.state_dict(), by_hand(recorder.states, [0.8] * 5))


def test_no_decay_is_the_last_point():
    recorder = Recorder()
    task, _ = fit([recorder, EMA(decay=0.0)])
    close(task.state_dict(), recorder.states[-1])


def test_before_the_first_update_the_weights_themselves_are_evaluated():
    recorder = Recorder()
    task, trainer = fit([recorder, EMA(start_step=1000)])
    same(task.state_dict(), recorder.states[-1])
    assert torch.equal(task.evaluated[0], recorder.states[5]["enter.weight"])
    assert "current_model_state" not in trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def test_validation_sees_the_average_and_training_does_not():
    plain, averaged = Recorder(), Recorder()
    fit([plain])
    task, _ = fit([averaged, EMA(decay=0.8, warmup=False)])
    for a, b in zip(plain.states, averaged.states, strict=True):
        same(a, b)
    for seen, steps in zip(task.evaluated, (6, 12), strict=True):
        expected = by_hand(plain.states[:steps], [0.8] * (steps - 1))["enter.weight"]
        assert torch.allclose(seen, expected, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"every": 4}, {"power": 0.67}, {"power": 1, "decay": 1.0, "every": 2}], ids=str
)
def test_a_resumed_run_equals_one_that_was_never_stopped_bit_for_bit(tmp_path, options):
    def callbacks():
        return [SeedEachStep(), EMA(**{"decay": 0.9, "start_step": 1, **options})]

    whole, whole_trainer = fit(callbacks(), epochs=5)
    _, trainer = fit(callbacks(), epochs=2)
    path = tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)  # after the end of training, while the average stands in the module
    resumed, resumed_trainer = fit(callbacks(), epochs=5, ckpt_path=str(path))
    same(whole.state_dict(), resumed.state_dict())
    first, second = (
        t._checkpoint_connector.dump_checkpoint(weights_only=False) for t in (whole_trainer, resumed_trainer)
    )
    same(first["current_model_state"], second["current_model_state"])


def test_a_checkpoint_holds_the_average_and_the_training_point(tmp_path):
    class SaveAt(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "training.ckpt")

        def on_validation_batch_start(self, trainer, pl_module, *args):
            trainer.save_checkpoint(tmp_path / "validating.ckpt")

    recorder = Recorder()
    fit([recorder, EMA(decay=0.8, warmup=False), SaveAt()])
    for name, steps in (("training", 8), ("validating", 12)):
        found = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        close(found["state_dict"], by_hand(recorder.states[:steps], [0.8] * (steps - 1)))
        same(found["current_model_state"], recorder.states[steps - 1])


def test_a_test_from_a_checkpoint_keeps_the_average(tmp_path):
    task, trainer = fit([EMA(decay=0.8)])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    average = {k: v.clone() for k, v in task.state_dict().items()}
    other, callback = Task(), EMA(decay=0.8)
    tester = Trainer(callbacks=[callback], logger=False, enable_progress_bar=False, accelerator="cpu")
    tester.validate(other, loaders()["val_dataloaders"], ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
    same(other.state_dict(), average)


def test_a_run_without_the_average_can_be_resumed_with_one(tmp_path):
    _, trainer = fit([])
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    recorder = Recorder()
    task, _ = fit([recorder, EMA(decay=0.8, warmup=False)], epochs=3, ckpt_path=str(tmp_path / "plain.ckpt"))
    close(task.state_dict(), by_hand(recorder.states[-6:], [0.8] * 5))


def test_fit_again_goes_on_from_the_training_point():
    recorder, callback = Recorder(), EMA(decay=0.8)
    task, trainer = fit([recorder, callback])
    last = recorder.states[-1]
    trainer.fit_loop.max_epochs = 3
    first: list[dict[str, torch.Tensor]] = []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            first.append({k: v.clone() for k, v in pl_module.state_dict().items()})

    trainer.callbacks.append(Look())  # type: ignore[attr-defined]
    trainer.fit(task, **loaders())
    same(first[0], last)


def test_an_optimizer_with_an_average_of_its_own_is_refused():
    class Averaging(torch.optim.SGD):
        traits = Traits(has_evaluation_point=True)

    class Other(Task):
        def configure_optimizers(self):
            return Averaging(self.parameters(), lr=0.1)

    trainer = Trainer(max_epochs=1, callbacks=[EMA()], logger=False, enable_checkpointing=False, accelerator="cpu",
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    with pytest.raises(CompositionError, match="ema"):
        trainer.fit(Other(), **loaders())


def test_a_transform_with_a_point_of_its_own_is_refused():
    class Ahead(Transform):
        traits = Traits(has_evaluation_point=True)

    class Other(Task):
        def configure_optimizers(self):
            return TransformedOptimizer(torch.optim.SGD(self.parameters(), lr=0.1), [Ahead()])

    trainer = Trainer(max_epochs=1, callbacks=[EMA()], logger=False, enable_checkpointing=False, accelerator="cpu",
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    with pytest.raises(CompositionError, match="ema") as caught:
        trainer.fit(Other(), **loaders())
    assert "Ahead" in caught.value.found


@pytest.mark.parametrize(
    "options",
    [{"decay": 1.0}, {"decay": -0.1}, {"start_step": -1}, {"every": 0}, {"power": 0.0}, {"power": 1.1}],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigurationError):
        EMA(**options)


def test_the_average_of_a_noisy_walk_is_nearer_to_its_centre():
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(50, 1, bias=False)
    nn.init.zeros_(module.weight)
    callback = EMA(decay=0.95)
    callback._find(module)  # type: ignore[arg-type]
    for _ in range(400):
        with torch.no_grad():
            module.weight.copy_(torch.randn(1, 50, generator=generator))
        callback._update()
    assert callback._other[0].norm() < 0.35 * module.weight.norm()
    assert F.mse_loss(callback._other[0], torch.zeros(1, 50)) < 0.1


@pytest.mark.parametrize("options", [{"decay": 0.99}, {"power": 0.67}])
def test_the_average_of_a_cloned_policy_costs_the_same_at_every_checkpoint(options):
    torch.manual_seed(0)
    problem = BehaviourCloning()
    module = nn.Module()
    module.policy = problem._policy
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    callback = EMA(**options)
    callback._find(module)  # type: ignore[arg-type]
    raw, averaged = [], []
    for step in range(1000):
        optimizer.step(problem.closure(step))  # type: ignore[arg-type]
        callback._update()
        if step >= 500 and step % 20 == 0:
            raw.append(problem.merit())
            with problem.closure(0).at(callback._other):
                averaged.append(problem.merit())
    assert torch.tensor(averaged).std() < 0.05 * torch.tensor(raw).std()
    assert sum(averaged) < sum(raw)
