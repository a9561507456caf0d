"""Local curvature smoothing with Stein's identity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightrail.errors import ConfigurationError
from lightrail_generation.tasks.denoising import Example
from lightrail_generation.tasks.draws import Draws
from lightrail_generation.tasks.lcss import LCSS


class Linear(nn.Module):
    """θ x."""

    def __init__(self, theta=0.0):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, x, time, label):
        return self.theta * x


class Bent(nn.Module):
    """A fixed nonlinear field whose divergence is known."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, time, label):
        return self.one * torch.stack(((2 * x[:, 0]).sin() + x.sum(1), x[:, 0] * x[:, 1]), 1)


class Fixed(Draws):
    """Gives the numbers that it was given."""

    def __init__(self, *numbers):
        super().__init__(torch.Generator(), torch.device("cpu"))
        self.numbers = list(numbers)

    def normal(self, like):
        return self.numbers.pop(0)


def whitened(count, columns, seed=0):
    """Columns with exact second moments: identity."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(count, columns, generator=generator, dtype=torch.float64))
    return q * count**0.5


def slope_of_the_score(task, variance, t):
    """k of s(x) = −k x where the loss is least, for data N(0, variance)."""
    columns = whitened(512, 6)
    x0, z, smoothing = variance**0.5 * columns[:, :2], columns[:, 2:4], columns[:, 4:]
    times = torch.full((512,), t, dtype=torch.float64)

    def gradient(theta):
        with torch.no_grad():
            task.model.theta.fill_(theta)
        loss = task.losses(Example(x0, None, None, times, Fixed(z, smoothing))).mean()
        (slope,) = torch.autograd.grad(loss, task.model.theta)
        return slope.item()

    at_zero, at_one = gradient(0.0), gradient(1.0)
    level = task.path.level(t)
    return at_zero / (at_zero - at_one) / level.sigma


@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("smoothing", [0.2, 0.5, 2.0])
def test_the_readings_learn_different_scores(t, smoothing):
    """The norm at the state gives the state's own score, 1/v; at the perturbed state that of the sum, 1/(v + ς²)."""
    own = LCSS(Linear(), smoothing=smoothing, schedule="linear").double()
    perturbed = LCSS(Linear(), norm_at="perturbed", smoothing=smoothing, schedule="linear").double()
    level = own.path.level(t)
    v = level.alpha**2 * 0.7 + level.sigma**2
    assert slope_of_the_score(own, 0.7, t) == pytest.approx(1 / v, rel=1e-9)
    added = (smoothing * level.sigma) ** 2
    assert slope_of_the_score(perturbed, 0.7, t) == pytest.approx(1 / (v + added), rel=1e-9)
    assert abs(1 / v - 1 / (v + added)) > 1e-3


def test_the_reading_by_default_is_the_papers():
    assert LCSS(nn.Identity()).norm_at == "state"


def test_stein_gives_the_trace_of_the_derivative():
    """E σ² s(x')·(x' − x)/ς² = σ² E tr ∇s(x'), with s = −output/σ."""
    task: Any = LCSS(Bent(), smoothing=0.3, antithetic=False, schedule="edm").double()
    level = task.path.level(0.8)
    columns = whitened(200000, 6, seed=1)
    x0, z, smoothing = columns[:, :2], columns[:, 2:4], columns[:, 4:]
    times = torch.full((len(x0),), 0.8, dtype=torch.float64)
    with torch.no_grad():
        losses = task.losses(Example(x0, None, None, times, Fixed(z, smoothing)))
        x = x0 + 0.8 * z
        normed = task.answer(x, level, times, None)
        first = (losses - 0.5 * normed.square().mean(1)).mean().item()
        moved = x + 0.3 * 0.8 * smoothing
        size = (1 + 0.8**2) ** 0.5
        inside = moved / size
        divergence = (2 * (2 * inside[:, 0]).cos() + 1 + inside[:, 0]) / size
    # The loss is averaged over two numbers; −ε·z'/smoothing has the mean −σ tr ∇ε.
    assert first == pytest.approx(-0.8 * divergence.mean().item() / 2, abs=0.02)
    assert abs(first) > 0.1


def test_with_the_norm_at_the_perturbed_state_it_is_denoising_score_matching():
    """½‖ε(x')‖² − ε(x')·z'/c and ½‖ε(x') − z'/c‖² have one gradient."""
    task: Any = LCSS(Linear(0.4), norm_at="perturbed", smoothing=0.5, antithetic=False, schedule="linear").double()
    columns = whitened(64, 6)
    x0, z, smoothing = columns[:, :2], columns[:, 2:4], columns[:, 4:]
    times = torch.full((64,), 0.4, dtype=torch.float64)
    losses = task.losses(Example(x0, None, None, times, Fixed(z, smoothing)))
    level = task.path.level(0.4)
    moved = level.alpha * x0 + level.sigma * z + 0.5 * level.sigma * smoothing
    denoising = 0.5 * (task.model.theta * moved - smoothing / 0.5).square().mean(1)
    assert torch.allclose(denoising - losses, 0.5 * (smoothing / 0.5).square().mean(1), atol=1e-10)


@pytest.mark.parametrize(
    ("norm_at", "antithetic", "passes"),
    [("state", False, 2), ("state", True, 3), ("perturbed", False, 1), ("perturbed", True, 2)],
)
def test_it_costs_as_many_passes_as_it_says(norm_at, antithetic, passes):
    task: Any = LCSS(Linear(), norm_at=norm_at, antithetic=antithetic).double()
    calls = []
    task.model.register_forward_hook(lambda *_: calls.append(1))
    task.training_step(torch.randn(4, 2, dtype=torch.float64), 0)
    assert len(calls) == passes


def test_a_pair_of_signs_has_the_same_mean_and_bounded_noise():
    columns = whitened(512, 6)
    x0, z, smoothing = columns[:, :2], columns[:, 2:4], columns[:, 4:]
    times = torch.full((512,), 0.4, dtype=torch.float64)

    def losses(antithetic, share):
        task: Any = LCSS(Bent(), smoothing=share, antithetic=antithetic, schedule="linear").double()
        with torch.no_grad():
            return task.losses(Example(x0, None, None, times, Fixed(z, smoothing)))

    single, paired = losses(False, 0.01), losses(True, 0.01)
    assert float(single.std()) > 20 * float(paired.std())
    assert float(losses(True, 0.3).std()) == pytest.approx(float(paired.std()), rel=0.3)
    assert abs(float((single - paired).mean())) < 4 * float(single.std()) / 512**0.5


def test_what_it_learns_is_converted_like_any_noise():
    task: Any = LCSS(Linear(0.5), schedule="linear").double()
    x, level = torch.ones(1, 2, dtype=torch.float64), task.path.level(0.3)
    found = task.prediction(x, level, torch.tensor([0.3], dtype=torch.float64), None)
    assert torch.allclose(found.score, -0.5 * x / level.sigma, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"norm_at": "x"}, "norm_at"), ({"smoothing": 0.0}, "smoothing"), ({"schedule": "vp"}, "schedule")],
)
def test_options_that_cannot_be_are_refused(options, named):
    with pytest.raises(ConfigurationError, match=named):
        LCSS(nn.Identity(), **options)
