# pyright: reportArgumentType=false
"""The token that avoids what it has seen: its walk, its limits, and how much less the weights vary."""

from __future__ import annotations

import pytest
import torch
from simulated_nodes import SimulatedNodes, assert_the_engine_agrees

from lightrail.errors import ConfigurationError
from lightrail_federated.srrw import SRRW, metropolis_hastings, repelled, visited

EDGES = [*((i, i + 1) for i in range(9)), (0, 9), (0, 5), (2, 7)]
UNIFORM = torch.full((10,), 0.1, dtype=torch.float64)


def test_the_base_walk_is_everywhere_equally_often():
    P = metropolis_hastings(10, EDGES)
    torch.testing.assert_close(P, P.T)
    torch.testing.assert_close(P.sum(1), torch.ones(10, dtype=torch.float64))
    assert float(P[0, 5]) == float(P[0, 1]) == pytest.approx(1 / 3)
    torch.testing.assert_close(repelled(P[0], torch.rand(10).double(), UNIFORM, 0.0), P[0])


def test_nothing_overflows_where_the_walk_avoids_much():
    x = torch.tensor([1e-9, 1 - 1e-9]).double()
    near = repelled(torch.tensor([0.5, 0.5]).double(), x, torch.tensor([0.5, 0.5]).double(), 1e4)
    assert near.isfinite().all()
    assert near[0] > 0.999


def walked(alpha, steps=600, walks=200):
    """What θ differs by, (k + 1)^b times its mean square, and the greatest difference of a share of visits."""
    generator = torch.Generator().manual_seed(0)
    P = metropolis_hastings(10, EDGES)
    c = torch.randn(10, generator=generator, dtype=torch.float64)
    x, place = UNIFORM.repeat(walks, 1), torch.randint(10, (walks,), generator=generator)
    theta = torch.zeros(walks, dtype=torch.float64)
    for k in range(1, steps + 1):
        place = torch.multinomial(repelled(P[place], x, UNIFORM, alpha), 1, generator=generator)[:, 0]
        x = visited(x, place, (k + 1) ** -0.8)
        theta = theta - (k + 1) ** -0.9 * (theta - c[place])
    return float((theta - c.mean()).square().mean() * (steps + 1) ** 0.9), float((x - UNIFORM).abs().mean())


def test_the_more_it_avoids_the_less_the_weights_vary():
    (plain, unlike), (some, _), (much, alike) = walked(0.0), walked(1.0), walked(5.0)
    assert plain > 2 * some > 4 * much
    assert alike < unlike / 2


def test_the_weights_go_to_the_optimum():
    nodes = SimulatedNodes(6)
    state = nodes.carry_out(SRRW(nodes=6, lr=0.5, alpha=10.0), 150)
    assert nodes.error(state["token"]) < 0.15
    assert state["x"].sum() == pytest.approx(1)


def test_the_engine_agrees(tmp_path):
    method = SRRW(nodes=4, lr=0.1, hops=5)
    options = ["federated.lr=0.1", "federated.hops=5"]
    rounds = assert_the_engine_agrees(tmp_path, "lightrail_federated.srrw.SRRW", method, *options)
    # θ has 5 numbers and x 4, of 8 bytes, in at most 5 hops.
    assert 0 < rounds.logged()["megabytes_sent"] <= 5 * 72 / 1e6
    torch.testing.assert_close(next(rounds.model.task.parameters()).detach(), rounds.state["token"])


def test_bad_options():
    for options in ({"lr": 0.0}, {"alpha": -1.0}, {"a": 0.5}, {"b": 1.5}, {"a": 0.9, "b": 0.8}, {"hops": 0}):
        with pytest.raises(ConfigurationError):
            SRRW(nodes=4, **options)
