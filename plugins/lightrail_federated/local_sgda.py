"""Descent and ascent on clients, and averages of where they end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from torch import Tensor

from lightrail import Traits
from lightrail.federated import Client, Heard, ServerMethod, State
from lightrail.federated.wire import Payload
from lightrail.options import positive
from lightrail_federated.participation import steps_of_visit

__all__ = ["Field", "LocalSGDA", "descended", "local_fields"]

Field = Callable[[Tensor], Tensor]
"""F_k: of a point ``[d]``, each player's gradient of its own loss ``[d]``."""


def descended(x: Tensor, F: Field, gamma: float) -> Tensor:
    r"""One step of descent and ascent, x - γ F(x).

    Args:
        x: ``[d]``.
        F: The field.
        gamma: γ, positive.

    Example:
        >>> import torch
        >>> descended(torch.tensor([1.0, 1.0]), lambda z: torch.stack([z[1], -z[0]]), 0.5)
        tensor([0.5000, 1.5000])
    """
    return x - gamma * F(x)


def local_fields(client: Client, full: bool) -> Iterator[Field]:
    """A client's field, again and again: of all of its samples, or each time of its next batch.

    Args:
        client: The client.
        full: Whether all samples are used.
    """
    batches = None if full else client.batches()
    while True:
        yield _field(client, None if batches is None else next(batches))


def _field(client: Client, batch: Any) -> Field:
    return lambda x: client.gradient(x, batch)


class LocalSGDA(ServerMethod):
    """Local stochastic gradient descent-ascent: clients step along their own fields, the server takes the mean.

    Each client makes K steps x_k ← x_k - γ F_k(x_k) from the server's x, where F_k has each player's gradient of its
    own loss; of a task with one loss it is the gradient, and this is federated averaging with plain gradient descent.

    x ← Σ_k (n_k/n) x_k

    With K = 1 this is gradient descent-ascent. With more steps and data that differ it ends away from the equilibrium,
    the further the more steps, and on games without strong monotonicity it may not end at all.

    Args:
        lr: γ; positive.
        full_gradients: Whether each step sees all samples of the client, in place of a batch.

    Deviations:
        The published experiments let γ fall as 8/(μ(a + t)); here it stays.

    Example:
        >>> from lightrail import compose
        >>> run = ["+federated=local_sgda", "federated.clients=4", "federated.lr=0.05", "logger=[]"]
        >>> compose(run).composition.config.federated.lr
        0.05

    Reference:
        S. Zhang, S. Choudhury, S. U. Stich and N. Loizou, Communication-Efficient Gradient Descent-Accent Methods for
        Distributed Variational Inequalities, ICLR 2024, where it is compared with. arXiv 2306.05100.
    """

    traits: ClassVar[Traits] = Traits(
        rule="x_k ← x_k - γ F_k(x_k), K times; x ← Σ_k (n_k/n) x_k",
        paper="Zhang et al. 2024, Communication-Efficient Gradient Descent-Accent Methods, arXiv 2306.05100",
        example={"clients": 4, "rounds": 2, "lr": 0.05},
    )
    runs_optimizer: ClassVar[bool] = False
    is_one_update: ClassVar[bool] = True

    def __init__(self, *, lr: float = 0.1, full_gradients: bool = False, **common: Any) -> None:
        super().__init__(**common)
        positive(lr=lr)
        self.lr, self.full_gradients = lr, full_gradients

    def stepped(self, x: Tensor, fields: Iterator[Field]) -> Tensor:
        """One local step from x ``[d]``; takes as many of the client's fields as it needs."""
        return descended(x, next(fields), self.lr)

    def client(self, client: Client, message: State, state: State) -> tuple[Payload, State]:
        x = message["weights"]
        fields = local_fields(client, self.full_gradients)
        for _ in range(steps_of_visit(self, client)):
            x = self.stepped(x, fields)
        client.metrics["lr"] = self.lr
        return {"update": client.compressed("update", x - message["weights"], state)}, state

    def server(self, server: State, mean: State, heard: Heard) -> State:
        return {**server, "weights": server["weights"] + mean["update"]} if mean else server
