"""A decentralised run carried out by the run's own trainer: its step is a round of all nodes."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightrail.errors import NonFiniteLoss
from lightrail.federated.client_side import ClientSide
from lightrail.federated.gossip import Gossip
from lightrail.federated.method import DecentralisedMethod
from lightrail.federated.rounds import Rounds
from lightrail.federated.topology import spectral_gap

__all__ = ["GossipRounds", "consensus_distance"]


def consensus_distance(X: Tensor) -> float:
    """(1/n) Σ_i ‖x_i - x̄‖²: how far nodes are from agreeing.

    Args:
        X: ``[n, …]``.

    Example:
        >>> consensus_distance(torch.tensor([[1.0], [3.0]]))
        1.0
    """
    flat = X.reshape(len(X), -1).double()
    return float((flat - flat.mean(0)).square().sum(1).mean())


class GossipRounds(Rounds):
    """Nodes without a server.

    Args:
        method: What they do.
        task: What is validated and saved: the mean over nodes.
        side: The nodes' data and model.
    """

    method: DecentralisedMethod

    def __init__(self, method: DecentralisedMethod, task: LightningModule, side: ClientSide) -> None:
        super().__init__(method, task, side.seed)
        self._side = side
        self._gossip: Gossip | None = None
        self._loaded: dict[str, Any] | None = None

    @property
    def gossip(self) -> Gossip:
        """What the nodes can do."""
        if self._gossip is None:
            self._gossip = Gossip(self._side, self.method)
            if self._loaded is not None:
                self._gossip.load_state_dict(self._loaded)
        return self._gossip

    def begin(self) -> None:
        gossip = self.gossip
        self._side.model.task.to(self.model.device)
        self.record.about |= {
            **self._side.about(),
            "topology": type(self.method.topology).__name__,
            "spectral_gap": spectral_gap(gossip.W),
            "edges": gossip.edges,
            "nodes": gossip.nodes,
        }
        gossip.begin_round(0)
        # As many copies as nodes: the method may change rows in place.
        X = self.model.weights().repeat(gossip.nodes, 1)
        self.state = self.method.start(X, gossip)

    def carry_out(self) -> dict[str, float]:
        gossip = self.gossip
        gossip.begin_round(self.done)
        self.state = self.method.step(self.state, gossip)
        X = self.method.weights(self.state)
        if not bool(torch.isfinite(X).all()):
            nodes = (~torch.isfinite(X).all(1)).nonzero().flatten().tolist()
            raise NonFiniteLoss(
                f"the weights of {len(nodes)} nodes became infinite or NaN in round {self.done}",
                found=f"nodes {nodes[:8]}",
                allowed="finite weights",
                remedy="Lower the step size, and resume from the last checkpoint.",
            )
        self.model.load(self.method.joined(self.state))
        self.model.load_buffers(gossip.buffers())
        losses = gossip.losses
        figures = {
            "consensus_distance": consensus_distance(X),
            "megabytes_sent": gossip.nbytes / 1e6,
            **({"loss": sum(losses) / len(losses)} if losses else {}),
            **({"lr": gossip.lr} if gossip.lr else {}),
        }
        self.record.add_exchange(self.done, gossip.nbytes, figures)
        return figures

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "gossip": None if self._gossip is None else self._gossip.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # The data is not there yet when a checkpoint is read.
        self._loaded = state_dict["gossip"]
