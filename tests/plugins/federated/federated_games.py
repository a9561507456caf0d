"""A monotone game divided among clients, and the fields of its clients as functions."""

from __future__ import annotations

import torch

import lightrail.run.execution
from lightrail.federated.rounds import Rounds
from lightrail.run import compose
from lightrail.testing.federated_runs import ClientGames

HERE = "lightrail.testing.federated_runs"


def game_rounds(folder, method, count, *overrides, task="Game", data="ClientGames"):
    """Rounds of a method on the game, carried out so often."""
    run = compose(
        [
            f"+federated={method}",
            "federated.clients=10",
            f"task={HERE}.{task}",
            f"data={HERE}.{data}",
            "model=null",
            "schedule=null",
            "logger=[]",
            f"run.root={folder}",
            "trainer.accelerator=cpu",
            f"federated.partition={HERE}.InOrder",
            *overrides,
        ]
    )
    assert run.data is not None
    run.data.prepare_data()
    run.data.setup("fit")
    rounds = next(each for each in run.callbacks if isinstance(each, Rounds))
    with lightrail.run.execution._quiet_lightning():
        for _ in range(count):
            rounds.step()
    return rounds


def client_fields(size=10):
    """M_k [K, 2s, 2s] and m_k [K, 2s] of F_k(z) = M_k z + m_k."""
    A, B, C, a, b = ClientGames(size=size).parts
    return torch.cat([torch.cat([A, B], 2), torch.cat([-B.transpose(1, 2), C], 2)], 1), torch.cat([a, b], 1)


def client_of(rounds, number, round_index):
    """A client of rounds that are carried out in this process."""
    return rounds.transport._worker.client(number, round_index)


def states_of(rounds):
    """What each client of such rounds keeps."""
    return rounds.transport.state_dict()["states"]
