"""Grams by hand, where it is AdamW, and what its direction promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightrail.errors import ConfigurationError
from lightrail_optimizers import Grams, adam_rule


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


def by_numpy(gradients, x=(1.0, -2.0), lr=0.1, wd=0.1, b1=0.9, b2=0.999, eps=1e-6):
    x, m, v = np.array(x), 0.0, 0.0
    for t, gradient in enumerate(gradients, 1):
        g = gradient.numpy()
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        u = np.sqrt(1 - b2**t) / (1 - b1**t) * np.abs(m) / (np.sqrt(v) + eps) * np.sign(g)
        x = (1 - lr * wd) * x - lr * u
    return torch.from_numpy(x)


@pytest.mark.parametrize("fused", [True, False])
def test_two_steps_by_hand(fused, monkeypatch):
    if not fused:
        monkeypatch.setattr(adam_rule, "_can_fuse", lambda *lists: False)
    after = [(0.8900063242, -1.8800031622), (0.7845907885, -1.9081485068)]
    for count, expected in enumerate(after, 1):
        w = nn.Parameter(doubles(1.0, -2.0))
        found = stepped(Grams([w], lr=0.1, weight_decay=0.1), w, *GRADIENTS[:count])
        close(found, doubles(*expected), atol=6e-11)  # all of the ten digits
        close(found, by_numpy(GRADIENTS[:count]))


def test_it_is_adamw_where_momentum_and_gradient_agree():
    w, v = nn.Parameter(random(50)), nn.Parameter(random(50))
    # A tiny eps makes no difference between the two places at which it can be added.
    ours = Grams([w], lr=0.1, weight_decay=0.1, eps=1e-30)
    theirs = torch.optim.AdamW([v], lr=0.1, weight_decay=0.1, eps=1e-30)
    first, second = random(50, seed=1), random(50, seed=2)
    close(stepped(ours, w, first), stepped(theirs, v, first))
    close(stepped(ours, w, second), stepped(theirs, v, second), atol=1)
    agree = torch.sign(ours.state[w]["momentum"]) == torch.sign(second)
    assert 10 < agree.sum() < 50
    close(w[agree], v[agree])
    assert ((w - v).abs()[~agree] > 1e-5).all()


def test_no_step_goes_against_the_gradient():
    w = nn.Parameter(random(50))
    optimizer = Grams([w], lr=0.1)
    for seed in range(8):
        before, gradient = w.detach().clone(), random(50, seed=seed)
        moved = stepped(optimizer, w, gradient) - before
        assert (moved * gradient <= 0).all()
        assert (moved != 0).all()


def test_a_coordinate_without_gradient_stays_though_it_has_momentum():
    w = nn.Parameter(doubles(1.0, -2.0))
    found = stepped(Grams([w], lr=0.1), w, doubles(0.5, -1.0))[0].clone()
    optimizer = Grams([w], lr=0.1)
    found = stepped(optimizer, w, doubles(0.5, -1.0)).clone()
    after = stepped(optimizer, w, doubles(0.0, -1.0))
    assert after[0] == found[0]
    assert after[1] != found[1]
    assert optimizer.state[w]["momentum"][0] != 0


def test_tiny_gradients_keep_their_sign():
    """A product of momentum and gradient would be zero in single precision."""
    w = nn.Parameter(torch.tensor([1.0, 1.0]))
    found = stepped(Grams([w], lr=0.1, eps=1e-38), w, torch.tensor([1e-24, -1e-24]))
    assert found[0] < 1 < found[1]


def test_the_gradient_is_left_as_it_is():
    w = nn.Parameter(doubles(1.0, -2.0))
    stepped(Grams([w]), w, GRADIENTS[0])
    assert w.grad is not None
    assert torch.equal(w.grad, GRADIENTS[0])


def test_agrees_with_pytorch_optimizer():
    module = pytest.importorskip("pytorch_optimizer")
    w, v = nn.Parameter(random(5, 3)), nn.Parameter(random(5, 3))
    ours = Grams([w], lr=0.01, weight_decay=0.1, eps=1e-30)
    theirs = module.Grams([v], lr=0.01, weight_decay=0.1, eps=1e-30)
    for seed in range(6):
        close(stepped(ours, w, random(5, 3, seed=seed)), stepped(theirs, v, random(5, 3, seed=seed)), atol=1e-10)


def test_it_descends_faster_than_adam_where_the_gradient_turns():
    """One step from a momentum that points the wrong way: Adam climbs, Grams descends."""
    curvature = torch.linspace(1, 5, 20, dtype=torch.float64)
    losses = {}
    for kind in (Grams, torch.optim.Adam):
        x = nn.Parameter(torch.ones(20, dtype=torch.float64))
        optimizer = kind([x], lr=0.05)
        stepped(optimizer, x, *[-curvature * (1 + 0.1 * random(20, seed=seed).abs()) for seed in range(5)])
        with torch.no_grad():
            x.fill_(1.0)
        stepped(optimizer, x, curvature * x.detach())
        losses[kind] = float((curvature * x.detach() ** 2).sum() / 2)
    start = float(curvature.sum() / 2)
    assert losses[Grams] < start < losses[torch.optim.Adam]


@pytest.mark.parametrize("options", [{"lr": -1}, {"betas": (1.0, 0.9)}, {"eps": 0.0}, {"weight_decay": -1}])
def test_options_out_of_range(options):
    with pytest.raises(ConfigurationError, match="out of range"):
        Grams([nn.Parameter(random(2))], **options)
