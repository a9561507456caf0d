"""What all generative tasks share: data as states, labels, fixed validation, the questions of a closure."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightrail import Closure
from lightrail.errors import CompositionError, ConfigurationError, DataError
from lightrail.testing.quiet_trainer import quiet_trainer
from lightrail_generation.tasks.diffusion import Diffusion
from lightrail_generation.tasks.draws import Draws
from lightrail_generation.tasks.flow_matching import FlowMatching
from lightrail_generation.tasks.lcss import LCSS
from lightrail_generation.tasks.pfgmpp import PFGMPP
from lightrail_generation.tasks.stochastic_interpolant import StochasticInterpolant

ALL = [Diffusion, FlowMatching, PFGMPP, LCSS, StochasticInterpolant]
REGRESSIONS = [Diffusion, FlowMatching, PFGMPP]


class Net(nn.Module):
    """A small network that remembers what it was told."""

    def __init__(self, num_classes=0, features=3):
        super().__init__()
        self.num_classes = num_classes
        self.layers = nn.Sequential(nn.Linear(features + 1 + num_classes + 1, 8), nn.Tanh(), nn.Linear(8, features))
        self.seen = []

    def forward(self, x, time, label=None):
        self.seen.append((x.detach(), time, label))
        label = torch.full((len(x),), self.num_classes) if label is None else label
        told = nn.functional.one_hot(label, self.num_classes + 1).to(x)
        return self.layers(torch.cat((x, time[:, None].to(x), told), 1))


class Points(LightningDataModule):
    """Points between 2 and 6, with labels."""

    def __init__(self, classes=3, count=64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        x = 2 + 4 * torch.rand(count, 3, generator=generator)
        x[0, 0], x[1, 1] = 2.0, 6.0
        parts = (x, torch.arange(count) % classes) if classes else (x,)
        self.rows = TensorDataset(*parts)
        self.collate = None if classes else lambda rows: torch.stack([row[0] for row in rows])

    def train_dataloader(self):
        return DataLoader(self.rows, 16, shuffle=True, collate_fn=self.collate)

    def val_dataloader(self):
        return DataLoader(self.rows, 16, collate_fn=self.collate)

    test_dataloader = val_dataloader


def batch(classes=3, count=12):
    torch.manual_seed(1)
    return torch.randn(count, 3), torch.arange(count) % max(classes, 1)


def fitted(task, data, steps=1, **more):
    task.configure_optimizers = lambda: torch.optim.SGD(task.parameters(), lr=1e-2)
    with quiet_trainer(max_steps=steps, limit_val_batches=0, **more) as trainer:
        trainer.fit(task, datamodule=data)
    return task


# Data as states.


@pytest.mark.parametrize("task_class", ALL)
def test_center_and_scale_are_the_middle_and_half_the_range_of_the_training_data(task_class):
    task = fitted(task_class(Net(3)), Points())
    assert float(task.center) == pytest.approx(4.0, abs=1e-6)
    assert float(task.scale) == pytest.approx(2.0, abs=1e-6)
    assert task.state_shape == (3,)
    states = task.states(Points().rows.tensors[0])
    assert float(states.abs().max()) == pytest.approx(1.0, abs=1e-6)
    assert float(task.sigma_data) == pytest.approx(float(states.square().mean().sqrt()), abs=1e-5)


def test_what_is_given_is_not_measured():
    task = fitted(Diffusion(Net(3), center=1.0, scale=10.0, sigma_data=0.7), Points())
    assert [float(task.center), float(task.scale)] == [1.0, 10.0]
    assert float(task.sigma_data) == pytest.approx(0.7)
    only = fitted(Diffusion(Net(3), center=0.0), Points())
    states = only.states(Points().rows.tensors[0])
    assert float(only.sigma_data) == pytest.approx(float(states.square().mean().sqrt()), abs=1e-5)


def test_loaders_without_a_data_module_are_measured_too():
    task: Any = Diffusion(Net(3))
    task.configure_optimizers = lambda: torch.optim.SGD(task.parameters(), lr=1e-2)
    with quiet_trainer(max_steps=1, limit_val_batches=0) as trainer:
        trainer.fit(task, Points().train_dataloader())
    assert float(task.center) == pytest.approx(4.0, abs=1e-6)


def test_measuring_moves_no_random_numbers():
    task: Any = Diffusion(Net(3))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    task._trainer = SimpleNamespace(datamodule=Points())
    task.on_fit_start()
    assert float(task.scale) == pytest.approx(2.0, abs=1e-6)
    assert torch.equal(torch.rand(3), expected)


def test_a_checkpoint_brings_its_own_and_is_not_measured_again():
    task = fitted(Diffusion(Net(3)), Points())
    other = Diffusion(Net(3))
    other.load_state_dict(task.state_dict())
    moved = Points()
    moved.rows = TensorDataset(moved.rows.tensors[0] * 100, moved.rows.tensors[1])
    fitted(other, moved)
    assert float(other.center) == pytest.approx(4.0, abs=1e-6)
    assert other.state_shape == (3,)


def test_data_without_a_range_are_refused():
    data = Points()
    for value in (torch.full((64, 3), 2.0), torch.full((64, 3), torch.nan)):
        data.rows = TensorDataset(value, data.rows.tensors[1])
        with pytest.raises(DataError, match="range of the training data"):
            fitted(Diffusion(Net(3)), data)


def test_data_that_are_no_numbers_are_refused():
    with pytest.raises(DataError, match="int64"):
        Diffusion(Net()).training_step((torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4)), 0)


# Labels.


def test_labels_are_dropped_in_training_and_never_in_validation():
    task: Any = Diffusion(Net(3), label_dropout=0.25)
    x, label = torch.randn(4000, 3), torch.arange(4000) % 3
    task.training_step((x, label), 0)
    shown = task.model.seen[-1][2]
    dropped = shown == 3
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.03)
    assert torch.equal(shown[~dropped], label[~dropped])
    with quiet_trainer(limit_val_batches=1) as trainer:
        trainer.validate(task, DataLoader(TensorDataset(x, label), 64), verbose=False)
    assert torch.equal(task.model.seen[-1][2], label[:64])


def test_a_model_without_classes_is_told_no_labels():
    task: Any = Diffusion(Net(0))
    for each in (batch(), batch()[0]):
        task.training_step(each, 0)
        assert task.model.seen[-1][2] is None


def test_a_model_of_classes_wants_labels():
    with pytest.raises(CompositionError, match="labels that the data do not have"):
        Diffusion(Net(3)).training_step(batch()[0], 0)
    with pytest.raises(CompositionError, match="labels that the model does not know") as caught:
        fitted(Diffusion(Net(2)), Points(classes=3))
    assert "model.num_classes=3" in caught.value.remedy


def test_batches_may_be_bare_tensors():
    assert fitted(Diffusion(Net(0)), Points(classes=0)).state_shape == (3,)


def test_a_model_of_another_shape_is_refused():
    class Wide(nn.Linear):
        def forward(self, x, time, label=None):
            return super().forward(x)

    with pytest.raises(CompositionError, match="does not give back what it takes"):
        Diffusion(Wide(3, 1)).training_step(batch(), 0)


# Validation.


@pytest.mark.parametrize("task_class", ALL)
def test_validation_is_the_same_whatever_was_drawn_before(task_class):
    torch.manual_seed(0)
    task: Any = task_class(Net(3))
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with quiet_trainer() as trainer:
            found.append(trainer.validate(task, Points().val_dataloader(), verbose=False)[0]["val_loss"])
    assert found[0] == found[1]
    assert task_class.monitor == ("val_loss", "min")


def test_validation_takes_every_part_of_the_times():
    t = Diffusion(Net(3)).example(batch(), Draws.for_evaluation(0, 0, torch.device("cpu"))).t
    parts = ((t - 1e-3) / (0.9998 - 1e-3) * 12).floor()
    assert sorted(parts.tolist()) == list(range(12))


def test_batches_and_ranks_are_validated_with_noise_of_their_own():
    def noise(index, rank):
        return Draws.for_evaluation(index, rank, torch.device("cpu")).normal(torch.zeros(3))

    drawn = [noise(0, 0), noise(1, 0), noise(0, 1)]
    assert torch.equal(drawn[0], noise(0, 0))
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_ranks_train_with_noise_of_their_own():
    drawn = []
    for rank in (0, 1, 0):
        torch.manual_seed(0)
        drawn.append(Draws.for_training(torch.device("cpu"), rank).normal(torch.zeros(5)))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


def test_a_broken_model_does_not_validate_well():
    task: Any = Diffusion(Net(3))
    with torch.no_grad():
        task.model.layers[0].bias.fill_(torch.nan)
    with quiet_trainer() as trainer:
        found = trainer.validate(task, Points().val_dataloader(), verbose=False)[0]["val_loss"]
    assert found != found


def test_the_figure_shows_the_loss_of_the_last_test():
    task: Any = Diffusion(Net(3), schedule="edm")
    assert task.figures() == {}
    with quiet_trainer() as trainer:
        tested = trainer.test(task, Points().test_dataloader(), verbose=False)[0]["test_loss"]
    (axes,) = task.figures()["loss_by_level"].axes
    assert axes.get_title(loc="left") == f"mean test loss {tested:.4g}"
    assert len(axes.collections[0].get_offsets().data) == 64
    assert axes.get_xscale() == "log"


# The questions of a closure.


def closure_of(task, given):
    return Closure(
        lambda b: task.training_step(b, 0)["loss"],
        list(task.parameters()),
        given,
        sampled_loss_fn=getattr(task, "sampled_loss", None),
        sample_losses_fn=task.sample_losses,
        outputs_fn=getattr(task, "outputs", None),
        output_loss_fn=getattr(task, "output_loss", None),
    )


@pytest.mark.parametrize("task_class", ALL)
def test_a_step_that_is_evaluated_again_draws_the_same(task_class):
    torch.manual_seed(0)
    task, given = task_class(Net(3)), batch()
    closure = closure_of(task, given)
    loss = closure()
    assert float(closure.loss()) == float(loss)
    losses = closure.sample_losses()
    assert losses.shape == (12,)
    assert float(losses.mean()) == pytest.approx(float(loss), rel=1e-5)
    assert float(closure_of(task, given).loss()) != float(loss)


@pytest.mark.parametrize("task_class", REGRESSIONS)
def test_the_loss_looks_at_its_outputs(task_class):
    torch.manual_seed(0)
    task, given = task_class(Net(3)), batch()
    closure = closure_of(task, given)
    loss, gradient = closure.gradient()
    value, found = closure.gradient_of(lambda b: closure.output_loss(closure.outputs(b), b))
    assert float(value) == pytest.approx(float(loss), rel=1e-5)
    for one, other in zip(gradient, found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("task_class", [Diffusion, FlowMatching])
def test_sampled_targets_estimate_the_gauss_newton_diagonal(task_class):
    task: Any = task_class(Net(0)).double()
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # One level and noise for all draws; only the targets change.
    example: Any = task.example(x, Draws(torch.Generator().manual_seed(4), torch.device("cpu")))
    fixed = example.draws.normal(example.x0)
    task.noise = lambda example: fixed
    task.example = lambda batch, draws: type(example)(example.x0, None, None, example.t, draws)
    residuals, params = task.residuals(task.example(x, example.draws)), list(task.parameters())
    rows = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(value, params, retain_graph=True)])
            for value in residuals.flatten()
        ]
    )
    expected = 2 * rows.square().sum(0) / residuals.numel()
    generator, squares = torch.Generator().manual_seed(1), []
    for _ in range(700):
        gradients = torch.autograd.grad(task.sampled_loss(x, generator), params)
        squares.append(torch.cat([g.flatten() for g in gradients]).square() * 6)
    found = torch.stack(squares)
    assert ((found.mean(0) - expected).abs() < 5 * found.std(0) / 700**0.5).all()
    assert (5 * found.std(0) / 700**0.5 < 0.4 * expected.mean() + 0.4 * expected).all()


def test_objectives_that_are_no_squares_offer_no_outputs():
    for task_class in (LCSS, StochasticInterpolant):
        assert not hasattr(task_class(Net(3)), "outputs")
        assert not hasattr(task_class(Net(3)), "sampled_loss")


# Types.


@pytest.mark.parametrize("task_class", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_precisions_train(task_class, dtype):
    task: Any = task_class(Net(3).to(dtype))
    x, label = batch()
    loss = task.training_step((x.to(dtype), label), 0)["loss"]
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(bool(p.grad.isfinite().all()) for p in task.parameters())


def test_under_bf16_the_loss_is_worked_out_in_single_precision():
    task: Any = Diffusion(Net(3))
    with torch.autocast("cpu", torch.bfloat16):
        loss = task.training_step(batch(), 0)["loss"]
    assert loss.dtype == torch.float32


def test_label_dropout_is_a_share():
    with pytest.raises(ConfigurationError, match="label_dropout"):
        FlowMatching(Net(), label_dropout=-0.1)
