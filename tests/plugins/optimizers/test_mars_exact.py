"""MARS with the gradient of the current batch at the previous parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightrail import Closure
from lightrail.errors import ClosureError, ConfigurationError
from lightrail.traits import traits_of
from lightrail_optimizers import MARS, MARSLion, MARSShampoo

KINDS = [MARS, MARSLion, MARSShampoo]
K = 0.025 * 0.95 / 0.05  # gamma b1 / (1-b1)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found, expected, atol=1e-12):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


class Task:
    """A loss that differs from batch to batch, with a matrix, a convolution and a bias."""

    def __init__(self):
        self.params = [nn.Parameter(random(3, 2)), nn.Parameter(random(2, 2, 2, 1, seed=1)), nn.Parameter(random(3))]

    def loss(self, batch):
        return 0.05 * torch.stack([((p - batch) ** 4).sum() for p in self.params]).sum()

    def closure(self, batch):
        return Closure(self.loss, self.params, torch.tensor(float(batch)))

    def gradient(self, points, batch):
        points = [p.detach().clone().requires_grad_() for p in points]
        return torch.autograd.grad(0.05 * torch.stack([((p - batch) ** 4).sum() for p in points]).sum(), points)


def exact_by_hand(task, batches, lr=0.1, k=K):
    """MARS-AdamW with the gradient of each batch at the parameters of the step before."""
    x = [p.detach().clone() for p in task.params]
    before, m, v = x, [torch.zeros_like(p) for p in x], [torch.zeros_like(p) for p in x]
    for t, batch in enumerate(batches, 1):
        now, earlier = task.gradient(x, batch), task.gradient(before, batch)
        before = x
        moved = []
        for i, (p, g, g_prev) in enumerate(zip(x, now, earlier, strict=True)):
            c = g + k * (g - g_prev)
            c = c / c.norm().clamp(min=1)
            m[i], v[i] = 0.95 * m[i] + 0.05 * c, 0.99 * v[i] + 0.01 * c**2
            moved.append(p - lr * (m[i] / (1 - 0.95**t)) / ((v[i] / (1 - 0.99**t)).sqrt() + 1e-8))
        x = moved
    return x


BATCHES = (0.5, -0.5, 0.25, 1.0)


def test_exact_takes_the_current_batch_at_the_previous_parameters():
    task = Task()
    expected = exact_by_hand(task, BATCHES)
    optimizer = MARS(task.params, lr=0.1, exact=True, optimize_1d=True)
    evaluations = []
    for batch in BATCHES:
        closure = task.closure(batch)
        before = task.loss(torch.tensor(batch))
        close(optimizer.step(closure), before.detach())
        evaluations.append(closure.evaluations)
    for found, each in zip(task.params, expected, strict=True):
        close(found.detach(), each)
    assert evaluations == [1, 2, 2, 2]
    without = Task()
    approximate = MARS(without.params, lr=0.1, optimize_1d=True)
    for batch in BATCHES:
        approximate.step(without.closure(batch))
    assert not torch.allclose(without.params[0], expected[0], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("maximize", [False, True])
def test_exact_moves_uncorrected_tensors_to_the_previous_point_too(kind, maximize):
    """The bias is AdamW's, but the gradient at the previous parameters depends on it."""
    sign = -1 if maximize else 1

    def loss_of(w, b):
        return lambda batch: sign * ((w * b * batch) ** 2).sum() / 10

    w, b = nn.Parameter(random(2, 2)), nn.Parameter(random(2, seed=1))
    optimizer = kind([w, b], lr=0.1, lr_1d=0.1, exact=True, maximize=maximize)
    points, batches = [], (1.0, 2.0, 3.0)
    for batch in batches:
        points.append((w.detach().clone(), b.detach().clone()))
        optimizer.step(Closure(loss_of(w, b), [w, b], torch.tensor(batch)))
    m = 0.0
    for t, batch in enumerate(batches):
        (w1, b1), (w0, b0) = points[t], points[max(t - 1, 0)]
        g, g_prev = (w1 * b1**2 * batch**2 / 5), (w0 * b0**2 * batch**2 / 5)
        c = g + K * (g - g_prev)
        m = 0.95 * m + 0.05 * c / c.norm().clamp(min=1)
    close(optimizer.state[w]["momentum"], m)
    assert "previous_gradient" not in optimizer.state[w]


def test_exact_keeps_the_place_of_a_parameter_that_was_left_out():
    w, late = nn.Parameter(random(2, 2)), nn.Parameter(random(2, 2, seed=1))
    optimizer = MARS([w, late], lr=0.1, exact=True)
    for used in (True, False, True):
        before = late.detach().clone()
        parts = [w, late] if used else [w]
        optimizer.step(Closure(lambda parts=parts: torch.stack([(p**2).sum() for p in parts]).sum(), [w, late]))
        assert torch.equal(late, before) is not used
        assert torch.equal(optimizer.state[late]["previous"], before)


def test_exact_resumes():
    def run(task, optimizer, batches):
        for batch in batches:
            optimizer.step(task.closure(batch))
        return [p.detach().clone() for p in task.params]

    whole, first, second = Task(), Task(), Task()
    expected = run(whole, MARS(whole.params, lr=0.1, exact=True), BATCHES)
    optimizer = MARS(first.params, lr=0.1, exact=True)
    middle = run(first, optimizer, BATCHES[:2])
    with torch.no_grad():
        for p, value in zip(second.params, middle, strict=True):
            p.copy_(value)
    resumed = MARS(second.params, lr=0.1, exact=True)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for a, b in zip(run(second, resumed, BATCHES[2:]), expected, strict=True):
        assert torch.equal(a, b)


def test_exact_survives_a_deep_copy():
    task = Task()
    optimizer = MARS(task.params, lr=0.1, exact=True)
    optimizer.step(task.closure(0.5))
    twin_task, twin = copy.deepcopy((task, optimizer))
    optimizer.step(task.closure(1.0))
    twin.step(twin_task.closure(1.0))
    for a, b in zip(task.params, twin_task.params, strict=True):
        assert torch.equal(a, b)


def test_exact_declares_and_demands_what_it_needs():
    for kind in KINDS:
        assert not traits_of(kind).evaluates_again
        assert not traits_of(kind, {"exact": False}).evaluates_again
        under = traits_of(kind, {"exact": True})
        assert under.needs_closure
        assert (under.extra_evaluations, under.state) == (1, traits_of(kind).state)
    w = nn.Parameter(random(2, 2))
    with pytest.raises(ClosureError, match="MARS evaluates the gradient at the previous parameters"):
        MARS([w], exact=True).step()
    with pytest.raises(ConfigurationError, match="exact holds for all groups"):
        MARS([{"params": [w], "exact": True}])
