"""ProxSkip-VIP: the equilibrium in few communications, and what is always so."""

from __future__ import annotations

import math

import pytest
import torch
from federated_games import client_fields, game_rounds

from lightrail.errors import ConfigurationError
from lightrail.federated.randomness import generator_for
from lightrail.testing.federated_runs import ClientGames
from lightrail_federated.local_sgda import descended
from lightrail_federated.proxskip_vip import (
    ProxSkipVIP,
    communicated,
    corrected,
    skipped,
    steps_until_heads,
    variance_reduced,
)

M, m = client_fields()
METHOD = "lightrail_federated.proxskip_vip.ProxSkipVIP"
GAMMA, MU = 1 / 3.39, 0.1


def fields(x):
    return torch.einsum("kij,kj->ki", M, x) + m


def proxskip(steps, p):
    """The method as the paper writes it; local steps before each communication are given."""
    x = h = torch.zeros(10, 20, dtype=torch.float64)
    for count in steps:
        for _ in range(count):
            x = skipped(x, fields(x), h, GAMMA)
        mean = communicated(x, h, GAMMA, p).mean(0).expand(10, 20)
        h = corrected(h, mean, x, GAMMA, p)
        x = mean
        assert float(h.sum(0).abs().max()) < 1e-13
    return x[0]


def squared_error(x):
    away = x - ClientGames().equilibrium
    return float(away.square().sum() / ClientGames().equilibrium.square().sum())


def test_it_reaches_the_equilibrium_where_local_steps_alone_stall():
    p = math.sqrt(GAMMA * MU)
    generator = torch.Generator().manual_seed(0)
    assert squared_error(proxskip([steps_until_heads(p, generator) for _ in range(150)], p)) < 1e-24
    x = torch.zeros(10, 20, dtype=torch.float64)
    for _ in range(150):
        for _ in range(5):
            x = descended(x, fields, GAMMA)
        x = x.mean(0).expand(10, 20)
    assert squared_error(x[0]) > 1e-2


def test_rounds_are_communications_of_the_paper(tmp_path):
    rounds = game_rounds(tmp_path, METHOD, 8, f"federated.lr={GAMMA}", "federated.p=0.25", "federated.estimator=full")
    seed = rounds.method.seed
    steps = [steps_until_heads(0.25, generator_for(seed, "coins", i)) for i in range(8)]
    assert len(set(steps)) > 1
    assert torch.allclose(rounds.state["weights"], proxskip(steps, 0.25), rtol=0, atol=1e-14)


@pytest.mark.parametrize("estimator", ["batch", "lsvrgda"])
def test_if_every_coin_shows_heads_it_is_descent_and_ascent(tmp_path, estimator):
    options = [f"federated.lr={GAMMA}", "federated.p=1.0", f"federated.estimator={estimator}", "federated.refresh=0.3"]
    rounds = game_rounds(tmp_path, METHOD, 4, *options)
    x = torch.zeros(20, dtype=torch.float64)
    for _ in range(4):
        x = descended(x, lambda z: M.mean(0) @ z + m.mean(0), GAMMA)
    assert torch.allclose(rounds.state["weights"], x, rtol=0, atol=1e-15)


def test_the_reduced_variance_is_none_where_the_point_is_the_reference():
    generator = torch.Generator().manual_seed(0)
    batch, full = torch.randn(2, 5, generator=generator)
    assert torch.equal(variance_reduced(batch, batch, full), full)


def test_steps_until_heads_are_geometric():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([steps_until_heads(0.2, generator) for _ in range(4000)]).double()
    assert abs(float(drawn.mean()) - 5) < 3 * math.sqrt(20 / 4000)
    assert abs(float((drawn == 1).double().mean()) - 0.2) < 3 * math.sqrt(0.16 / 4000)
    assert drawn.min() == 1


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"p": 0.0}, {"p": 1.5}, {"estimator": "sgd"}, {"fraction": 0.5}])
def test_refused_options(wrong):
    with pytest.raises(ConfigurationError):
        ProxSkipVIP(**wrong)
