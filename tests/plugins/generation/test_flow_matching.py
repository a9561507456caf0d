"""Flow matching with coupled batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightrail.errors import ConfigurationError
from lightrail.generation import GaussianMixture, check_fit
from lightrail_generation.samplers.flow import FlowHeun
from lightrail_generation.samplers.si_sde import SISDE
from lightrail_generation.tasks.denoising import Example
from lightrail_generation.tasks.diffusion import Diffusion
from lightrail_generation.tasks.draws import Draws
from lightrail_generation.tasks.flow_matching import FlowMatching

COUPLED = ("exact", "stable", "sinkhorn")


class Linear(nn.Module):
    """θ x."""

    num_classes = 0

    def __init__(self, theta=0.0, num_classes=0):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))
        self.num_classes = num_classes
        self.seen = []

    def forward(self, x, time, label):
        self.seen.append((x.detach(), time, label))
        return self.theta * x


class ExactFlow(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixture = GaussianMixture(path="flow", form="flow")
        self.one = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, time, label):
        return self.one * self.mixture.output(x, time.double(), None)


def points(count=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    side = (torch.arange(count) % 2 * 2 - 1).double()
    spread = 0.2 * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return spread + torch.stack((side, 0 * side), 1), (side > 0).long()


def draws(seed=1):
    return Draws(torch.Generator().manual_seed(seed), torch.device("cpu"))


def at(x0, z, t, label=None):
    return Example(x0, label, None, torch.full((len(x0),), t, dtype=torch.float64), draws(), z)


def test_the_target_is_the_line_from_data_to_noise():
    x0, z = torch.randn(2, 8, 3, dtype=torch.float64)
    task: Any = FlowMatching(Linear(0.0)).double()
    assert torch.allclose(task.losses(at(x0, z, 0.3)), (z - x0).square().mean(1), atol=1e-12)
    assert torch.allclose(task.model.seen[-1][0], 0.7 * x0 + 0.3 * z, atol=1e-12)
    assert torch.allclose(task.model.seen[-1][1], torch.full((8,), 0.3))


def test_the_exact_flow_has_the_least_loss():
    mixture = GaussianMixture()
    generator = torch.Generator().manual_seed(0)
    component = torch.multinomial(mixture.weights, 4000, True, generator=generator)
    z = torch.randn(2, 4000, 2, generator=generator, dtype=torch.float64)
    x0 = mixture.means[component] + mixture.variances[component].sqrt()[:, None] * z[0]
    task: Any = FlowMatching(ExactFlow()).double()
    slopes = []
    for t in (0.1, 0.5, 0.9):
        loss = task.losses(at(x0, z[1], t)).mean()
        (slope,) = torch.autograd.grad(loss, task.model.one)
        slopes.append(abs(slope.item()))
    assert max(slopes) < 0.15  # a wrong sign or factor of the target gives more than 1


@pytest.mark.parametrize("coupling", COUPLED)
def test_with_one_sample_a_coupling_is_plain_flow_matching(coupling):
    x0, _ = points(1)
    found = [
        FlowMatching(Linear(0.3), coupling=each).double().losses(
            Example(x0, None, None, torch.tensor([0.4], dtype=torch.float64), draws())
        )
        for each in ("independent", coupling)
    ]  # fmt: skip
    assert torch.equal(*found)


def test_flow_matching_is_the_diffusion_loss_of_its_path_in_another_weight():
    """‖u − û‖² = ‖x0 − D‖²/t² on straight lines."""
    x0, z = torch.randn(2, 8, 3, dtype=torch.float64)
    task: Any = FlowMatching(Linear(0.3)).double()
    level = task.path.level(0.4)
    x = 0.6 * x0 + 0.4 * z
    times = torch.full((8,), 0.4, dtype=torch.float64)
    data = task.prediction(x, level, times, None).data
    assert torch.allclose(task.losses(at(x0, z, 0.4)), (x0 - data).square().mean(1) / 0.16, atol=1e-10)


@pytest.mark.parametrize("coupling", COUPLED)
def test_a_coupling_makes_targets_smaller_and_gradients_less_noisy(coupling):
    """The gradient of one sample varies less about the mean over samples."""
    x0, _ = points()

    def spread(kind):
        task: Any = FlowMatching(Linear(0.0), coupling=kind).double()
        t = torch.full((256,), 0.5, dtype=torch.float64)
        example = Example(x0, None, None, t, draws())
        residuals = task.residuals(example)
        inputs = task.model.seen[-1][0]
        slopes = (2 * residuals.detach() * inputs).mean(1)
        return residuals.square().mean().item(), slopes.var().item()

    plain, coupled = spread("independent"), spread(coupling)
    assert coupled[0] < 0.75 * plain[0]
    assert coupled[1] < 0.85 * plain[1]


def test_an_exact_coupling_lowers_the_least_loss_that_a_network_can_reach():
    """What is left when the best linear network is subtracted is the curvature of the paths."""
    x0 = points(256)[0][:, :1]
    left = []
    for kind in ("independent", "exact"):
        task: Any = FlowMatching(Linear(0.0), coupling=kind).double()
        residuals = task.residuals(Example(x0, None, None, torch.full((256,), 0.5, dtype=torch.float64), draws()))
        x, y = task.model.seen[-1][0].flatten(), -residuals.detach().flatten()
        theta = (x * y).sum() / (x * x).sum()
        left.append((y - theta * x).square().mean().item())
    assert left[1] < 0.3 * left[0]


@pytest.mark.parametrize("coupling", COUPLED)
def test_labels_say_nothing_of_the_coupled_noise(coupling):
    x0, label = points()
    task: Any = FlowMatching(Linear(0.0, num_classes=2), coupling=coupling, label_dropout=0.5).double()
    z = task.noise(task.example((x0, label), draws()))
    gap = (z[label == 1].mean(0) - z[label == 0].mean(0)).norm().item()
    assert gap < 0.4
    plain = FlowMatching(Linear(0.0), coupling=coupling).double()
    z = plain.noise(plain.example((x0, label), draws()))
    assert (z[label == 1].mean(0) - z[label == 0].mean(0)).norm().item() > 0.8


def test_dropped_labels_are_coupled_by_the_class_that_they_have():
    x0, label = points()
    task: Any = FlowMatching(Linear(0.0, num_classes=2), coupling="exact", label_dropout=0.9).double()
    example: Any = task.example((x0, label), draws())
    assert torch.equal(example.label, label)
    assert not torch.equal(example.shown, label)
    everything = FlowMatching(Linear(0.0, num_classes=2), coupling="exact", label_dropout=0.0).double()
    again: Any = everything.example((x0, label), draws())
    assert torch.equal(again.shown, label)


def test_a_seed_decides_what_the_entropic_plan_gives():
    x0, _ = points(64)
    task: Any = FlowMatching(Linear(0.3), coupling="sinkhorn").double()
    losses = [task.sampled_loss(x0, torch.Generator().manual_seed(seed)).item() for seed in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("coupling", COUPLED)
def test_coupled_noise_gives_no_score(coupling):
    task: Any = FlowMatching(nn.Identity(), coupling=coupling)
    check_fit(task.denoiser(), FlowHeun(5))
    with pytest.raises(Exception, match="score"):
        check_fit(task.denoiser(), SISDE(5))
    check_fit(FlowMatching(nn.Identity()).denoiser(), SISDE(5))


def test_times_reach_both_ends():
    t = FlowMatching(nn.Identity()).time_sampling.times(torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64))
    assert t.tolist() == [0.0, 0.25, 1.0]


def test_the_flow_of_a_diffusion_network_is_the_same_thing():
    """A velocity network on the linear path and a flow network agree about the same denoiser."""
    x = torch.randn(4, 2, dtype=torch.float64)
    level = FlowMatching(nn.Identity()).path.level(0.3)
    times = torch.full((4,), 0.3, dtype=torch.float64)
    flow = FlowMatching(ExactFlow()).double().prediction(x, level, times, None)
    assert torch.allclose(flow.data, GaussianMixture(path="flow").predict(x, level).data, atol=1e-6)
    assert Diffusion(nn.Identity()).form == "velocity"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"coupling": "ot"}, "coupling has no choice 'ot'"),
        ({"regularisation": 0.0}, "regularisation"),
        ({"time_sampling": "beta"}, "time_sampling"),
    ],
)
def test_options_that_cannot_be_are_refused(options, named):
    with pytest.raises(ConfigurationError, match=named):
        FlowMatching(nn.Identity(), **options)
