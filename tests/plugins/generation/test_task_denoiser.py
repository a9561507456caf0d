"""A trained task as samplers know it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightrail.errors import CompositionError
from lightrail.generation import GaussianMixture, Generated, Prediction, sample
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.tasks.diffusion import Diffusion
from lightrail_generation.tasks.flow_matching import FlowMatching
from lightrail_generation.tasks.lcss import LCSS
from lightrail_generation.tasks.pfgmpp import PFGMPP
from lightrail_generation.tasks.stochastic_interpolant import StochasticInterpolant
from lightrail_generation.time_grids.uniform_lambda import UniformLambda

ALL = [Diffusion, FlowMatching, PFGMPP, LCSS, StochasticInterpolant]


class Net(nn.Module):
    """A small network with dropout, which remembers what it was told."""

    def __init__(self, num_classes=2):
        super().__init__()
        self.num_classes = num_classes
        self.layer = nn.Linear(3, 2)
        self.dropout = nn.Dropout(0.5)
        self.seen = []

    def forward(self, x, time, label=None):
        self.seen.append((time, label))
        return self.layer(self.dropout(torch.cat((x, time[:, None].to(x)), 1)))


class ExactVelocity(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixture = GaussianMixture(path="linear", form="velocity")
        self.one = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, time, label):
        return self.one * self.mixture.output(x, time.double(), None)


class Points(LightningDataModule):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(60, 2, generator=generator) @ torch.tensor([[2.0, 0.5], [0.0, 1.0]]) + 3
        self.is_ready = False

    def setup(self, stage):
        self.is_ready = True

    def train_dataloader(self):
        assert self.is_ready
        return DataLoader(TensorDataset(self.x, torch.arange(60) % 2), 16, shuffle=True)


def times(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_it_samples_what_its_network_knows():
    task: Any = Diffusion(ExactVelocity(), schedule="linear", center=0.0, scale=1.0).double()
    task.state_sizes[0] = 2
    mixture, denoiser = GaussianMixture(path="linear"), task.denoiser()
    sampler = DDIM(20)
    grid = sampler.grid(mixture.path, UniformLambda())
    ours = sample(denoiser, sampler, grid, range(8), seed=3).x
    theirs = sample(mixture, sampler, grid, range(8), seed=3).x
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("task_class", ALL)
def test_the_network_is_in_evaluation_mode_and_then_as_it_was(task_class):
    task: Any = task_class(Net()).train()
    task.model.layer.eval()
    denoiser: Any = task.denoiser()
    x, level = torch.randn(4, 2), task.path.level(0.3)
    first, second = denoiser.predict(x, level), denoiser.predict(x, level)
    assert torch.equal(first.data, second.data)
    assert task.training
    assert task.model.dropout.training
    assert not task.model.layer.training


@pytest.mark.parametrize("task_class", ALL)
def test_one_level_for_all_and_one_a_sample_say_the_same(task_class):
    denoiser: Any = task_class(Net().double()).double().denoiser()
    x = torch.randn(3, 2, dtype=torch.float64)
    together = denoiser.predict(x, denoiser.path.level(0.3))
    apart = denoiser.predict(x, denoiser.path.levels(times(0.3, 0.3, 0.3), 2))
    direct = denoiser.output(x, times(0.3, 0.3, 0.3), None)
    for form in denoiser.gives:
        assert torch.allclose(together.get(form), apart.get(form), rtol=1e-6)
    assert torch.allclose(together.get(denoiser.form), direct, rtol=1e-6)


@pytest.mark.parametrize("prediction", ["edm", "velocity", "score"])
def test_another_time_for_the_network_changes_nothing_but_what_it_is_told(prediction):
    class Deaf(Net):
        def forward(self, x, time, label=None):
            return super().forward(x, 0 * time, label)

    task: Any = Diffusion(Deaf().double(), prediction, schedule="edm").double()
    denoiser: Any = task.denoiser()
    x, level = torch.randn(2, 2, dtype=torch.float64), task.path.level(3.0)
    plain, shifted = denoiser.predict(x, level), denoiser.predict(x, level, network_time=0.5)
    assert torch.equal(plain.data, shifted.data)
    hearing: Any = Diffusion(Net().double(), prediction, schedule="edm").double().denoiser()
    assert not torch.equal(hearing.predict(x, level).data, hearing.predict(x, level, network_time=0.5).data)
    each = torch.tensor([0.5, 0.7])
    hearing.predict(x, level, network_time=each)
    assert torch.allclose(hearing.task.model.seen[-1][0], each.log() / 4)


def test_labels_reach_the_network_and_none_of_them_means_none():
    denoiser: Any = Diffusion(Net()).denoiser()
    x, level = torch.randn(2, 2), denoiser.path.level(0.3)
    seen = denoiser.task.model.seen
    condition = denoiser.condition({"label": 1}, [0, 1])
    denoiser.predict(x, level, condition)
    assert seen[-1][1].tolist() == [1, 1]
    denoiser.predict(x, level, denoiser.unconditional(condition))
    assert seen[-1][1].tolist() == [2, 2]
    denoiser.predict(x, level)
    assert seen[-1][1] is None
    assert denoiser.unconditional(None) is None
    assert Diffusion(Net(0)).denoiser().condition({}, [0, 1]) is None


def test_a_model_that_always_saw_its_labels_cannot_leave_them_out():
    denoiser: Any = Diffusion(Net(), label_dropout=0.0).denoiser()
    with pytest.raises(CompositionError, match="never trained without its labels"):
        denoiser.unconditional(denoiser.condition({}, [0, 1]))


def test_states_and_samples_are_each_others_inverse():
    denoiser: Any = Diffusion(Net(), center=3.0, scale=2.0).denoiser()
    samples = torch.randn(5, 2) * 4
    assert torch.allclose(denoiser.encode(samples), (samples - 3) / 2)
    assert torch.allclose(denoiser.decode(denoiser.encode(samples)), samples, atol=1e-6)
    assert denoiser.decode(samples.bfloat16()).dtype == torch.bfloat16


def test_the_shape_is_that_of_the_data():
    task: Any = Diffusion(Net())
    denoiser: Any = task.denoiser()
    with pytest.raises(CompositionError, match="what a sample of this model looks like"):
        _ = denoiser.shape
    denoiser.attach(Points(), None)
    assert denoiser.shape == (2,)
    again = Diffusion(Net())
    again.load_state_dict(task.state_dict())
    assert again.denoiser().shape == (2,)


def test_moments_are_those_of_the_data_as_states():
    task, data = Diffusion(Net(), center=3.0, scale=2.0), Points()
    denoiser: Any = task.denoiser()
    with pytest.raises(CompositionError, match="does not know its data"):
        denoiser.moments()
    denoiser.attach(data, None)
    torch.manual_seed(0)
    mean, covariance = denoiser.moments()
    assert float(torch.rand(())) == float(torch.rand((), generator=torch.Generator().manual_seed(0)))
    states = ((data.x - 3) / 2).double()
    assert torch.allclose(mean, states.mean(0), atol=1e-6)
    assert torch.allclose(covariance, torch.cov(states.T, correction=0), atol=1e-6)
    assert mean.dtype == covariance.dtype == torch.float64


def test_a_fingerprint_follows_the_weights_and_the_units():
    torch.manual_seed(0)
    task: Any = Diffusion(Net())
    denoiser: Any = task.denoiser()
    first = denoiser.fingerprint()
    assert first == task.denoiser().fingerprint()
    with torch.no_grad():
        task.model.layer.weight[0, 0] += 1e-6
    second = denoiser.fingerprint()
    task.scale.fill_(3.0)
    assert len({first, second, denoiser.fingerprint()}) == 3
    other = FlowMatching(Net())
    other.load_state_dict(task.state_dict())
    assert other.denoiser().fingerprint() != denoiser.fingerprint()


def test_it_says_what_it_is():
    task: Any = FlowMatching(Net().bfloat16(), coupling="exact")
    denoiser: Any = task.denoiser()
    assert denoiser.dtype == torch.bfloat16
    assert (denoiser.form, denoiser.classes, denoiser.sampler_name) == ("flow", 2, "flow_heun")
    assert denoiser.path is task.noise_path()
    assert denoiser.gives == task.gives
    moved = denoiser.to(torch.device("meta"))
    assert moved.device.type == "meta"
    assert next(task.parameters()).device.type == "meta"


def test_half_precision_samples_are_finite():
    task: Any = Diffusion(Net().bfloat16())
    task.state_sizes[0] = 2
    denoiser: Any = task.denoiser()
    sampler = DDIM(4)
    found = sample(denoiser, sampler, sampler.grid(denoiser.path, UniformLambda()), range(3)).x
    assert found.dtype == torch.bfloat16
    assert bool(found.isfinite().all())


def test_gradients_reach_the_states():
    denoiser: Any = Diffusion(Net()).denoiser()
    x = torch.randn(2, 2, requires_grad=True)
    prediction = denoiser.predict(x, denoiser.path.level(0.3))
    assert isinstance(prediction, Prediction)
    prediction.data.sum().backward()
    assert bool((x.grad != 0).all())


def test_samples_are_measured_and_drawn_by_the_data_that_the_model_was_trained_on(tmp_path, monkeypatch):
    from lightrail_generation.quality.sample_quality import SampleQuality

    asked = []

    class Quality:
        def measure(self, samples, labels):
            asked.append((samples, labels))
            return {"kid": 0.5}

        def figures(self, samples, labels):
            return {"samples": "figure"}

    def for_data(data, folder):
        asked.append((data, folder))
        return Quality()

    monkeypatch.setattr(SampleQuality, "for_data", staticmethod(for_data))
    denoiser, data = Diffusion(Net()).denoiser(), Points()
    samples = torch.randn(4, 2)
    generated = Generated(samples, samples, {"label": torch.tensor([0, 1, 0, 1])})
    assert denoiser.measure(generated) == {}
    denoiser.attach(data, tmp_path)
    assert denoiser.measure(generated) == {"kid": 0.5}
    assert denoiser.figures(generated) == {"samples": "figure"}
    assert asked[0] == (data, tmp_path)
    assert len(asked) == 2
    assert asked[1][0] is samples
    assert asked[1][1].tolist() == [0, 1, 0, 1]
    denoiser.measure(Generated(samples, samples, {"label": torch.tensor([0, 2, 2, 1])}))
    assert asked[-1][1] is None
