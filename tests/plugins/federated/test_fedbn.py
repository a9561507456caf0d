"""FedBN: what stays on the clients, and what is averaged."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import nn

import lightrail.run.execution
from lightrail.testing.federated_runs import composed_rounds
from lightrail_federated.fedbn import of_batch_norm

HERE = "lightrail.testing.federated_runs"
METHOD = "+federated=lightrail_federated.fedbn.FedBN"


class Task(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 4)).double()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return {"loss": nn.functional.cross_entropy(self.net(x), y)}


def rounds_of(tmp_path, method, *options):
    few = ("federated.clients=2", "federated.local_steps=2", "optimizer.lr=0.1", f"federated.partition={HERE}.InOrder")
    return composed_rounds(tmp_path, method, "task=test_fedbn.Task", f"data={HERE}.ClientClusters", "data.clients=2",
                           *few, *options)  # fmt: skip


def carried_out(rounds, count):
    with lightrail.run.execution._quiet_lightning():
        for _ in range(count):
            rounds.step()
    return rounds


def test_batch_norm_stays_and_the_rest_is_fedavg_of_the_clients(tmp_path):
    run, rounds = rounds_of(tmp_path, METHOD)
    own = of_batch_norm(rounds.model.task, rounds.model.layout)
    assert own.sum() == 6
    begin = rounds.model.weights()
    carried_out(rounds, 2)
    end = rounds.state["weights"]
    assert torch.equal(end[own], begin[own])
    assert (end[~own] - begin[~own]).norm() > 0.1
    states = rounds.transport.state_dict()["states"]
    assert not torch.allclose(states[0]["own"], states[1]["own"])
    assert not torch.allclose(states[0]["buffers"], states[1]["buffers"])
    assert torch.equal(rounds.model.task.net[1].running_mean, torch.zeros(3).double())
    assert any("BatchNorm stays on the clients" in note for note in run.notes)


def test_with_one_client_it_trains_as_if_alone(tmp_path):
    one = ("federated.clients=1", "data.clients=1")
    alone, whole = (carried_out(rounds_of(tmp_path, m, *one)[1], 3) for m in (METHOD, "+federated=fedavg"))
    own = of_batch_norm(alone.model.task, alone.model.layout)
    found, expected = alone.state["weights"], whole.state["weights"]
    assert torch.allclose(found[~own], expected[~own], atol=1e-12)
    assert torch.allclose(alone.transport.state_dict()["states"][0]["own"], expected[own], atol=1e-12)


def test_without_batch_norm_it_is_fedavg(tmp_path):
    few = ("federated.clients=2", "data.clients=2", "federated.local_steps=2")
    runs = [composed_rounds(tmp_path, method, *few) for method in (METHOD, "+federated=fedavg")]
    first, second = (carried_out(rounds, 2).state["weights"] for _, rounds in runs)
    assert torch.equal(first, second)
    assert any("fedbn is fedavg" in note for note in runs[0][0].notes)
