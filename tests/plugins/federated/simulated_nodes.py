"""Nodes whose losses are quadratics, without data or models: thousands of rounds in a second."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lightrail.federated.randomness import generator_for
from lightrail.run.execution import _quiet_lightning
from lightrail.testing.federated_runs import composed_rounds, optimum_of, quadratics
from lightrail_federated.topologies.complete import Complete
from lightrail_federated.topologies.ring import Ring


class SimulatedNodes:
    """What a method asks of a Gossip, of f_i(x) = ½ (x - c_i)ᵀ A_i (x - c_i).

    Args:
        nodes: How many.
        topology: A ring where nothing is said.
        compressor: For what is sent compressed.
        spread: The greatest eigenvalue of an A_i over the smallest, which is 1.
        copies: As many runs side by side, each in 5 coordinates of its own.
        lr: Of local steps.
    """

    def __init__(self, nodes=8, topology=None, compressor=None, spread=4.0, copies=1, lr=0.05):
        self.nodes, self.compressor, self.copies, self.lr = nodes, compressor, copies, lr
        self.A, self.c = quadratics(nodes, 5, spread=spread)
        self.optimum = optimum_of(self.A, self.c).repeat(copies)
        self.W = (topology or Ring()).mixing(nodes, torch.Generator())
        self.generator = torch.Generator().manual_seed(0)
        self.round = self.nbytes = 0

    @property
    def edges(self):
        return [(i, j) for i in range(self.nodes) for j in range(i + 1, self.nodes) if self.W[i, j]]

    def mix(self, X, *, nbytes=None):
        return self.W @ X

    def sent(self, nbytes):
        self.nbytes += nbytes

    def compressed(self, X):
        if self.compressor is None:
            return X, X.nbytes
        encoded = [self.compressor.compress(row, self.generator) for row in X]
        return torch.stack([each.decoded() for each in encoded]), sum(each.nbytes for each in encoded)

    def gradient(self, X, *, full=False, nodes=None) -> Tensor:
        who = list(range(self.nodes) if nodes is None else nodes)
        away = X.view(len(who), self.copies, 5) - self.c[who][:, None]
        return torch.einsum("nij,nkj->nki", self.A[who], away).reshape(len(who), -1)

    def fresh_batches(self, nodes=None):
        pass

    def local_step(self, X, *, nodes=None):
        return X - self.lr * self.gradient(X, nodes=nodes)

    def carry_out(self, method, rounds, state=None):
        """The state after so many rounds from zero."""
        if state is None:
            state = method.start(torch.zeros(self.nodes, 5 * self.copies, dtype=torch.float64), self)
        for _ in range(rounds):
            state = method.step(state, self)
            self.round += 1
        return state

    def error(self, X):
        """Of the worst node."""
        return float((X - self.optimum).abs().max())


def assert_the_engine_agrees(folder: Path, name: str, method, *overrides: str, topology=None, lr=0.05):
    """Three rounds of a composed run leave the same state as three rounds here, on 4 nodes of a complete graph."""
    testing = "lightrail.testing.federated_runs"
    made = ["federated.nodes=4", f"federated.topology={testing}.All", f"federated.partition={testing}.InOrder"]
    _, rounds = composed_rounds(folder, f"+federated={name}", "data.clients=4", *made, *overrides)
    with _quiet_lightning():
        for _ in range(3):
            rounds.step()
    nodes = SimulatedNodes(4, Complete(), lr=lr)
    nodes.generator = generator_for(rounds.seed, "method", 0)
    state = method.start(torch.zeros(4, 5, dtype=torch.float64), nodes)
    for nodes.round in range(3):
        nodes.generator = generator_for(rounds.seed, "method", nodes.round)
        state = method.step(state, nodes)
    assert set(rounds.state) == set(state)
    for key, value in state.items():
        torch.testing.assert_close(rounds.state[key], value, rtol=0, atol=1e-12)
    return rounds
