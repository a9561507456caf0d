"""Federated averaging."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lightrail import Claim, Traits
from lightrail.federated import Client, Heard, ServerMethod, State
from lightrail.federated.wire import Payload

__all__ = ["FedAvg"]


class FedAvg(ServerMethod):
    """Federated averaging: clients train from the server's weights, and the server takes the mean of where they ended.

    Each of the clients S that take part makes its local steps from θ to y_k and sends Δ_k = y_k - θ; the server moves
    by the mean,

    θ ← θ + Σ_{k∈S} (n_k / n_S) Δ_k,   n_S = Σ_{k∈S} n_k.

    With one local step of plain gradient descent on all samples this is gradient descent. With more, clients whose data
    differ pull towards their own optima, and the fixed point is biased.

    Example:
        >>> from lightrail import compose
        >>> run = ["+federated=fedavg", "federated.clients=4", "federated.rounds=1", "logger=[]"]
        >>> compose(run).composition.config.federated.clients
        4

    Reference:
        McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017,
        Algorithm 1. arXiv 1602.05629.
    """

    traits: ClassVar[Traits] = Traits(
        rule="θ ← θ + Σ_k (n_k/n) (y_k - θ)",
        paper="McMahan et al. 2017, Communication-Efficient Learning of Deep Networks, arXiv 1602.05629",
        example={"clients": 4, "rounds": 2},
        claim=Claim(
            sentence="With a tenth of the entries sent up, in a fifth of the bytes, as good at equal rounds",
            baseline="fedavg",
            margin=0.05,
            problems=("federated_digits",),
            options={"compressor": "top_k", "compressor.ratio": 0.1},
        ),
    )
    is_one_update: ClassVar[bool] = True

    def client(self, client: Client, message: State, state: State) -> tuple[Payload, State]:
        theta = message["weights"]
        client.train()
        return {"update": client.compressed("update", client.weights() - theta, state)}, state

    def server(self, server: State, mean: State, heard: Heard) -> State:
        return {**server, "weights": self.moved(server, mean["update"])} if mean else server

    def moved(self, server: State, update: Tensor) -> Tensor:
        """θ after a mean update."""
        return server["weights"] + update
