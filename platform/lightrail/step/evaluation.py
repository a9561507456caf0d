"""How an accumulation window is evaluated: again and again, with the same dropout masks, in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightrail.errors import ClosureError
from lightrail.step.batches import leading_size
from lightrail.step.randomness import RandomState
from lightrail.step.running_statistics import Statistics
from lightrail.step.sharded import are_sharded, shard_of

__all__ = ["Evaluation", "LossFn", "loss_in"]

LossFn = Callable[..., Any]


class Evaluation:
    """The window of a :class:`lightrail.Closure`, and how a function of its micro-batches is evaluated over it.

    Its arguments are those of :class:`lightrail.Closure`.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        params: Sequence[Tensor],
        *batches: Any,
        module: nn.Module | None = None,
        sampled_loss_fn: LossFn | None = None,
        objectives_fn: Callable[..., Any] | None = None,
        clusters_fn: Callable[..., Tensor] | None = None,
        num_samples_fn: Callable[..., int] | None = None,
        sample_losses_fn: Callable[..., Tensor] | None = None,
        outputs_fn: Callable[..., Tensor] | None = None,
        output_loss_fn: Callable[..., Tensor] | None = None,
        players: Mapping[str, Sequence[Tensor]] | None = None,
        in_turn: bool = False,
    ) -> None:
        self.params: list[Tensor] = list(params)
        self._set_players(players, in_turn)
        self._returned_fn = loss_fn
        self._loss_fn = loss_in(loss_fn)
        self._sampled_loss_fn = sampled_loss_fn
        self._objectives_fn = objectives_fn
        self._clusters_fn = clusters_fn
        self._num_samples_fn = num_samples_fn
        self._sample_losses_fn = sample_losses_fn
        self._outputs_fn = outputs_fn
        self._output_loss_fn = output_loss_fn
        self._statistics = Statistics(module)
        self._open([(batch,) for batch in batches] or [()])
        self._divisor = len(self._batches)

    def _open(self, batches: list[tuple[Any, ...]]) -> None:
        """Begins a window."""
        self.evaluations: float = 0
        self._batches = batches
        self._states: list[RandomState | None] = [None] * len(batches)
        self._has_run = False
        self._share: float = 1  # of the window that a question is about

    def _set_players(self, players: Mapping[str, Sequence[Tensor]] | None, in_turn: bool) -> None:
        self._players = {name: list(params) for name, params in (players or {}).items()}
        self._moving = tuple(self._players)[: 1 if in_turn else None]

    # What a loop of its own overrides: how it evaluates a micro-batch, what it silences, how its ranks agree.

    def _evaluate(self, fn: LossFn, batch: tuple[Any, ...], index: int) -> Tensor:
        """The loss ``fn`` of one micro-batch."""
        return fn(*batch)

    def _average(self, tensors: list[Tensor]) -> None:
        """Averages over ranks, in place."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            world_size = torch.distributed.get_world_size()
            if world_size > 1:
                for tensor in tensors:
                    torch.distributed.all_reduce(tensor)
                    tensor.div_(world_size)

    def _average_gradients(self, gradients: list[Tensor]) -> None:
        """Averages over ranks what a backward pass left in ``.grad``: that of shards did so itself."""
        if not are_sharded(gradients):
            self._average(gradients)

    @contextmanager
    def _whole(self) -> Iterator[list[Tensor]]:
        """Inside, the parameters as operations see them, in a graph that can be differentiated again and again."""
        if are_sharded(self.params):
            raise self._sharded("differentiates the loss in another way than by a backward pass")
        yield self.params

    def _sharded(self, does: str) -> ClosureError:
        return ClosureError(
            f"the method {does}, and the parameters are sharded",
            found="parameters that each rank has a part of",
            allowed="whole parameters: trainer=ddp, or one device",
            remedy="Use trainer=ddp, or choose a method that asks for gradients alone.",
        )

    def _cut(self, tensors: list[Tensor]) -> list[Tensor]:
        """Whole tensors, equal on all ranks, as parts like those of the parameters."""
        return [shard_of(tensor, p) for tensor, p in zip(tensors, self.params, strict=True)]

    def _run_first(self) -> Tensor:
        """The one evaluation of a step that moves statistics, logs and counts; leaves its gradient in ``.grad``."""
        for p in self.params:
            p.grad = None
        losses = []
        for index, batch in enumerate(self._batches):
            self._states[index] = RandomState.capture()
            losses.append(self._differentiate(self._evaluate, self._loss_fn, batch, index))
        self._average_gradients([p.grad for p in self.params if p.grad is not None])
        return self._mean_over_ranks(losses)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """An extra evaluation: what it moves, other than what the method asked for, is put back."""
        with RandomState.kept(), self._statistics.frozen():
            yield

    @property
    def _rank(self) -> int:
        distributed = torch.distributed
        return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0

    @property
    def _world_size(self) -> int:
        distributed = torch.distributed
        return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1

    # A function over the window.

    def _count(self) -> None:
        self.evaluations += self._share

    def _required(self, fn: Callable[..., Any] | None, name: str, signature: str) -> Callable[..., Any]:
        if fn is None:
            raise ClosureError(
                f"the method needs '{name}', which this task or loop does not offer",
                found="a loss alone",
                allowed=f"a task with a method {signature}",
                remedy=f"Add {signature} to the task, or pass it to lightrail.Closure; or choose another method.",
            )
        return fn

    def _replay(self, fn: Callable[..., Any], batch: tuple[Any, ...], index: int) -> Any:
        """Evaluates one micro-batch with the random state that its first evaluation had."""
        state = self._states[index]
        if state is None:
            self._states[index] = RandomState.capture()
        else:
            state.restore()
        return self._evaluate(fn, batch, index)

    def _gradient_of(
        self, fn: LossFn, batches: Sequence[tuple[Any, ...]] | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The loss and gradient of ``fn`` over the window and all ranks."""
        losses, found = self._gradient_here(fn, batches or self._batches)
        self._average_gradients([gradient for gradient in found if gradient is not None])
        return self._mean_over_ranks(losses), found

    def _gradient_here(
        self, fn: LossFn, batches: Sequence[tuple[Any, ...]]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The losses and the gradient of ``fn`` on this rank, through ``.grad`` and back; empty batches are skipped.

        ``backward`` rather than ``autograd.grad``: it gives gradients in the layout of their parameters, and it is
        what the first evaluation used, so that the two are equal bit for bit.
        """
        kept = [p.grad for p in self.params]
        for p in self.params:
            p.grad = None
        losses = []
        try:
            with self._aside():
                for index, batch in enumerate(batches):
                    if leading_size(batch) == 0:
                        continue
                    losses.append(self._differentiate(self._replay, fn, batch, index))
            found = [p.grad for p in self.params]
        finally:
            for p, gradient in zip(self.params, kept, strict=True):
                p.grad = gradient
        return losses, found

    def _differentiate(self, evaluate: Callable[..., Tensor], fn: LossFn, batch: tuple[Any, ...], index: int) -> Tensor:
        """Adds the gradient of one micro-batch to ``.grad``: in a game, each player's own, of its own loss."""
        if not self._players:
            return self._backward(evaluate(fn, batch, index), self.params)
        losses = evaluate(self._of_each_player(fn), batch, index)
        parts = [self._backward(loss, self._players[name]) for name, loss in zip(self._moving, losses, strict=True)]
        return torch.stack(parts).sum()

    def _backward(self, loss: Tensor, params: Sequence[Tensor]) -> Tensor:
        loss = loss / self._divisor
        if not loss.requires_grad:
            return loss.detach()
        if are_sharded(params):
            loss.backward()  # the graph knows whole parameters; their gradients reach the shards by themselves
        else:
            loss.backward(inputs=[p for p in params if p.requires_grad])
        return loss.detach()

    def _of_each_player(self, fn: LossFn) -> Callable[..., Any]:
        """One evaluation for all who move, so that they draw from one stream of random numbers."""
        return lambda *batch: [fn(name, *batch) for name in self._moving]

    def _mean_over_ranks(self, losses: list[Tensor]) -> Tensor:
        total = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        self._average([total])
        return total

    def _filled(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.params, gradients, strict=True)]


def loss_in(fn: LossFn) -> Callable[..., Tensor]:
    """The loss of a function that returns it alone, or in a mapping with other scalars beside it."""

    def loss(*args: Any) -> Tensor:
        returned = fn(*args)
        return returned["loss"] if isinstance(returned, Mapping) else returned

    return loss
