"""The heavy-tailed noise of PFGM++."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import nn

from lightrail.errors import ConfigurationError
from lightrail.generation import Noise, sample
from lightrail_generation.samplers.edm import EDMHeun
from lightrail_generation.tasks.denoising import Example
from lightrail_generation.tasks.diffusion import Diffusion
from lightrail_generation.tasks.draws import Draws
from lightrail_generation.tasks.pfgmpp import PFGMPP, field_noise
from lightrail_generation.time_grids.karras import Karras


class Linear(nn.Module):
    """θ x."""

    def __init__(self, theta=0.0):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, x, time, label):
        return self.theta * x


def draws(seed=0):
    return Draws(torch.Generator().manual_seed(seed), torch.device("cpu"))


def noise(count, features, augmented, seed=0):
    source = draws(seed)
    u = (source._moved(torch.randperm(count, generator=source.generator)) + 0.5) / count
    return field_noise(source.normal(torch.zeros(count, features, dtype=torch.float64)), u, augmented)


@pytest.mark.parametrize(("features", "augmented"), [(2, 8), (2, 64), (3, 2048), (64, 128)])
def test_the_radius_is_that_of_the_field(features, augmented):
    """R = √D √(B/(1 − B)) with B ~ Beta(N/2, D/2), at σ = 1."""
    found = noise(4000, features, augmented).norm(dim=1)
    squares = found.square() / augmented
    beta = squares / (1 + squares)
    assert stats.kstest(beta.numpy(), stats.beta(features / 2, augmented / 2).cdf).pvalue > 1e-3
    assert stats.kstest(beta.numpy(), stats.beta(features / 2, augmented).cdf).pvalue < 1e-3


def test_directions_are_uniform_and_do_not_depend_on_the_radius():
    found = noise(20000, 2, 8)
    angle = torch.atan2(found[:, 1], found[:, 0]) / (2 * math.pi) + 0.5
    assert stats.kstest(angle.numpy(), "uniform").pvalue > 1e-3
    rank_correlation: Any = stats.spearmanr(angle.numpy(), found.norm(dim=1).numpy())
    assert abs(rank_correlation.statistic) < 0.03


@pytest.mark.parametrize("augmented", [6.0, 8.0, 100.0])
def test_the_second_moment_is_known(augmented):
    """E‖noise‖² = N σ² D/(D − 2)."""
    found = noise(200000, 2, augmented).square().sum(1).mean().item()
    assert found == pytest.approx(2 * augmented / (augmented - 2), rel=0.02)


def test_with_many_dimensions_the_noise_is_gaussian():
    """The kurtosis of a multivariate t is 3 (D − 2)/(D − 4)."""

    def kurtosis(augmented):
        x = noise(400000, 2, augmented).flatten()
        return (x**4).mean().item() / x.square().mean().item() ** 2

    assert kurtosis(1e6) == pytest.approx(3.0, abs=0.03)
    assert kurtosis(12.0) == pytest.approx(3 * 10 / 8, abs=0.15)
    source = draws()
    g = source.normal(torch.zeros(100, 2, dtype=torch.float64))
    assert torch.allclose(field_noise(g, source.uniform(100), 1e12), g, rtol=1e-4)


def test_with_many_dimensions_the_loss_is_karras_own():
    x0 = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    t = torch.linspace(0.05, 20, 64, dtype=torch.float64)
    ours = PFGMPP(Linear(0.2), augmented_dimensions=1e14).double()
    theirs = Diffusion(Linear(0.2), schedule="edm").double()
    z = ours.noise(Example(x0, None, None, t, draws()))
    found = ours.losses(Example(x0, None, None, t, draws()))
    expected = theirs.losses(Example(x0, None, None, t, draws(), z))
    assert torch.allclose(found, expected, rtol=1e-10)
    assert torch.allclose(z, draws_of_g(x0), rtol=1e-5)


def draws_of_g(x0):
    source = draws()
    source.uniform(len(x0))
    return source.normal(x0)


@pytest.mark.parametrize("augmented", [0.5, 1.0, 2.0])
def test_the_farthest_draws_are_cut_off(augmented):
    found = noise(20000, 2, augmented)
    assert bool(found.isfinite().all())
    furthest = math.sqrt(999 * augmented)
    assert found.norm(dim=1).max().item() == pytest.approx(furthest, rel=1e-9)


@pytest.mark.parametrize("u", [0.0, 1.0])
def test_the_ends_of_the_uniform_numbers_are_finite(u):
    g = torch.ones(1, 4)
    for augmented in (0.5, 128.0, 1e6):
        assert bool(field_noise(g, torch.tensor([u]), augmented).isfinite().all())


def test_sampling_starts_from_the_same_noise():
    task: Any = PFGMPP(Linear(), augmented_dimensions=8.0)
    level = task.path.level(task.path.t_max)
    start = task.start(Noise(3, range(4000), (2,), torch.float64), level)
    squares = (start.norm(dim=1) / (80.0 * math.sqrt(8))).square()
    assert stats.kstest((squares / (1 + squares)).numpy(), stats.beta(1, 4).cdf).pvalue > 1e-3


def test_a_sample_starts_from_the_same_state_in_any_batch():
    task: Any = PFGMPP(Linear(), augmented_dimensions=8.0)
    level = task.path.level(task.path.t_max)
    both = task.start(Noise(3, [5, 9], (2,)), level)
    alone = task.start(Noise(3, [9], (2,)), level)
    assert torch.equal(both[1:], alone)
    assert not torch.equal(task.start(Noise(4, [9], (2,)), level), alone)


def test_half_precision_starts_are_finite():
    task: Any = PFGMPP(Linear(), augmented_dimensions=128.0)
    start = task.start(Noise(3, range(500), (2,), torch.bfloat16), task.path.level(80.0))
    assert start.dtype == torch.bfloat16
    assert bool(start.isfinite().all())


def test_it_generates_with_the_equation_of_edm():
    task: Any = PFGMPP(Linear(0.0), augmented_dimensions=64.0, sigma_data=0.5).double()
    task.state_sizes[0] = 2
    denoiser, sampler = task.denoiser(), EDMHeun(30)
    grid = sampler.grid(denoiser.path, Karras())
    found = sample(denoiser, sampler, grid, range(4000)).x
    # F = 0 is the denoiser of a Gaussian with standard deviation 0.5: x shrinks by σ_data/√(σ_data² + σ_max²), and the
    # heavy tails of the start remain.
    start = task.start(Noise(0, range(4000), (2,), torch.float64), grid[0])
    assert torch.allclose(found, start * 0.5 / math.sqrt(0.25 + 80.0**2), rtol=2e-2, atol=1e-4)


def test_there_is_no_score():
    assert "score" not in PFGMPP(nn.Identity()).denoiser().gives


def test_the_dimensions_are_positive():
    with pytest.raises(ConfigurationError, match="augmented_dimensions"):
        PFGMPP(nn.Identity(), augmented_dimensions=0)
