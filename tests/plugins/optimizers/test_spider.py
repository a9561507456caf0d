"""SPIDER: its estimate is the true gradient where there is no noise, and follows the paper's rule where there is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightrail import Closure
from lightrail.errors import ClosureError, ConfigurationError
from lightrail_optimizers import NormalizedGD, Spider


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


CURVATURE = torch.tensor([[1.0, 0.3], [0.3, 4.0]], dtype=torch.float64)


def loss_of(w):
    """A quadratic whose gradient is noisy: each sample has a curvature and a slope of its own."""

    def loss(batch):
        quadratic = ((w @ CURVATURE) * w).sum() / 2
        return (quadratic * (1 + batch[:, 0]) + batch[:, 1:] @ w).mean()

    return loss


def gradient(x, batch):
    return CURVATURE @ x * (1 + batch[:, 0].mean()) + batch[:, 1:].mean(0)


def batches(count, size=4, noise=1.0):
    generator = torch.Generator().manual_seed(0)
    return [noise * torch.randn(size, 3, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_without_noise_the_estimate_is_the_gradient():
    w = nn.Parameter(doubles(3.0, -2.0))
    optimizer = Spider([w], lr=0.1, restart_every=7)
    for batch in batches(20, noise=0.0):
        before = w.detach().clone()
        optimizer.step(Closure(loss_of(w), [w], batch))
        torch.testing.assert_close(optimizer.state[w]["estimate"], CURVATURE @ before, rtol=0, atol=1e-12)
        assert float((w.detach() - before).norm()) == pytest.approx(0.1, abs=1e-12)


@pytest.mark.parametrize("anchor_batches", [1, 3])
def test_it_is_the_papers_rule(anchor_batches):
    w = nn.Parameter(doubles(3.0, -2.0))
    optimizer = Spider([w], lr=0.05, restart_every=4, anchor_batches=anchor_batches)
    drawn = iter(batches(2 * (anchor_batches + 3)))
    x, previous, v = doubles(3.0, -2.0), doubles(0.0, 0.0), doubles(0.0, 0.0)
    for _ in range(2):
        for move in range(4):
            used = [next(drawn) for _ in range(anchor_batches if move == 0 else 1)]
            for position, batch in enumerate(used):
                closure = Closure(loss_of(w), [w], batch)
                loss = optimizer.step(closure)
                assert float(loss) == pytest.approx(float(loss_of(x)(batch)), abs=1e-12)
                assert closure.evaluations == (1 if move == 0 else 2)
                if position + 1 < len(used):
                    assert torch.allclose(w, x, rtol=0, atol=1e-12)  # nothing moves before the anchor is complete
            if move == 0:
                v = torch.stack([gradient(x, batch) for batch in used]).mean(0)
            else:
                v = gradient(x, used[0]) - gradient(previous, used[0]) + v
            previous, x = x, x - 0.05 * v / v.norm()
            torch.testing.assert_close(w.detach(), x, rtol=0, atol=1e-12)


def test_restarting_at_every_move_is_normalized_gradient_descent():
    w, u = nn.Parameter(doubles(3.0, -2.0)), nn.Parameter(doubles(3.0, -2.0))
    ours, reference = Spider([w], lr=0.1, restart_every=1), NormalizedGD([u], lr=0.1)
    for batch in batches(6):
        ours.step(Closure(loss_of(w), [w], batch))
        reference.step(Closure(loss_of(u), [u], batch))
        assert torch.equal(w, u)


def test_between_restarts_noise_that_does_not_depend_on_the_point_does_not_enter():
    """Each sample adds a slope of its own, which the difference of two gradients on one batch takes out."""
    w = nn.Parameter(doubles(3.0, -2.0))
    optimizer = Spider([w], lr=0.01, restart_every=50, anchor_batches=1)
    for t, batch in enumerate(batches(40)):
        batch[:, 0] = 0.0
        if t == 0:
            batch[:] = 0.0
        before = w.detach().clone()
        optimizer.step(Closure(loss_of(w), [w], batch))
        torch.testing.assert_close(optimizer.state[w]["estimate"], CURVATURE @ before, rtol=0, atol=1e-12)


def test_a_parameter_that_joins_between_restarts_begins_with_its_gradient():
    w, late = nn.Parameter(doubles(3.0)), nn.Parameter(doubles(1.0))
    optimizer = Spider([w, late], lr=0.1, restart_every=10)
    used = [False]

    def loss():
        return (w**2).sum() / 2 + ((w * late**2).sum() if used[0] else 0.0)

    for used[0] in (False, False, True):
        before = late.detach().clone()
        at = w.detach().clone()
        optimizer.step(Closure(loss, [w, late]))
    assert not torch.equal(late, before)
    torch.testing.assert_close(optimizer.state[late]["estimate"], 2 * at * before, rtol=0, atol=1e-12)


def test_a_group_that_joins_later_restarts_with_the_others():
    a, b = nn.Parameter(doubles(3.0)), nn.Parameter(doubles(1.0))
    optimizer = Spider([a], restart_every=3)
    optimizer.step(Closure(lambda: (a**2).sum(), [a]))
    optimizer.add_param_group({"params": [b]})
    for _ in range(4):
        optimizer.step(Closure(lambda: (a**2).sum() + (b**2).sum(), [a, b]))
    assert [group["batches_seen"] for group in optimizer.param_groups] == [5, 5]


def test_it_needs_a_closure_that_evaluates_elsewhere():
    w = nn.Parameter(doubles(1.0))
    optimizer = Spider([w])
    for closure in (None, lambda: (w**2).sum()):
        with pytest.raises(ClosureError, match="Spider"):
            optimizer.step(closure)


@pytest.mark.parametrize("option", ["restart_every", "anchor_batches"])
def test_counts_below_one_are_named(option):
    with pytest.raises(ConfigurationError, match=option):
        Spider([nn.Parameter(torch.ones(1))], **{option: 0})
