"""A task's parameters as one vector, and its gradient at any point."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import LightningModule
from torch import Tensor

from lightrail.step.evaluation import loss_in
from lightrail.step.players import Game, game_of

__all__ = ["Layout", "LocalModel", "as_it_was"]


@dataclass(frozen=True)
class Layout:
    """Where each parameter lies in the vector.

    Args:
        names: Of the parameters that are trained, in order.
        shapes: Theirs.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> list[int]:
        """Entries of each."""
        return [torch.Size(shape).numel() for shape in self.shapes]

    @property
    def size(self) -> int:
        """Entries of the vector."""
        return sum(self.sizes)

    def places(self) -> Iterator[tuple[str, slice]]:
        """Name and place of each parameter."""
        start = 0
        for name, size in zip(self.names, self.sizes, strict=True):
            yield name, slice(start, start + size)
            start += size


class LocalModel:
    """The task that a process trains for all of its clients, one after the other.

    Args:
        task: A task of this process's own.
    """

    def __init__(self, task: LightningModule) -> None:
        self.task = task
        self._training_step = task.training_step  # whatever a visit puts in its place
        self.game: Game | None = game_of(task)
        named = [(name, p) for name, p in task.named_parameters() if p.requires_grad]
        self.params = [p for _, p in named]
        self.layout = Layout(tuple(name for name, _ in named), tuple(tuple(p.shape) for p in self.params))
        persistent = set(task.state_dict(keep_vars=True))
        buffers = [(name, b) for name, b in task.named_buffers() if name in persistent]
        self._buffers = [b for _, b in buffers if b.is_floating_point()]
        self._counts = [b for _, b in buffers if not b.is_floating_point()]
        self.buffer_names = tuple(name for name, b in buffers if b.is_floating_point())

    @property
    def dtype(self) -> torch.dtype:
        """Of the vector: float64 where all parameters are, else float32."""
        is_double = bool(self.params) and all(p.dtype == torch.float64 for p in self.params)
        return torch.float64 if is_double else torch.float32

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        return self.params[0].device

    @property
    def has_buffers(self) -> bool:
        """Whether the model keeps statistics beside its parameters, as BatchNorm does."""
        return bool(self._buffers or self._counts)

    def weights(self) -> Tensor:
        """A copy of all that is trained, ``[d]``."""
        return self._joined(self.params)

    @torch.no_grad()
    def load(self, weights: Tensor) -> None:
        """Sets all that is trained from a vector ``[d]``."""
        for p, part in zip(self.params, weights.split(self.layout.sizes), strict=True):
            p.copy_(part.view_as(p))

    def buffers(self) -> dict[str, Tensor]:
        """Copies of the statistics: those that are averaged, and the counts, which are not."""
        found = {}
        if self._buffers:
            found["buffers"] = self._joined(self._buffers)
        if self._counts:
            found["counts"] = torch.cat([b.detach().flatten().to("cpu", torch.int64) for b in self._counts])
        return found

    @torch.no_grad()
    def load_buffers(self, found: dict[str, Tensor]) -> None:
        """The inverse of :meth:`buffers`; what is not given stays as it is."""
        for own, name in ((self._buffers, "buffers"), (self._counts, "counts")):
            if name in found and own:
                for b, part in zip(own, found[name].split([b.numel() for b in own]), strict=True):
                    b.copy_(part.view_as(b))

    def gradient(self, batch: Any, at: Tensor | None = None) -> tuple[Tensor, float]:
        """The gradient of the task's loss of a batch; of a game, each player's of its own loss.

        Args:
            batch: As the training loader gives it.
            at: The point ``[d]``; the parameters are left there. ``None`` for where they are.

        Returns:
            ``[d]``, and the loss (of a game, the sum over players).
        """
        if at is not None:
            self.load(at)
        batch = move_data_to_device(batch, self.device)
        self.task.train()
        with torch.enable_grad(), self.silent():
            if self.game is not None:
                return self._field(self.game, batch)
            loss = self.loss(batch)
            found = torch.autograd.grad(loss, self.params, allow_unused=True)
        return self._joined(
            [torch.zeros_like(p) if g is None else g for p, g in zip(self.params, found, strict=True)]
        ), float(loss.detach())

    def loss(self, batch: Any) -> Tensor:
        """The task's loss of a batch, where the parameters are."""
        # Some tasks look at the number of the batch, which means nothing here.
        return loss_in(self._training_step)(move_data_to_device(batch, self.device), 0)

    def _field(self, game: Game, batch: Any) -> tuple[Tensor, float]:
        own: dict[int, Tensor] = {}
        total = 0.0
        for name, params in game.players.items():
            loss = self.task.player_loss(name, batch)  # type: ignore[operator]
            found = torch.autograd.grad(loss, params, allow_unused=True)
            own |= {id(p): torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)}
            total += float(loss.detach())
        return self._joined([own[id(p)] for p in self.params]), total

    @contextmanager
    def silent(self) -> Iterator[None]:
        """What a task logs while no trainer runs has nowhere to go."""
        with as_it_was(self.task, "log", "log_dict"):
            self.task.log = self.task.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
            yield

    def _joined(self, tensors: list[Any]) -> Tensor:
        return torch.cat([each.detach().reshape(-1).to(self.dtype) for each in tensors])


@contextmanager
def as_it_was(task: LightningModule, *names: str) -> Iterator[None]:
    """What of a task is replaced inside is its own again afterwards."""
    own = {name: vars(task)[name] for name in names if name in vars(task)}
    try:
        yield
    finally:
        for name in names:
            vars(task).pop(name, None)
        vars(task).update(own)
