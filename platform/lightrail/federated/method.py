"""What a federated method is: what clients do with what they are sent, and what the server does with their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from lightrail.errors import ConfigurationError
from lightrail.federated.compressor import Compressor
from lightrail.federated.partition import Partition
from lightrail.federated.server_privacy import ServerPrivacy
from lightrail.federated.topology import Topology
from lightrail.federated.wire import Payload
from lightrail.inherited_options import signature_with_inherited
from lightrail.options import at_least, between, positive
from lightrail.traits import Traits

if TYPE_CHECKING:
    from lightrail.federated.client import Client
    from lightrail.federated.gossip import Gossip
    from lightrail.run.run import Run

__all__ = ["DecentralisedMethod", "FederatedMethod", "Heard", "ServerMethod", "State"]

State = dict[str, Tensor]
"""Vectors by name, which a checkpoint keeps."""


@dataclass(frozen=True)
class Heard:
    """Whom the server heard in a round.

    Args:
        round: From 0.
        clients: How many there are.
        answered: The numbers of those that answered, in order.
        samples: How many each of them has.
        generator: Where a method's own random numbers come from; seeded by the run and the round.
    """

    round: int
    clients: int
    answered: tuple[int, ...]
    samples: tuple[int, ...]
    generator: torch.Generator


class FederatedMethod:
    """What federated and decentralised methods share; extend :class:`ServerMethod` or :class:`DecentralisedMethod`.

    A method's constructor lists its own options and hands the rest on: ``def __init__(self, *, mu: float = 0.01,
    **common: Any): super().__init__(**common)``; what the platform lists is both.

    Args:
        rounds: How many; at least 1.
        evaluate_every: Rounds between two validations; at least 1.
        partition: Which client has which samples; evenly at random where nothing is said.
        compressor: What is put around each vector that a client sends.
    """

    traits: ClassVar[Traits] = Traits()

    compressors: ClassVar[Literal["none", "any", "unbiased", "contractive"]] = "any"
    """Which compressors its theory allows."""
    runs_optimizer: ClassVar[bool] = True
    """Whether clients take steps of the run's optimizer; one that steps by itself refuses a chosen one."""
    needs_game: ClassVar[bool] = False
    """Whether the task must name players."""

    clients: int
    seed: int = 0
    """Of the run, for random numbers that clients and server share; set before the first round."""

    def __init__(
        self,
        *,
        rounds: int = 30,
        evaluate_every: int = 1,
        partition: Partition | None = None,
        compressor: Compressor | None = None,
    ) -> None:
        at_least(1, rounds=rounds, evaluate_every=evaluate_every)
        self.rounds, self.evaluate_every = rounds, evaluate_every
        self.partition, self.compressor = partition, compressor

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.__signature__ = signature_with_inherited(cls)  # type: ignore[attr-defined]

    def logged(self) -> dict[str, float]:
        """Figures of its own that are worth a curve."""
        return {}

    def wrap(self, run: Run) -> Run:
        """The run, carried out in rounds.

        Args:
            run: As it was composed.

        Raises:
            CompositionError: Something in it cannot be carried out so.
        """
        from lightrail.federated.wrapping import made_federated

        return made_federated(self, run)


