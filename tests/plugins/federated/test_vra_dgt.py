"""Gradient tracking over noisy links: exact without noise, and an error that falls with time where there is some."""

from __future__ import annotations

import pytest
import torch
from simulated_nodes import SimulatedNodes, assert_the_engine_agrees

from lightrail import compose
from lightrail.errors import CompositionError, ConfigurationError
from lightrail_federated.vra_dgt import VRADGT, VRADSGT, falling, message, recursive_gradient, tracked


def test_without_noise_nodes_agree_on_the_exact_optimum():
    nodes = SimulatedNodes()
    state = nodes.carry_out(VRADGT(nodes=8), 1400)
    assert nodes.error(state["x"]) < 1e-12
    # What a node knows of its neighbours is what they are.
    torch.testing.assert_close(state["A_s"], nodes.mix(state["s"]), rtol=0, atol=1e-10)


def test_without_noise_the_weights_of_messages_do_not_matter():
    falling_weights = SimulatedNodes().carry_out(VRADGT(nodes=8), 50)["x"]
    plain = SimulatedNodes().carry_out(VRADGT(nodes=8, b=None), 50)["x"]
    torch.testing.assert_close(falling_weights, plain, rtol=0, atol=1e-10)


def test_noise_enters_by_beta_alone():
    u, u_next, xi = torch.tensor([[1.0], [2.0]]).double(), torch.tensor([[4.0], [-2.0]]).double(), 0.5
    W, beta = torch.full((2, 2), 0.5, dtype=torch.float64), falling(20, 5.0)
    assert beta == 0.2
    found = tracked(W @ u, W @ (message(u, u_next, beta) + xi), beta)
    torch.testing.assert_close(found, W @ u_next + beta * xi)


def mean_square(method, rounds):
    nodes = SimulatedNodes(copies=20)
    state, errors = None, []
    for each in rounds:
        state = nodes.carry_out(method, each - nodes.round, state)
        errors.append(float((state["x"] - nodes.optimum).square().mean()) * 5)
    return errors


def test_the_error_falls_as_one_over_time():
    early, late = mean_square(VRADGT(nodes=8, noise=0.1), (250, 2000))
    assert early / late > 2.5
    # Plain tracking stays where it is.
    plain_early, plain_late = mean_square(VRADGT(nodes=8, noise=0.1, b=None), (250, 2000))
    assert plain_late > plain_early / 2
    assert plain_late > 5 * late


def test_an_estimate_without_memory_is_the_gradient_of_the_batch():
    g, before, last = (torch.tensor([[float(each)]]) for each in (3, 2, 5))
    assert recursive_gradient(g, before, last, 1.0) == 3
    assert recursive_gradient(g, before, last, 0.25) == 3 + 0.75 * 3
    # On full gradients the correction is zero.
    nodes = SimulatedNodes()
    stochastic, whole = nodes.carry_out(VRADSGT(nodes=8), 30), SimulatedNodes().carry_out(VRADGT(nodes=8), 30)
    torch.testing.assert_close(stochastic["x"], whole["x"], rtol=0, atol=1e-12)


def test_the_engine_agrees(tmp_path):
    name = "lightrail_federated.vra_dgt.VRADSGT"
    rounds = assert_the_engine_agrees(tmp_path, name, VRADSGT(nodes=4, noise=0.1), "federated.noise=0.1")
    assert rounds.logged()["beta"] == pytest.approx(20 / 22)


def test_bad_options():
    for options in ({"lr": 0.0}, {"gamma": 2.0}, {"b": 0.0}, {"noise": -0.1}, {"a": -1.0}):
        with pytest.raises(ConfigurationError):
            VRADSGT(nodes=4, **options)


def test_neighbours_that_change_are_refused(tmp_path):
    method = ["+federated=vra_dgt", "federated.nodes=4", "federated.rounds=1"]
    topology = ["federated.topology=exponential", "federated.topology.one_peer=true"]
    run = compose([*method, *topology, "logger=[]", f"run.root={tmp_path}"])
    with pytest.raises(CompositionError, match="have to stay the same"):
        run.execute(show_progress=False)
