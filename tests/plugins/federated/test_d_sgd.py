"""Decentralised SGD: where it is exact and where it is biased, and what the spread of nodes does to their mean."""

from __future__ import annotations

import pytest
import torch
from simulated_nodes import SimulatedNodes, assert_the_engine_agrees

from lightrail import TransformedOptimizer
from lightrail.errors import ConfigurationError
from lightrail.step import Closure
from lightrail_federated.avgdir_sam import AverageDirectionSAM
from lightrail_federated.d_sgd import DSGD, consensus_covariance
from lightrail_federated.topologies.complete import Complete


def cubic(size=6, seed=0):
    """A loss of third order with a constant third derivative T."""
    generator = torch.Generator().manual_seed(seed)
    drawn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    T, H, b = drawn(size, size, size), drawn(size, size), drawn(size)
    T = sum(T.permute(order) for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))) / 6
    H = (H + H.T) / 2
    loss = lambda w: torch.einsum("ijk,i,j,k", T, w, w, w) / 6 + w @ H @ w / 2 + b @ w  # noqa: E731
    return T, loss, lambda w: torch.func.grad(loss)(w)


def test_complete_averages_are_centralised_sgd():
    nodes = SimulatedNodes(topology=Complete())
    X = nodes.carry_out(DSGD(nodes=8), 30)["X"]
    w = torch.zeros(5, dtype=torch.float64)
    for _ in range(30):
        w = w - 0.05 * (nodes.A @ (w - nodes.c)[..., None]).mean(0)[:, 0]
    assert (X - w).abs().max() < 1e-13


def test_a_constant_step_is_biased_on_different_data():
    nodes = SimulatedNodes()
    X = nodes.carry_out(DSGD(nodes=8), 1500)["X"]
    assert 0.1 < nodes.error(X) < 0.5
    assert 0.01 < float((X.mean(0) - nodes.optimum).abs().max()) < 0.1


def test_the_mean_of_gradients_is_that_of_the_mean_and_of_the_spread():
    T, _, gradient = cubic()
    W = torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    away = W - W.mean(0)
    Xi = away.T @ away / 8
    mean = torch.stack([gradient(w) for w in W]).mean(0)
    torch.testing.assert_close(mean, gradient(W.mean(0)) + torch.einsum("ijk,jk->i", T, Xi) / 2, rtol=0, atol=1e-14)
    trace, top = consensus_covariance(W)
    assert trace == pytest.approx(float(Xi.trace()))
    assert top == pytest.approx(float(torch.linalg.eigvalsh(Xi)[-1]))


def test_a_pair_of_average_direction_sam_has_the_same_pull():
    T, loss, gradient = cubic()
    w = torch.nn.Parameter(torch.ones(6, dtype=torch.float64))
    optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=1.0), [AverageDirectionSAM(rho=0.3)])
    torch.manual_seed(4)
    e = 0.3 * torch.randn(6, dtype=torch.float64)
    torch.manual_seed(4)
    optimizer.step(Closure(lambda: loss(w), [w]))
    x = torch.ones(6, dtype=torch.float64)
    expected = x - gradient(x) - torch.einsum("ijk,j,k->i", T, e, e) / 2
    torch.testing.assert_close(w.detach(), expected, rtol=0, atol=1e-13)
    with pytest.raises(ConfigurationError, match="rho"):
        AverageDirectionSAM(rho=-1)


def test_the_engine_agrees(tmp_path):
    rounds = assert_the_engine_agrees(
        tmp_path, "d_sgd", DSGD(nodes=4, combine_first=True), "federated.combine_first=true", "optimizer.lr=0.05"
    )
    assert rounds.logged()["consensus_top_eigenvalue"] <= rounds.logged()["consensus_distance"] + 1e-12
