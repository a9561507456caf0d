"""Proximal gradient tracking, whole and compressed: the invariant of the mean, reductions, and the exact optimum."""

from __future__ import annotations

import pytest
import torch
from simulated_nodes import SimulatedNodes, assert_the_engine_agrees

from lightrail.errors import ConfigurationError
from lightrail_federated.compressors.top_k import TopK
from lightrail_federated.dprox_sgt import CDProxSGT, DProxSGT, soft_threshold
from lightrail_federated.topologies.complete import Complete


def test_nodes_agree_on_the_exact_optimum():
    nodes = SimulatedNodes()
    state = nodes.carry_out(DProxSGT(nodes=8, lr=0.05), 1000)
    assert nodes.error(state["X"]) < 1e-12
    assert (state["y"].mean(0) - state["g"].mean(0)).abs().max() < 1e-14


@pytest.mark.parametrize(("ratio", "gamma_x", "gamma_y"), [(0.4, 0.4, 0.8), (0.2, 0.3, 0.3)])
def test_so_they_do_on_compressed_words(ratio, gamma_x, gamma_y):
    nodes = SimulatedNodes(4, compressor=TopK(ratio))
    method = CDProxSGT(nodes=4, lr=0.05, gamma_x=gamma_x, gamma_y=gamma_y)
    state = nodes.carry_out(method, 20)
    assert (state["y"].mean(0) - state["g"].mean(0)).abs().max() < 1e-14
    assert nodes.error(nodes.carry_out(method, 400, state)["X"]) < 1e-4


def test_nothing_compressed_is_the_method_itself():
    whole = SimulatedNodes().carry_out(DProxSGT(nodes=8, l1=0.1), 40)
    spoken = SimulatedNodes().carry_out(CDProxSGT(nodes=8, l1=0.1, gamma_x=1.0, gamma_y=1.0), 40)
    for key in ("X", "y", "g"):
        torch.testing.assert_close(spoken[key], whole[key], rtol=0, atol=1e-14)


def test_complete_averages_without_a_penalty_are_gradient_descent():
    nodes = SimulatedNodes(topology=Complete())
    X = nodes.carry_out(DProxSGT(nodes=8, lr=0.05), 30)["X"]
    w = torch.zeros(5, dtype=torch.float64)
    for _ in range(30):
        w = w - 0.05 * (nodes.A @ (w - nodes.c)[..., None]).mean(0)[:, 0]
    assert (X - w).abs().max() < 1e-13


def test_the_penalised_optimum_is_a_fixed_point_of_the_proximal_step():
    nodes = SimulatedNodes()
    X = nodes.carry_out(DProxSGT(nodes=8, lr=0.05, l1=0.3), 1500)["X"]
    x = X.mean(0)
    g = nodes.gradient(x.expand(8, -1)).mean(0)
    assert (x - soft_threshold(x - 0.05 * g, 0.05 * 0.3)).abs().max() < 1e-13
    assert (X - x).abs().max() < 1e-13
    assert (x == 0).any()
    assert (x != 0).any()


def test_the_engine_agrees(tmp_path):
    name = "lightrail_federated.dprox_sgt.CDProxSGT"
    method = CDProxSGT(nodes=4, lr=0.05, l1=0.01)
    rounds = assert_the_engine_agrees(tmp_path, name, method, "federated.lr=0.05", "federated.l1=0.01")
    # 4 nodes hear 3 others, twice a round, 5 numbers of 8 bytes.
    assert rounds.logged()["megabytes_sent"] == pytest.approx(2 * 12 * 40 / 1e6)


def test_bad_options():
    for options in ({"lr": 0.0}, {"l1": -1.0}, {"gamma_x": 0.0}, {"gamma_y": 1.5}):
        with pytest.raises(ConfigurationError):
            CDProxSGT(nodes=4, **options)
