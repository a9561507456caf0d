"""Methods whose nodes speak in pairs when clocks tick: the clocks, the graph's constants, DADAO and A²CiD²."""

from __future__ import annotations

import math

import pytest
import torch
from simulated_nodes import SimulatedNodes, assert_the_engine_agrees

from lightrail.errors import ConfigurationError
from lightrail_federated.a2cid2 import A2CiD2, drawn_together
from lightrail_federated.dadao import DADAO, Constants, flow, gradient_event, speak
from lightrail_federated.poisson_clocks import chi_1, chi_2, edge_laplacian, ticks
from lightrail_federated.topologies.complete import Complete
from lightrail_federated.topologies.ring import Ring
from lightrail_federated.topologies.star import Star


def test_clocks_tick_at_their_rates():
    found = ticks(torch.tensor([1.0, 3.0]), 1000.0, torch.Generator().manual_seed(0))
    counts = [sum(clock == each for _, clock in found) for each in (0, 1)]
    assert abs(counts[0] - 1000) < 100
    assert abs(counts[1] - 3000) < 170
    times = [time for time, _ in found]
    assert times == sorted(times)
    assert 0 <= times[0] < times[-1] < 1000


def test_constants_of_a_complete_graph_and_of_a_star():
    n = 5
    complete = [(i, j) for i in range(n) for j in range(i + 1, n)]
    laplacian = edge_laplacian(n, complete)
    # λ = n/|E|, and the resistance of an edge is |E| 2/n.
    assert chi_1(laplacian) == pytest.approx(len(complete) / n)
    assert chi_2(laplacian, complete) == pytest.approx(len(complete) / n)
    star = [(0, i) for i in range(1, n)]
    assert chi_1(edge_laplacian(n, star)) == pytest.approx(len(star))
    assert chi_2(edge_laplacian(n, star), star) == pytest.approx(len(star) / 2)


@pytest.mark.parametrize("topology", [Complete(), Ring(), Star()], ids=["complete", "cycle", "star"])
def test_dadao_finds_the_optimum_without_rounds(topology):
    nodes = SimulatedNodes(6, topology, spread=3.0)
    state = nodes.carry_out(DADAO(nodes=6, mu=1.0, L=3.0, time=55.0), 2)
    V = state["V"]
    # Every exchange takes from one node what it gives to the other.
    assert V[:, 4:].sum(0).abs().max() < 1e-11
    assert (V[:, 0] - nodes.optimum).square().sum(1).mean() < 1e-4


def test_flow_is_the_solution_of_its_equation():
    c = Constants(mu=1.0, L=8.0, chi_1=2.0, chi_2=1.0)
    assert c.edge_rate == 2
    assert c.beta_tilde == pytest.approx(2 * 2 / 2 * 4)
    V = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slope = (flow(V, c.field, torch.tensor(1e-6).double()) - V) / 1e-6
    x, x_tilde, y, y_tilde, z, z_tilde = V
    s, f, nu = 0.25, 4.0, 0.5
    by_hand = [
        s / 8 * (x_tilde - x),
        s / 8 * (x - x_tilde),
        s / 4 * (y_tilde - y),
        -f / 2 * (y + z + nu * x_tilde),
        s / 4 * (z_tilde - z),
        s / 8 * (z - z_tilde),
    ]
    torch.testing.assert_close(slope, torch.stack(by_hand), rtol=1e-4, atol=1e-4)
    twice = flow(flow(V, c.field, torch.tensor(0.5).double()), c.field, torch.tensor(0.7).double())
    torch.testing.assert_close(twice, flow(V, c.field, torch.tensor(1.2).double()))


def test_events_by_hand():
    c = Constants(mu=1.0, L=8.0, chi_1=2.0, chi_2=1.0)  # ν = ½, √(ν/L) = ¼, √(Lν) = 2
    V = torch.tensor([[2.0], [3.0], [5.0], [1.0], [4.0], [6.0]]).double()
    # s = 34 - ½·2 - 1 = 32
    moved = gradient_event(V, torch.tensor([34.0]).double(), c)
    assert moved.flatten().tolist() == [2 - 1, 3 - 4, 5, 1 + (1 + 1 / 16) * 32, 4, 6]
    # m = (5 + 4) - (1 + 2) = 6
    other = torch.tensor([[0.0], [0.0], [1.0], [0.0], [2.0], [0.0]]).double()
    spoken = speak(torch.stack([V, other]), 3.0)
    assert spoken[:, 4].flatten().tolist() == [4 - 3, 2 + 3]
    assert spoken[:, 5].flatten().tolist() == [6 - 18, 18]
    torch.testing.assert_close(spoken[:, :4], torch.stack([V, other])[:, :4])


def test_two_copies_have_one_mean_and_agree_faster_on_a_ring():
    spread = {}
    for momentum in (True, False):
        nodes, method = SimulatedNodes(16, lr=0.02), A2CiD2(nodes=16, time=6.0, momentum=momentum)
        state, seen = nodes.carry_out(method, 5), []
        for _ in range(12):
            X = (state := nodes.carry_out(method, 1, state))["X"]
            seen.append(float((X - X.mean(0)).square().sum(1).mean()))
        assert (X.mean(0) - state["X_tilde"].mean(0)).abs().max() < 1e-14
        spread[momentum] = sum(seen)
    assert spread[True] < 0.7 * spread[False]


def test_two_copies_are_drawn_together():
    x, x_tilde = torch.tensor([[1.0]]).double(), torch.tensor([[3.0]]).double()
    x, x_tilde = drawn_together(x, x_tilde, 0.7, torch.tensor([2.0]).double())
    assert float(x + x_tilde) == pytest.approx(4)
    assert float(x_tilde - x) == pytest.approx(2 * math.exp(-2 * 0.7 * 2))


def test_the_engine_agrees(tmp_path):
    exact = ["federated.mu=1", "federated.L=4"]
    dadao = DADAO(nodes=4, mu=1, L=4)
    rounds = assert_the_engine_agrees(tmp_path, "lightrail_federated.dadao.DADAO", dadao, *exact)
    # y + z of both nodes, 5 numbers of 8 bytes.
    assert rounds.logged()["megabytes_sent"] == pytest.approx(rounds.logged()["exchanges"] * 80 / 1e6)
    assert_the_engine_agrees(tmp_path, "lightrail_federated.a2cid2.A2CiD2", A2CiD2(nodes=4), "optimizer.lr=0.05")


def test_bad_options():
    for options in ({"mu": 0.0, "L": 1.0}, {"mu": 2.0, "L": 1.0}, {"mu": 1.0, "L": 1.0, "time": 0.0}):
        with pytest.raises(ConfigurationError):
            DADAO(nodes=4, **options)
    with pytest.raises(ConfigurationError, match="exchanges"):
        A2CiD2(nodes=4, exchanges=0.0)
