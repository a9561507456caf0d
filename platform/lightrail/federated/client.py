"""A client in one round: its samples, its model, and what a method may ask of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightrail.federated.compressor import Compressor, Encoded
from lightrail.federated.feedback import ef21, error_feedback
from lightrail.federated.local_model import Layout, LocalModel
from lightrail.federated.visit import Trained, Visit
from lightrail.step.transform import Transform

__all__ = ["ESTIMATE", "Client"]

ESTIMATE = "estimate of "  # how a client's state names what the server has of a vector


class Client:
    """A client, as a method sees it.

    Args:
        number: From 0.
        round_index: From 0.
        samples: n_k, how many it has.
        model: The task that stands for the client's own.
        visit: Makes a visit of so many steps over a loader (``None`` for what was configured, and for its own).
        loader: Makes a loader of its samples: of the training's batch size, or of all in order.
        generator: Where a method's own random numbers come from; seeded by run, round and client.
        compressor: What is put around each vector that is sent; ``None`` for nothing.
        feedback: What becomes of what it left out: ``ef``, ``ef21`` or ``none``.
    """

    def __init__(
        self,
        number: int,
        round_index: int,
        samples: int,
        model: LocalModel,
        visit: Callable[[int | None, DataLoader[Any] | None], Visit],
        loader: Callable[[bool], DataLoader[Any]],
        generator: torch.Generator,
        compressor: Compressor | None,
        feedback: str = "ef",
    ) -> None:
        self.number, self.round, self.samples = number, round_index, samples
        self.generator = generator
        self.metrics: dict[str, float] = {}
        self._model, self._visit, self._loader = model, visit, loader
        self._compressor, self._feedback = compressor, feedback
        self._batches: Iterator[Any] | None = None

    @property
    def layout(self) -> Layout:
        """Where each parameter lies in the vector."""
        return self._model.layout

    @property
    def model(self) -> LocalModel:
        """The task's parameters as a vector, its statistics, and its gradient at any point."""
        return self._model

    def weights(self) -> Tensor:
        """A copy of the model's weights ``[d]``, on the processor."""
        return self._model.weights().cpu()

    def load(self, weights: Tensor) -> None:
        """Sets the model's weights ``[d]``."""
        self._model.load(weights)

    def train(
        self,
        corrections: Sequence[Transform] = (),
        *,
        steps: int | None = None,
        loader: DataLoader[Any] | None = None,
        change_batch: Callable[[Any], Any] | None = None,
    ) -> Trained:
        """Trains from the model's weights on, as the run would, for the epochs or steps that were configured.

        Args:
            corrections: What acts on the gradient, after privacy and the run's own transforms.
            steps: Optimizer steps in place of what was configured.
            loader: Samples in place of the client's own.
            change_batch: What the task sees in the place of each batch, on the model's device.
        """
        trained = self._visit(steps, loader).train(corrections, change_batch)
        self.metrics |= trained.metrics
        if trained.lr is not None:
            self.metrics["lr"] = trained.lr
        return trained

    def loader(self, *, shuffled: bool = True) -> DataLoader[Any]:
        """The client's samples in batches: as training sees them, or all of them in order."""
        return self._loader(shuffled)

    def batches(self) -> Iterator[Any]:
        """The client's batches without end, in an order of this round's own."""
        while True:
            yield from self._loader(True)

    def gradient(self, at: Tensor, batch: Any = None) -> Tensor:
        """The gradient of the task's loss; of a game, each player's of its own loss.

        Args:
            at: The point ``[d]``.
            batch: One of :meth:`batches`; ``None`` for all of the client's samples.

        Returns:
            ``[d]``, on the processor.
        """
        if batch is not None:
            found, loss = self._model.gradient(batch, at)
        else:
            found, loss = self._full(at)
        self.metrics["loss"] = loss
        return found.cpu()

    def _full(self, at: Tensor) -> tuple[Tensor, float]:
        from lightrail.step.batches import leading_size

        total, mean, count = torch.zeros_like(at, device=self._model.device), 0.0, 0
        for batch in self._loader(False):
            size = leading_size(batch) or 1
            found, loss = self._model.gradient(batch, at)
            total.add_(found, alpha=size)
            mean, count = mean + size * loss, count + size
        return total / count, mean / count

    def compressed(self, name: str, vector: Tensor, state: dict[str, Tensor]) -> Tensor | Encoded:
        """A vector as it is sent: as it is, or compressed, with what was left out fed back as the run says.

        Args:
            name: Of the vector, under which its error is kept.
            vector: ``[d]``.
            state: The client's, in which the error is read and written.
        """
        compressor = self._compressor
        if compressor is None:
            return vector
        compress = partial(compressor.compress, generator=self.generator)
        if self._feedback == "ef21":
            key = f"{ESTIMATE}{name}"
            encoded, state[key] = ef21(vector, state.get(key, torch.zeros_like(vector)), compress)
            return encoded
        if compressor.is_unbiased or self._feedback == "none":
            return compress(vector)
        key = f"error of {name}"
        encoded, state[key] = error_feedback(vector, state.get(key, torch.zeros_like(vector)), compress)
        return encoded
