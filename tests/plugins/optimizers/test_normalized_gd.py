"""Normalized gradient descent: the length of its steps, and losses on which gradient descent diverges."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightrail.errors import ConfigurationError
from lightrail_optimizers import NormalizedGD
from lightrail_optimizers.normalized_gd import normalized_step


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def moved(optimizer, *pairs):
    """How far all parameters moved together."""
    before = [p.detach().clone() for p, _ in pairs]
    for p, g in pairs:
        p.grad = g.clone()
    optimizer.step()
    steps = [p.detach() - b for (p, _), b in zip(pairs, before, strict=True)]
    return float(torch.linalg.vector_norm(torch.cat([s.flatten() for s in steps])))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_at_beta_one_the_step_has_the_length_lr_over_all_groups(scale):
    a, b = nn.Parameter(doubles(1.0, 2.0)), nn.Parameter(doubles(3.0))
    optimizer = NormalizedGD([{"params": [a]}, {"params": [b]}], lr=0.3)
    assert moved(optimizer, (a, scale * doubles(3.0, 4.0)), (b, scale * doubles(12.0))) == pytest.approx(0.3, abs=1e-12)


def test_by_hand():
    w = nn.Parameter(doubles(1.0, 1.0))
    moved(NormalizedGD([w], lr=0.1, beta=0.5), (w, doubles(9.6, 12.8)))  # a norm of 16
    torch.testing.assert_close(w.detach(), doubles(1 - 0.24, 1 - 0.32), rtol=0, atol=1e-12)


def test_groups_have_their_own_lr_and_power_under_one_norm():
    a, b = nn.Parameter(doubles(0.0)), nn.Parameter(doubles(0.0))
    optimizer = NormalizedGD([{"params": [a], "lr": 1.0}, {"params": [b], "beta": 0.5}], lr=0.1)
    moved(optimizer, (a, doubles(2.4)), (b, doubles(3.2)))  # a norm of 4
    assert a.item() == pytest.approx(-0.6, abs=1e-12)
    assert b.item() == pytest.approx(-0.16, abs=1e-12)


def test_a_gradient_of_zero_moves_nothing():
    w = nn.Parameter(doubles(1.0, 2.0))
    for beta in (1.0, 0.5):
        assert moved(NormalizedGD([w], lr=0.1, beta=beta), (w, doubles(0.0, 0.0))) == 0.0
    assert w.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(("loss_fn", "start"), [(lambda w: w.norm().exp(), 20.0), (lambda w: (w**4).sum(), 1e3)])
def test_it_descends_where_gradient_descent_diverges_or_stands_still(loss_fn, start):
    def last(make, steps=400):
        w = nn.Parameter(doubles(start, -start))
        optimizer = make([w])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / steps)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = loss_fn(w)
            loss.backward()
            optimizer.step()
            schedule.step()
        return loss_fn(w).item()

    first = loss_fn(doubles(start, -start)).item()
    lr = 2 * 2**0.5 * start / 400 * 1.05  # far enough in all, under a schedule that halves the way
    assert last(lambda p: NormalizedGD(p, lr=lr)) < max(4.0, 1e-9 * first)
    for exponent in range(-24, 1, 2):
        end = last(lambda p, lr=10.0**exponent: torch.optim.SGD(p, lr=lr), 60)
        assert not end < 1e-6 * first  # or it is not finite


def test_a_tensor_as_scale_is_the_number():
    x, y = [doubles(1.0, 2.0)], [doubles(1.0, 2.0)]
    normalized_step(x, [doubles(3.0, 4.0)], doubles(5.0)[0], lr=0.5)
    from lightrail_optimizers.tensor_lists import add_scaled_

    add_scaled_(y, [doubles(3.0, 4.0)], torch.tensor(-0.1, dtype=torch.float64))
    assert torch.allclose(x[0], y[0], rtol=0, atol=1e-15)


@pytest.mark.parametrize("beta", [0.0, 1.5])
def test_beta_out_of_range_is_named(beta):
    with pytest.raises(ConfigurationError, match="beta"):
        NormalizedGD([nn.Parameter(torch.ones(1))], beta=beta)
