# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""FSGLD: the posterior that is known, conducive gradients without a bias, and rounds by hand."""

from __future__ import annotations

import pytest
import torch
from federated_games import client_of, game_rounds, states_of

from lightrail.errors import ConfigurationError
from lightrail.federated.randomness import generator_for
from lightrail_federated.fsgld import FSGLD, conducive_gradient, langevin_step, score

CLIENTS, SAMPLES, PRIOR = 5, 200, 0.01


def gaussians():
    generator = torch.Generator().manual_seed(0)
    centres = torch.linspace(-4, 4, CLIENTS, dtype=torch.float64)[:, None]
    return centres + torch.randn(CLIENTS, SAMPLES, generator=generator, dtype=torch.float64)


def chains(x, visits, local_steps, has_surrogates, count=100, h=1e-4):
    """The mean and the deviation of the last states of chains, each on a way of its own over the clients."""
    generator = torch.Generator().manual_seed(1)
    theta = torch.zeros(count, dtype=torch.float64)
    precision, eta = torch.full((CLIENTS,), SAMPLES, dtype=torch.float64), x.sum(1)
    for _ in range(visits):
        s = torch.randint(CLIENTS, (count,), generator=generator)
        for _ in range(local_steps):
            batch = torch.randint(SAMPLES, (count, 10), generator=generator)
            gradient = theta - x[s[:, None], batch].mean(1)
            v = score(PRIOR, theta, gradient, SAMPLES, 1 / CLIENTS)
            if has_surrogates:
                v = v + conducive_gradient(theta, eta.sum(), precision.sum(), eta[s], precision[s], 1 / CLIENTS)
            theta = langevin_step(theta, v, h, torch.randn(count, generator=generator, dtype=torch.float64))
    return float(theta.mean()), float(theta.std())


def test_long_visits_keep_the_posterior_with_surrogates_and_lose_it_without():
    x = gaussians()
    mean = float(x.sum() / (CLIENTS * SAMPLES + PRIOR))
    (found, deviation), (_, without) = (chains(x, 4, 200, each) for each in (True, False))
    # The posterior's is 0.0316; noise of batches and of long steps is the rest.
    assert abs(found - mean) < 0.03
    assert 0.0316 < deviation < 0.08
    assert 2.2 < without < 3.3


def test_conducive_gradients_have_no_bias_and_vanish_where_they_should():
    generator = torch.Generator().manual_seed(0)
    own_eta, own_precision = torch.randn(2, CLIENTS, 3, generator=generator, dtype=torch.float64)
    theta = torch.randn(3, generator=generator, dtype=torch.float64)
    f = torch.tensor([0.1, 0.2, 0.3, 0.2, 0.2], dtype=torch.float64)
    eta, precision = own_eta.sum(0), own_precision.sum(0)
    total = sum(
        f[s] * conducive_gradient(theta, eta, precision, own_eta[s], own_precision[s], float(f[s]))
        for s in range(CLIENTS)
    )
    assert float(total.abs().max()) < 1e-12
    nothing = torch.zeros(3, dtype=torch.float64)
    assert not conducive_gradient(theta, nothing, nothing, nothing, nothing, 0.2).any()  # without surrogates
    assert not conducive_gradient(theta, eta, precision, eta, precision, 1.0).any()  # one client


def separated(folder, count, *overrides):
    options = ["federated.clients=3", "data.clients=3", "optimizer=sgd", "optimizer.lr=0.05", *overrides]
    return game_rounds(
        folder, "lightrail_federated.fsgld.FSGLD", count, *options, task="Separation", data="ClientClusters"
    )


@pytest.mark.parametrize("surrogate", ["gaussian", "none"])
def test_a_round_is_a_visit_by_hand(tmp_path, surrogate):
    rounds = separated(tmp_path, 1, "federated.lr=0.001", f"federated.surrogate={surrogate}", "federated.local_steps=2")
    before = dict(rounds.state)
    own = dict(states_of(rounds))
    index, method = rounds.done, rounds.method
    rounds.step()
    (s,) = method.chosen(index, generator_for(method.seed, "chosen", index))
    assert list(rounds.record.rounds[-1]["clients"]) == [str(s)]
    client = client_of(rounds, s, index)
    theta = before["weights"]
    for _ in range(2):
        v = score(1.0, theta, client.gradient(theta), 8, 1 / 3)
        if surrogate == "gaussian":
            mine = own[s]
            v = v + conducive_gradient(theta, before["eta"], before["precision"], mine["eta"], mine["precision"], 1 / 3)
        theta = langevin_step(theta, v, 0.001, torch.randn(16, generator=client.generator, dtype=theta.dtype))
    assert torch.allclose(rounds.state["weights"], theta, rtol=0, atol=1e-12)
    if surrogate == "gaussian":
        assert torch.allclose(before["precision"], sum(each["precision"] for each in own.values()), rtol=1e-12)
        assert bool((before["precision"] > 0).all())


def test_refused_options():
    for wrong in ({"lr": 0.0}, {"prior_precision": -1.0}, {"surrogate": "flow"}, {"fraction": 0.5}):
        with pytest.raises(ConfigurationError):
            FSGLD(**wrong)
