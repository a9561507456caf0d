# pyright: reportArgumentType=false
"""SCAFFOLD: exact where FedAvg is biased, its control variates, and the optimizers that it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import lightrail.run.execution
from lightrail import Closure, TransformedOptimizer
from lightrail.errors import CompositionError, ConfigurationError
from lightrail.testing.federated_runs import composed_rounds, optimum_of, quadratics
from lightrail_federated.scaffold import DriftCorrection, Scaffold, client_variate, server_step

METHOD = "+federated=lightrail_federated.scaffold.Scaffold"
IN_ORDER = "federated.partition=lightrail.testing.federated_runs.InOrder"
SGD = ("optimizer.lr=0.1", "optimizer.momentum=0")


def by_hand(A, c, lr, rounds, steps, taking_part, *, corrected=True):
    """θ, the server's variate and the clients', after rounds on quadratics."""
    clients, size = c.shape
    theta, server = torch.zeros(size, dtype=A.dtype), torch.zeros(size, dtype=A.dtype)
    own = torch.zeros_like(c)
    generator = torch.Generator().manual_seed(0)
    for _ in range(rounds):
        S = torch.randperm(clients, generator=generator)[:taking_part]
        y = theta.expand(len(S), -1)
        for _ in range(steps):
            y = y - lr * (torch.einsum("kij,kj->ki", A[S], y - c[S]) + corrected * (server - own[S]))
        new = client_variate(own[S], server, theta, y, torch.full_like(theta, lr * steps))
        change = (new - own[S]).mean(0)
        own[S] = new
        theta, server = server_step(theta, server, (y - theta).mean(0), change, len(S) / clients, 1.0)
    return theta, server, own


@pytest.mark.parametrize(
    ("steps", "taking_part", "rounds", "bias"), [(5, 10, 150, 0.0697), (20, 10, 300, 0.1264), (5, 3, 400, 0.0697)]
)
def test_it_is_exact_where_fedavg_is_biased(steps, taking_part, rounds, bias):
    A, c = quadratics()
    theta, server, own = by_hand(A, c, 0.1, rounds, steps, taking_part)
    assert (theta - optimum_of(A, c)).norm() < 2e-15
    assert (own.mean(0) - server).norm() < 1e-15
    biased, _, _ = by_hand(A, c, 0.1, 150, steps, 10, corrected=False)
    assert float((biased - optimum_of(A, c)).norm()) == pytest.approx(bias, abs=1e-4)


def test_rounds_are_the_loop_by_hand(tmp_path):
    few = ("federated.clients=4", "data.clients=4", "federated.local_steps=5", "federated.global_lr=1.0")
    _, rounds = composed_rounds(tmp_path, METHOD, *few, *SGD, IN_ORDER)
    with lightrail.run.execution._quiet_lightning():
        for _ in range(3):
            rounds.step()
    theta, server, own = by_hand(*quadratics(4), 0.1, 3, 5, 4)
    assert rounds.state["weights"] == pytest.approx(theta, abs=1e-14)
    assert rounds.state["c"] == pytest.approx(server, abs=1e-14)
    kept = rounds.transport.state_dict()["states"]
    assert torch.stack([kept[k]["c_k"] for k in range(4)]) == pytest.approx(own, abs=1e-14)


def test_the_variate_is_the_mean_gradient_under_changing_learning_rates():
    p = torch.nn.Parameter(torch.tensor([3.0, 1.0], dtype=torch.float64))
    theta, c_k, c = p.detach().clone(), torch.tensor([0.5, 0.0]).double(), torch.tensor([1.0, -1.0]).double()
    client = SimpleNamespace(model=SimpleNamespace(params=[p]), layout=SimpleNamespace(sizes=[2]))
    correction = DriftCorrection(client, c - c_k)
    optimizer = TransformedOptimizer(torch.optim.SGD([p], lr=0.4), [correction])
    gradients = []
    for lr in (0.4, 0.1):
        optimizer.param_groups[0]["lr"] = lr
        gradients.append(lr * p.detach().clone())
        optimizer.step(Closure(lambda: (p**2).sum() / 2, [p]))
    found = client_variate(c_k, c, theta, p.detach(), correction.eta(c))
    assert found == pytest.approx(sum(gradients) / 0.5, rel=1e-14)


@pytest.mark.parametrize("chosen", [("optimizer.momentum=0.9", "optimizer.lr=0.1"), ("optimizer=adamw",)])
def test_other_optimizers_are_refused(tmp_path, chosen):
    with pytest.raises(CompositionError, match="plain SGD") as error:
        composed_rounds(tmp_path, METHOD, *chosen)
    assert error.value.remedy


def test_options_out_of_range_are_refused():
    with pytest.raises(ConfigurationError, match="global_lr"):
        Scaffold(global_lr=0.0)
