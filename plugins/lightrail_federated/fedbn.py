"""Federated averaging of everything but batch normalisation."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightrail import Traits
from lightrail.federated import Client, Heard, State
from lightrail.federated.local_model import Layout, LocalModel
from lightrail.federated.wire import Payload
from lightrail_federated.fedavg import FedAvg

if TYPE_CHECKING:
    from lightrail.run.run import Run

__all__ = ["FedBN", "of_batch_norm"]


def of_batch_norm(module: nn.Module, layout: Layout) -> Tensor:
    """Which entries of the vector of parameters belong to BatchNorm.

    Args:
        module: With the parameters of the layout.
        layout: Where each lies.

    Returns:
        bool ``[d]``.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2))
        >>> layout = Layout(tuple(n for n, _ in net.named_parameters()), ((2, 1), (2,), (2,), (2,)))
        >>> of_batch_norm(net, layout).int()
        tensor([0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.int32)
    """
    own = {id(p) for each in module.modules() if isinstance(each, _BatchNorm) for p in each.parameters()}
    params = dict(module.named_parameters())
    found = torch.zeros(layout.size, dtype=torch.bool)
    for name, place in layout.places():
        found[place] = id(params[name]) in own
    return found


class FedBN(FedAvg):
    r"""FedAvg of all layers but BatchNorm, which every client keeps for itself: scale, shift and statistics.

    .. math:: \theta_j \leftarrow \theta_j + \sum_{k \in S} \frac{n_k}{n_S} (y_{k,j} - \theta_j)
              \quad \text{for entries } j \text{ outside BatchNorm}

    For clients whose inputs are shifted against each other. A model without BatchNorm is trained as by FedAvg.

    Guarantees:
        What a client sends is zero where its BatchNorm lies, and it sends no statistics.

    Deviations:
        The paper evaluates every client's own model. The model at the server has the BatchNorm that the run began
        with, which belongs to no client: its validation and test say little, and nothing of the clients' models. What
        says something of these are the figures of their training, which are means over clients.

    Example:
        >>> from lightrail import compose
        >>> run = ["+federated=fedbn", "federated.clients=4", "federated.rounds=1", "logger=[]"]
        >>> compose(run).composition.config.federated.clients
        4

    Reference:
        X. Li, M. Jiang, X. Zhang, M. Kamp and Q. Dou (2021), FedBN: Federated Learning on Non-IID Features via Local
        Batch Normalization, ICLR, arXiv 2102.07623, algorithm 1.
    """

    traits: ClassVar[Traits] = Traits(
        rule="θ ← θ + Σ_k (n_k/n) (y_k - θ) outside BatchNorm",
        paper="Li, Jiang, Zhang, Kamp, Dou, 2021, FedBN: Federated Learning on Non-IID Features via Local Batch "
        "Normalization, arXiv 2102.07623",
        example={"clients": 4, "rounds": 2},
    )
    keeps_buffers: ClassVar[bool] = True

    def wrap(self, run: Run) -> Run:
        self._is_own = of_batch_norm(run.task, LocalModel(run.task).layout)
        note = "federated: the model holds no BatchNorm, and fedbn is fedavg"
        if any(isinstance(each, _BatchNorm) for each in run.task.modules()):
            note = (
                "federated: BatchNorm stays on the clients; the server validates with that of the start, which says "
                "nothing of the clients' models"
            )
        return super().wrap(dataclasses.replace(run, notes=[*run.notes, note]))

    def client(self, client: Client, message: State, state: State) -> tuple[Payload, State]:
        theta = message["weights"]
        is_own = of_batch_norm(client.model.task, client.layout)
        if "own" in state:
            client.load(theta.masked_scatter(is_own, state["own"]))
        client.train()
        y = client.weights()
        update = (y - theta).masked_fill(is_own, 0.0)
        return {"update": client.compressed("update", update, state)}, {**state, "own": y[is_own]}

    def server(self, server: State, mean: State, heard: Heard) -> State:
        # Noise, or a compressor that is not exact, would move what no client sent.
        kept = {name: each.masked_fill(self._is_own, 0.0) for name, each in mean.items()}
        return super().server(server, kept, heard)
