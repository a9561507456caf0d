"""The probe: the stability bounds of SGD, found by simulation, and what a batch does to the top of the Hessian."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightrail import Closure
from lightrail.errors import ConfigurationError
from lightrail_schedules import max_lr_probe
from lightrail_schedules.max_lr_probe import sharpness_of, stable_lr


def regression(x):
    """The loss of a batch of linear regression: its Hessian is ``xᵀx / b``."""
    w = nn.Parameter(torch.zeros(x.shape[1], dtype=x.dtype))
    return Closure(lambda batch: (batch @ w).square().mean() / 2, [w], x)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0},
        {"momentum": 0.9},
        {"momentum": 0.5, "nesterov": True},
        {"momentum": 0.95, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.9},
    ],
    ids=str,
)
def test_sgd_stays_below_the_bound_and_leaves_above_it(options):
    curvature = 3.0
    bound = stable_lr(curvature, **options)
    for factor, stays in ((0.99, True), (1.01, False)):
        w = nn.Parameter(torch.ones((), dtype=torch.float64))
        optimizer = torch.optim.SGD([w], lr=factor * bound, **options)
        for _ in range(4000):
            w.grad = curvature * w.detach()
            optimizer.step()
        assert (w.detach().abs().item() < 1e-3) is stays, factor


def test_flat_concave_and_not_finite():
    assert stable_lr(0.0) == stable_lr(-1.0) == math.inf
    assert math.isnan(stable_lr(math.nan))
    w = nn.Parameter(torch.ones(3))
    assert max_lr_probe(Closure(lambda: -(w**2).sum(), [w])) == math.inf
    assert math.isnan(max_lr_probe(Closure(lambda: (w * torch.tensor(math.inf)).square().sum(), [w])))


def test_it_finds_the_top_of_a_batch_hessian():
    torch.manual_seed(0)
    x = torch.randn(64, 20, dtype=torch.float64)
    top = float(torch.linalg.eigvalsh(x.T @ x / 64)[-1])
    assert sharpness_of(regression(x)) == pytest.approx(top, rel=1e-3)
    assert max_lr_probe(regression(x), momentum=0.8) == pytest.approx(3.6 / top, rel=1e-3)


def test_the_top_of_batch_hessians_falls_with_the_batch_towards_that_of_all_data():
    torch.manual_seed(0)
    x = torch.randn(4096, 64, dtype=torch.float64)
    x[:, 0] *= 1.5  # one spike above the bulk
    full = sharpness_of(regression(x))
    found = []
    for b in (8, 32, 128, 512, 2048):
        batches = [x[torch.randperm(len(x))[:b]] for _ in range(8)]
        found.append(sum(map(sharpness_of, map(regression, batches))) / 8)
    assert found == sorted(found, reverse=True)
    assert found[0] > 3 * full
    assert full < found[-1] < 1.1 * full


def test_parameters_gradients_and_random_numbers_are_left_alone():
    closure = regression(torch.randn(8, 4))
    (w,) = closure.params
    w.grad = torch.ones(4)
    before, state = w.detach().clone(), torch.get_rng_state()
    max_lr_probe(closure)
    assert torch.equal(w.detach(), before)
    assert torch.equal(w.grad, torch.ones(4))
    assert torch.equal(torch.get_rng_state(), state)


def test_steps_bound_the_products():
    w = nn.Parameter(torch.ones(50))
    closure = Closure(lambda: (torch.linspace(1, 2, 50) * w**2).sum(), [w])
    max_lr_probe(closure, steps=3)
    assert closure.evaluations <= 2 * 3


def test_mistakes():
    closure = regression(torch.randn(8, 4))
    with pytest.raises(ConfigurationError, match="momentum"):
        max_lr_probe(closure, momentum=1.0)
    with pytest.raises(ConfigurationError, match="steps"):
        max_lr_probe(closure, steps=0)
