"""Past extragradient: its two sequences, the point where it is judged, and its relation to optimistic descent."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightrail import Closure
from lightrail.errors import ConfigurationError
from lightrail_optimizers import OptimisticSGD, PastExtragradient

ETA = 0.1


def start():
    return [nn.Parameter(torch.ones((), dtype=torch.float64)) for _ in range(2)]


def closure(x, y):
    """Of the game min over x, max over y of x y."""
    losses = {"x": lambda: x * y, "y": lambda: -x * y}
    return Closure(lambda player: losses[player](), [x, y], players={"x": [x], "y": [y]})


def played(optimizer, x, y, steps):
    """The points of the game, from the start on."""
    points = [(x.item(), y.item())]
    for _ in range(steps):
        optimizer.step(closure(x, y))
        points.append((x.item(), y.item()))
    return np.array(points)


def by_two_sequences(steps):
    """``x_t`` and ``x_{t+1/2}`` of the bilinear game."""
    x, g = np.ones(2), np.zeros(2)
    whole, half = [], []
    for _ in range(steps):
        z = x - ETA * g
        whole.append(x)
        half.append(z)
        g = np.array([z[1], -z[0]])
        x = x - ETA * g
    return np.array(whole), np.array(half)


def test_the_parameters_are_at_the_half_points():
    x, y = start()
    found = played(
        PastExtragradient([{"params": [x], "player": "x"}, {"params": [y], "player": "y"}], lr=ETA), x, y, 200
    )
    assert found == pytest.approx(by_two_sequences(201)[1], abs=1e-9)
    assert np.linalg.norm(found[-1]) < 0.53


def test_eval_goes_to_the_whole_points():
    x, y = start()
    optimizer = PastExtragradient([x, y], lr=ETA)
    whole = []
    for _ in range(200):
        optimizer.eval()
        whole.append((x.item(), y.item()))
        optimizer.train()
        optimizer.step(closure(x, y))
    assert np.array(whole) == pytest.approx(by_two_sequences(200)[0], abs=1e-9)


def test_it_is_optimistic_descent_shifted_by_the_step_ahead():
    """From ``g_0 = 0`` the half points are the points of optimistic descent."""
    x, y = start()
    half = played(PastExtragradient([x, y], lr=ETA), x, y, 50)
    x, y = start()
    optimizer = OptimisticSGD([x, y], lr=ETA)
    for p in (x, y):
        optimizer.state[p] = {"previous_gradient": torch.zeros_like(p), "step": 1}
    assert played(optimizer, x, y, 50) == pytest.approx(half, abs=1e-12)


def test_one_gradient_a_step():
    x, y = start()
    asked = closure(x, y)
    PastExtragradient([x, y], lr=ETA).step(asked)
    assert asked.evaluations == 1


def test_it_does_not_step_from_the_wrong_point():
    x, y = start()
    optimizer = PastExtragradient([x, y], lr=ETA)
    optimizer.step(closure(x, y))
    optimizer.eval()
    with pytest.raises(ConfigurationError, match="half point"):
        optimizer.step(closure(x, y))


def test_a_checkpoint_knows_at_which_point_it_was_made():
    x, y = start()
    optimizer = PastExtragradient([x, y], lr=ETA)
    played(optimizer, x, y, 3)
    expected = x.item()
    optimizer.eval()
    z, w = (nn.Parameter(p.detach().clone()) for p in (x, y))
    resumed = PastExtragradient([z, w], lr=ETA)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.eval()
    assert z.item() == x.item() != expected
    resumed.train()
    assert z.item() == expected


def test_a_parameter_without_gradient_is_at_both_points():
    moving, still = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = PastExtragradient([still, moving], lr=ETA)
    moving.grad = torch.ones(2)
    optimizer.step()
    optimizer.eval()
    assert torch.equal(still, torch.ones(2))
    assert moving.tolist() == pytest.approx([0.9, 0.9])
    optimizer.train()
    assert torch.equal(still, torch.ones(2))
    assert moving.tolist() == pytest.approx([0.8, 0.8])
