"""FedProx: its term, what it reduces to, and how much less its clients drift."""

from __future__ import annotations

import pytest
import torch

import lightrail.run.execution
from lightrail.errors import ConfigurationError
from lightrail.testing.federated_runs import composed_rounds, optimum_of, quadratics
from lightrail_federated.fedprox import FedProx, proximal_gradient


def rounds_of(tmp_path, method, count, *options):
    overrides = [f"+federated={method}", "federated.local_steps=3", "optimizer.lr=0.1", "optimizer.momentum=0"]
    run, rounds = composed_rounds(tmp_path, *overrides, *options)
    with lightrail.run.execution._quiet_lightning():
        for _ in range(count):
            rounds.step()
    return run, rounds


def by_hand(A, c, lr, mu, rounds, steps):
    theta = torch.zeros(A.shape[1], dtype=A.dtype)
    for _ in range(rounds):
        y = theta.expand(len(A), -1)
        for _ in range(steps):
            y = y - lr * (torch.einsum("kij,kj->ki", A, y - c) + proximal_gradient(y, theta, mu))
        theta = y.mean(0)
    return theta


def test_a_round_is_the_loop_by_hand(tmp_path):
    _, rounds = rounds_of(tmp_path, "lightrail_federated.fedprox.FedProx", 2, "federated.clients=4", "data.clients=4",
                          "federated.mu=0.7")  # fmt: skip
    assert rounds.state["weights"] == pytest.approx(by_hand(*quadratics(4), 0.1, 0.7, 2, 3), abs=1e-15)


def test_without_mu_it_is_fedavg_bit_for_bit(tmp_path):
    ends = [
        rounds_of(tmp_path, method, 2, "federated.clients=3", "data.clients=3", *more)[1].state["weights"]
        for method, more in (("fedavg", ()), ("lightrail_federated.fedprox.FedProx", ("federated.mu=0",)))
    ]
    assert torch.equal(*ends)


def test_its_fixed_point_is_nearer_to_the_optimum():
    A, c = quadratics()
    away = [float((by_hand(A, c, 0.1, mu, 150, 20) - optimum_of(A, c)).norm()) for mu in (0.0, 1.0)]
    assert away == pytest.approx([0.1264, 0.0929], abs=1e-4)


@pytest.mark.parametrize("mu", [-0.1, float("inf")])
def test_a_wrong_mu_is_refused(mu):
    with pytest.raises(ConfigurationError, match="mu"):
        FedProx(mu=mu)
