"""Nodes without a server: what they can compute, and how they average with their neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightrail.errors import CompositionError
from lightrail.federated.client_side import ClientSide
from lightrail.federated.compressor import Compressor
from lightrail.federated.local_model import Layout
from lightrail.federated.method import DecentralisedMethod
from lightrail.federated.node_optimizer import NodeOptimizer
from lightrail.federated.randomness import generator_for, seed_for, seeded
from lightrail.federated.topology import check_mixing

__all__ = ["Gossip"]


class Gossip:
    """What the nodes of a round can do, all of them in this process: their vectors are the rows of matrices.

    Args:
        side: The nodes' data and model.
        method: What they do.
    """

    def __init__(self, side: ClientSide, method: DecentralisedMethod) -> None:
        assert method.topology is not None
        self._side, self._method = side, method
        self.nodes = method.nodes
        self.size = side.model.layout.size
        self.W = method.topology.mixing(method.nodes, generator_for(side.seed, "topology"))
        """The weights of the topology ``[n, n]``, float64: symmetric and doubly stochastic."""
        check_mixing(self.W, type(method.topology).__name__)
        if method.needs_fixed_topology and method.topology.changes:
            raise _changing(method)
        self.round = 0
        self.nbytes = 0
        self.losses: list[float] = []
        self.lr = 0.0
        self.drawn = torch.zeros(self.nodes, dtype=torch.int64)  # batches that each node has had
        self._current: dict[int, Any] = {}
        self._optimizers: list[NodeOptimizer] = []
        self._buffers = [side.model.buffers() for _ in range(self.nodes)]

    def begin_round(self, round_index: int) -> None:
        """Called before each round: counters go back to zero, and every node's next batch is a new one."""
        self.round, self.nbytes, self.losses = round_index, 0, []
        self.generator = generator_for(self._side.seed, "method", round_index)
        self._current = {}

    @property
    def layout(self) -> Layout:
        """Where each parameter lies in a row."""
        return self._side.model.layout

    # Speaking.

    @property
    def neighbours(self) -> list[list[int]]:
        """Of each node, without itself."""
        return [[j for j in row.nonzero().flatten().tolist() if j != i] for i, row in enumerate(self.W)]

    @property
    def edges(self) -> list[tuple[int, int]]:
        """Pairs (i, j) with i < j."""
        return [(i, j) for i, near in enumerate(self.neighbours) for j in near if i < j]

    def mix(self, X: Tensor, *, nbytes: int | None = None) -> Tensor:
        """W X: every node averages what its neighbours send.

        Args:
            X: ``[n, …]``.
            nbytes: Of all rows together as they are sent, where they are compressed.
        """
        assert self._method.topology is not None
        W = self._method.topology.mixing_at(self.round, self.W)
        links = int((W != 0).sum() - (W.diagonal() != 0).sum())
        per_link = (X[0].nbytes if nbytes is None else nbytes / self.nodes) if self.nodes else 0
        self.nbytes += round(links * per_link)
        flat = X.reshape(self.nodes, -1)
        return (W.to(flat.device, flat.dtype) @ flat).view_as(X)

    def sent(self, nbytes: int) -> None:
        """Counts bytes that a method sends in its own way: along one edge, or with a token."""
        self.nbytes += nbytes

    def compressed(self, X: Tensor) -> tuple[Tensor, int]:
        """C of each row, and the bytes of all rows together; the rows themselves where nothing compresses.

        Args:
            X: ``[n, d]``.
        """
        compressor: Compressor | None = self._method.compressor
        if compressor is None:
            return X, X.nbytes
        encoded = [compressor.compress(row.cpu(), self.generator) for row in X]
        rows = torch.stack([each.decoded() for each in encoded]).to(X.device)
        return rows, sum(each.nbytes for each in encoded)

    # Computing.

    def gradient(self, X: Tensor, *, full: bool = False, nodes: Sequence[int] | None = None) -> Tensor:
        """∇f_i(x_i; ζ_i) at each node, on its batch of this round: asked again, of the same batch.

        Args:
            X: A point a row ``[n, d]``.
            full: On all of the node's samples.
            nodes: Which nodes; the rows of ``X`` are theirs. All by default.

        Returns:
            ``[n, d]``.
        """
        rows = range(self.nodes) if nodes is None else nodes
        return torch.stack([self._gradient(i, x, full) for i, x in zip(rows, X, strict=True)])

    def _gradient(self, node: int, x: Tensor, full: bool) -> Tensor:
        with self._at(node):
            client = self._side.client(node, self.round)
            found = client.gradient(x, None if full else self._batch(node))
        self.losses.append(client.metrics["loss"])
        return found.to(x.device)

    @contextmanager
    def _at(self, node: int) -> Iterator[None]:
        """With the random numbers of a node in this round, and its own statistics of layers."""
        model = self._side.model
        with seeded(seed_for(self._side.seed, "node", self.round, node)):
            model.load_buffers(self._buffers[node])
            yield
            self._buffers[node] = model.buffers()

    def fresh_batches(self, nodes: Sequence[int] | None = None) -> None:
        """From here on, gradients are taken on the next batch of these nodes, or of all."""
        for node in range(self.nodes) if nodes is None else nodes:
            self._current.pop(node, None)

    def _batch(self, node: int) -> Any:
        if node not in self._current:
            self._current[node] = self._side.data.batch(node, int(self.drawn[node]))
            self.drawn[node] += 1
        return self._current[node]

    def local_step(self, X: Tensor, *, nodes: Sequence[int] | None = None) -> Tensor:
        """One step of the run's own optimizer at each node, from its row, on its batch of this round.

        Args:
            X: ``[n, d]``.
            nodes: Which nodes; the rows of ``X`` are theirs. All by default.

        Returns:
            ``[n, d]``.
        """
        rows = range(self.nodes) if nodes is None else nodes
        return torch.stack([self._local_step(i, x) for i, x in zip(rows, X, strict=True)])

    def _local_step(self, node: int, x: Tensor) -> Tensor:
        optimizers = self._optimizers = self._optimizers or [NodeOptimizer(self._side) for _ in range(self.nodes)]
        with self._at(node):
            self._side.model.load(x)
            self.losses.append(optimizers[node].step(self._batch(node)))
        self.lr = optimizers[node].lr
        return self._side.model.weights().to(x.device)

    def buffers(self) -> dict[str, Tensor]:
        """The statistics of layers, averaged over nodes; of whole numbers the greatest."""
        names = self._buffers[0]
        joined = {name: torch.stack([each[name] for each in self._buffers]) for name in names}
        return {name: x.mean(0) if x.is_floating_point() else x.amax(0) for name, x in joined.items()}

    # Saving.

    def state_dict(self) -> dict[str, Any]:
        """Where nodes are in their data, and the state of their optimizers."""
        return {
            "drawn": self.drawn.clone(),
            "buffers": self._buffers,
            "optimizers": [each.state_dict() for each in self._optimizers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.drawn, self._buffers = state["drawn"].clone(), list(state["buffers"])
        self._optimizers = [NodeOptimizer(self._side) for _ in state["optimizers"]]
        for optimizer, each in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(each)


def _changing(method: DecentralisedMethod) -> CompositionError:
    return CompositionError(
        f"{type(method).__name__} keeps averages of a node's neighbours, which have to stay the same",
        found=f"topology '{type(method.topology).__name__}', whose weights change from round to round",
        allowed="a topology that stays",
        remedy="Choose another, or for `exponential` leave federated.topology.one_peer out.",
    )