class ServerMethod(FederatedMethod):
    """A federated method: a server sends, clients work on their own data and answer, the server moves.

    Vectors are flat: θ is everything that is trained, ``[d]``. Statistics of layers (BatchNorm's) are averaged by the
    engine unless ``keeps_buffers`` says that they stay where they are; of whole numbers, the greatest is kept.

    Args:
        clients: How many there are; at least 1.
        fraction: The share of them that takes part in a round, in (0, 1].
        sampling: ``fixed`` (so many clients every round) or ``poisson`` (each by its own coin, as privacy wants it).
        local_epochs: Passes that a client makes over its samples in a round; at least 1.
        local_steps: Optimizer steps that it makes instead.
        engine: ``here`` (on this machine, with nothing to install) or ``flower``.
        processes: How many of this machine work on clients at a time, each with a copy of the data; at least 1.
        feedback: What becomes of what a biased compressor left out: ``ef`` (it is added to what is sent next), ``ef21``
            (what is sent is how the vector differs from what the server has), or ``none`` (it is lost).
        timeout: Seconds after which a client is given up in a round, where clients are elsewhere.
        secure_range: The greatest entry, up or down, that a client can send where aggregation is secure; positive.
        largest_update: A client whose answer is so many times longer than its round's median is left out; at least 1.
        secure_aggregation: Whether the server sees only the sum of what clients send, by masks of Bonawitz et al.;
            counts of batches, losses and numbers of samples it does see.
        server_privacy: What makes what the server releases private for each client.
    """

    weighting: ClassVar[Literal["samples", "uniform"]] = "samples"
    """How the answers are averaged: by how many samples a client has, or all alike."""
    keeps_buffers: ClassVar[bool] = False
    """Whether statistics of layers stay on the client."""
    is_one_update: ClassVar[bool] = False
    """Whether all that a client sends is one vector named ``update``, of which the server uses the mean alone."""

    def __init__(
        self,
        *,
        clients: int = 10,
        fraction: float = 1.0,
        sampling: Literal["fixed", "poisson"] = "fixed",
        local_epochs: int = 1,
        local_steps: int | None = None,
        engine: Literal["here", "flower"] = "here",
        processes: int = 1,
        feedback: Literal["ef", "ef21", "none"] = "ef",
        timeout: float = 600.0,
        largest_update: float = 1e4,
        secure_aggregation: bool = False,
        secure_range: float = 8.0,
        server_privacy: ServerPrivacy | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        steps = 1 if local_steps is None else local_steps
        at_least(1, clients=clients, local_epochs=local_epochs, local_steps=steps, processes=processes)
        between(0.0, 1.0, closed="right", fraction=fraction)
        positive(timeout=timeout, secure_range=secure_range)
        if not largest_update >= 1:
            raise ConfigurationError(
                "largest_update is out of range",
                found=f"largest_update={largest_update}",
                allowed="a number of at least 1",
                remedy="Set largest_update within that range.",
            )
        self.clients, self.fraction, self.sampling = clients, fraction, sampling
        self.local_epochs, self.local_steps = local_epochs, local_steps
        self.engine, self.processes, self.feedback = engine, processes, feedback
        self.timeout, self.largest_update = timeout, largest_update
        self.secure_aggregation, self.secure_range = secure_aggregation, secure_range
        self.server_privacy = server_privacy

    @property
    def per_round(self) -> int:
        """Clients of a round, where so many take part in each."""
        return max(1, round(self.fraction * self.clients))

    def chosen(self, round_index: int, generator: torch.Generator) -> list[int]:
        """Who takes part in a round, in order.

        Args:
            round_index: From 0.
            generator: Seeded by the run and the round.
        """
        if self.sampling == "poisson":
            return (torch.rand(self.clients, generator=generator) < self.fraction).nonzero().flatten().tolist()
        return sorted(torch.randperm(self.clients, generator=generator)[: self.per_round].tolist())

    def start(self, weights: Tensor) -> State:
        """The server's state before the first round: ``weights`` θ ``[d]``, and whatever else the method keeps."""
        return {"weights": weights}

    def message(self, server: State, round_index: int) -> Payload:
        """What every client of a round is sent."""
        return {"weights": server["weights"]}

    def client(self, client: Client, message: State, state: State) -> tuple[Payload, State]:
        """What a client does.

        Args:
            client: Its data and model, and what can be done with them.
            message: What the server sent, whole vectors.
            state: What this call returned when the client last took part; empty at first. It never leaves the client.

        Returns:
            What it sends, and its state. The names ``buffers`` and ``counts`` are the engine's own, for statistics of
            layers.
        """
        raise NotImplementedError

    def server(self, server: State, mean: State, heard: Heard) -> State:
        """What the server does with the answers.

        Args:
            server: Its state.
            mean: Of what the clients sent, by name; weighted as ``weighting`` says. Empty where nobody answered.
            heard: Who answered.

        Returns:
            Its new state.
        """
        raise NotImplementedError

    def averaged(self, answers: Sequence[Mapping[str, Tensor]], samples: Sequence[int]) -> State:
        """The mean of the answers; a method that needs more than a mean overrides this, and cannot be secret then.

        Args:
            answers: What each client sent, whole vectors; at least one.
            samples: How many samples each has.
        """
        weights = [n / sum(samples) if self.weighting == "samples" else 1 / len(samples) for n in samples]
        return {name: _weighted([each[name] for each in answers], weights) for name in answers[0]}


def _weighted(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    if not vectors[0].is_floating_point():
        return torch.stack(list(vectors)).amax(0)
    # In double precision, so that the order of clients does not matter.
    total = torch.zeros_like(vectors[0], dtype=torch.float64)
    for vector, weight in zip(vectors, weights, strict=True):
        total.add_(vector, alpha=weight)
    return total.to(vectors[0].dtype)


class DecentralisedMethod(FederatedMethod):
    """A decentralised method: no server; every node has its own vector and speaks with its neighbours.

    Rows are nodes: ``X`` is ``[n, d]``. The model that is validated and saved is the mean over nodes.

    Args:
        nodes: How many there are; at least 2.
        topology: Who speaks with whom; a ring where nothing is said.
    """

    needs_fixed_topology: ClassVar[bool] = False
    """Whether it keeps averages of its neighbours over rounds, which mean nothing once these are others."""
    is_asynchronous: ClassVar[bool] = False
    """Whether nodes move one at a time, in an order that a clock or a token decides."""

    def __init__(self, *, nodes: int = 8, topology: Topology | None = None, **common: Any) -> None:
        super().__init__(**common)
        at_least(2, nodes=nodes)
        self.nodes = self.clients = nodes
        self.topology = topology

    def start(self, X: Tensor, gossip: Gossip) -> State:
        """The state before the first round: ``X``, and whatever else the method keeps.

        Args:
            X: Every node's weights ``[n, d]``, all equal.
            gossip: What the nodes can do.
        """
        return {"X": X}

    def step(self, state: State, gossip: Gossip) -> State:
        """One round.

        Args:
            state: ``X`` ``[n, d]``, and whatever else the method keeps.
            gossip: Gradients at the nodes, and averages over neighbours.

        Returns:
            The new state.
        """
        raise NotImplementedError

    def weights(self, state: State) -> Tensor:
        """Every node's weights ``[n, d]``."""
        return state["X"]

    def joined(self, state: State) -> Tensor:
        """The run's model ``[d]``: the mean over nodes, unless a method knows better."""
        return self.weights(state).mean(0)
