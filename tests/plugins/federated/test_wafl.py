# pyright: reportArgumentType=false
"""WAFL: the inner maximum that is known, federated averaging as its limit, and a round by hand."""

from __future__ import annotations

import pytest
import torch
from federated_games import game_rounds

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.testing.federated_runs import ClientClusters
from lightrail_federated.wafl import WAFL, worst_inputs

OPTIONS = ["federated.clients=3", "data.clients=3", "optimizer=sgd", "optimizer.lr=0.5"]


def separated(folder, method, count, *overrides):
    return game_rounds(folder, method, count, *OPTIONS, *overrides, task="Separation", data="ClientClusters")


def test_ascent_finds_the_maximum_of_a_quadratic_loss():
    z, theta, gamma = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64), 3.0
    u = worst_inputs(z, lambda u: u - theta, gamma, 0.3, 60)
    assert torch.allclose(u, (gamma * z - theta) / (gamma - 1), rtol=0, atol=1e-14)
    value = 0.5 * (u - theta).square().sum(1) - 0.5 * gamma * (u - z).square().sum(1)
    assert torch.allclose(value, gamma / (2 * (gamma - 1)) * (z - theta).square().sum(1), rtol=0, atol=1e-14)


def test_inputs_stay_in_their_range():
    u = worst_inputs(torch.tensor([0.5]), lambda u: torch.ones(1), 0.1, 10.0, 3, (0.0, 1.0))
    assert u.tolist() == [1.0]


def test_a_round_is_ascent_and_then_a_step(tmp_path):
    rounds = separated(tmp_path, "lightrail_federated.wafl.WAFL", 0, "federated.ascent_steps=2", "federated.gamma=0.7")
    W = rounds.model.weights().view(4, 4)
    x, y = ClientClusters(3).dataset.tensors
    u = x
    for _ in range(2):
        slope = ((W @ u.T).softmax(0).T - torch.eye(4, dtype=torch.float64)[y]) @ W
        u = u + 0.1 * (slope - 0.7 * (u - x))
    residual = (W @ u.T).softmax(0).T - torch.eye(4, dtype=torch.float64)[y]
    rounds.step()
    assert torch.allclose(rounds.model.weights().view(4, 4), W - 0.5 * residual.T @ u / 24, rtol=0, atol=1e-14)


def test_at_a_great_price_it_is_federated_averaging(tmp_path):
    dear = separated(tmp_path, "lightrail_federated.wafl.WAFL", 2, "federated.gamma=1e14", "federated.ascent_lr=1e-14")
    plain = separated(tmp_path, "lightrail_federated.fedavg.FedAvg", 2)
    assert torch.allclose(dear.model.weights(), plain.model.weights(), rtol=0, atol=1e-12)


def test_refused_options_and_inputs():
    for wrong in ({"gamma": 0.0}, {"ascent_lr": -1.0}, {"ascent_steps": 0}, {"input_range": (1.0, 0.0)}):
        with pytest.raises(ConfigurationError):
            WAFL(**wrong)
    for batch in ({"x": torch.ones(1)}, [torch.ones(2, dtype=torch.int64), torch.ones(2)]):
        with pytest.raises(CompositionError):
            WAFL().worsened(None, batch)
