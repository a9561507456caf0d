"""diffGrad by hand, its friction, and the two mistakes that have been published of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightrail.errors import ConfigurationError
from lightrail_optimizers import DiffGrad, adam_rule


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stepped(optimizer, w, *gradients):
    for gradient in gradients:
        w.grad = gradient.clone()
        optimizer.step()
    return w.detach()


def close(found, expected, atol=1e-12):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


GRADIENTS = doubles(0.5, -1.0), doubles(1.0, 0.25)


def by_numpy(gradients, wd=0.0, x=(1.0, -2.0), lr=0.1, b1=0.9, b2=0.999, eps=1e-8):
    x, m, v, g_prev = np.array(x), 0.0, 0.0, 0.0
    for t, gradient in enumerate(gradients, 1):
        g = gradient.numpy() + wd * x
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        xi = 1 / (1 + np.exp(-np.abs(g_prev - g)))
        x = x - lr * np.sqrt(1 - b2**t) / (1 - b1**t) * xi * m / (np.sqrt(v) + eps)
        g_prev = g
    return torch.from_numpy(x)


@pytest.mark.parametrize("fused", [True, False])
def test_two_steps_by_hand(fused, monkeypatch):
    if not fused:
        monkeypatch.setattr(adam_rule, "_can_fuse", lambda *lists: False)
    after = [(0.9377541062, -1.9268941653), (0.8776754674, -1.8904024220)]
    for count, expected in enumerate(after, 1):
        w = nn.Parameter(doubles(1.0, -2.0))
        found = stepped(DiffGrad([w], lr=0.1), w, *GRADIENTS[:count])
        close(found, doubles(*expected), atol=6e-11)  # all of the ten digits
        close(found, by_numpy(GRADIENTS[:count]))


def test_weight_decay_is_part_of_every_gradient_also_of_the_one_that_is_kept():
    w = nn.Parameter(doubles(1.0, -2.0))
    gradients = [*GRADIENTS, doubles(-0.5, 0.5)]
    optimizer = DiffGrad([w], lr=0.1, weight_decay=0.3)
    close(stepped(optimizer, w, *gradients), by_numpy(gradients, wd=0.3))
    at_third_step = by_numpy(gradients[:2], wd=0.3)
    close(optimizer.state[w]["previous_gradient"], gradients[2] + 0.3 * at_third_step)
    assert w.grad is not None
    assert torch.equal(w.grad, gradients[2])


def test_a_constant_gradient_is_followed_at_half_of_adam():
    w, v = nn.Parameter(random(5)), nn.Parameter(random(5))
    ours, theirs = DiffGrad([w], lr=0.1, eps=1e-30), torch.optim.Adam([v], lr=0.1, eps=1e-30)
    gradient = random(5, seed=1)
    for t in range(5):
        before = w.detach().clone(), v.detach().clone()
        moved = [stepped(ours, w, gradient) - before[0], stepped(theirs, v, gradient) - before[1]]
        close(moved[0], moved[1] * (torch.sigmoid(gradient.abs()) if t == 0 else 0.5))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_previous_gradient_is_a_copy(set_to_none):
    """Kept by reference it equals the current one, and the friction is a half from the second step on."""
    w = nn.Parameter(doubles(1.0, -2.0))
    optimizer = DiffGrad([w], lr=0.1)
    for gradient in GRADIENTS:
        optimizer.zero_grad(set_to_none=set_to_none)
        (w * gradient).sum().backward()
        optimizer.step()
    close(w.detach(), by_numpy(GRADIENTS))
    assert w.grad is not None
    assert optimizer.state[w]["previous_gradient"].data_ptr() != w.grad.data_ptr()


def test_agrees_with_pytorch_optimizer():
    module = pytest.importorskip("pytorch_optimizer")
    w, v = nn.Parameter(random(5, 3)), nn.Parameter(random(5, 3))
    ours, theirs = DiffGrad([w], lr=0.01, eps=1e-30), module.DiffGrad([v], lr=0.01, eps=1e-30)
    for seed in range(6):
        close(stepped(ours, w, random(5, 3, seed=seed)), stepped(theirs, v, random(5, 3, seed=seed)), atol=1e-10)


@pytest.mark.parametrize("options", [{"lr": -1}, {"betas": (1.0, 0.9)}, {"eps": 0.0}, {"weight_decay": -1}])
def test_options_out_of_range(options):
    with pytest.raises(ConfigurationError, match="out of range"):
        DiffGrad([nn.Parameter(random(2))], **options)
