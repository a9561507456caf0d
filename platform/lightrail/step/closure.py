"""The closure that methods receive when they need more than one gradient.

It is torch's own closure (call it: the loss, and fresh gradients in ``.grad``) with more questions to ask. Each answer
is exact over the whole accumulation window and averaged over ranks; it replays the dropout masks of the window, moves
BatchNorm statistics once a step, and logs once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightrail.errors import ClosureError
from lightrail.step.batches import leading_size, split_batch, split_by_cluster
from lightrail.step.randomness import RandomState
from lightrail.step.running_statistics import Statistics

__all__ = ["Closure"]

LossFn = Callable[..., Tensor]


class Closure:
    """What a loss function answers about itself at and around the current parameters.

    Args:
        loss_fn: ``loss_fn(batch)``, or ``loss_fn()`` where no batches are given: a scalar, the mean over the batch.
        params: The parameters that are being optimized, in the order of the optimizer's groups.
        batches: The micro-batches of one accumulation window; the loss of the window is the mean of theirs.
        module: The module whose BatchNorm statistics and metrics must move once a step, however many evaluations a
            method spends; ``None`` where there are none.
        sampled_loss_fn: ``sampled_loss_fn(batch, generator)`` (``(generator)`` without batches): the mean loss with
            labels drawn from the model's own predictive distribution. Needed by :meth:`sampled`.
        objectives_fn: ``objectives_fn(batch)``: the task's losses, a sequence, a mapping or a 1-d tensor. Needed by
            :meth:`jacobian`.
        clusters_fn: ``clusters_fn(batch)``: the cluster of each sample, whole numbers from 0. Needed by
            :meth:`clusters`.
        num_samples_fn: ``num_samples_fn(batch)``: how many terms the mean loss of a batch has (tokens for a language
            model); the length of its leading axis where it is not given.

    Example:
        >>> w = nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> closure = Closure(lambda: (w ** 2).sum(), [w])
        >>> closure().item(), w.grad.tolist()
        (5.0, [2.0, 4.0])
        >>> with closure.at([torch.zeros(2)]):
        ...     closure.loss().item()
        0.0
        >>> closure.hvp([torch.tensor([1.0, 0.0])])[0].tolist()
        [2.0, 0.0]
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
        players: Mapping[str, Sequence[Tensor]] | None = None,
        in_turn: bool = False,
    ) -> None:
        self.params: list[Tensor] = list(params)
        self._set_players(players, in_turn)
        self.evaluations = 0
        self._loss_fn = loss_fn
        self._sampled_loss_fn = sampled_loss_fn
        self._objectives_fn = objectives_fn
        self._clusters_fn = clusters_fn
        self._num_samples_fn = num_samples_fn
        self._batches: list[tuple[Any, ...]] = [(batch,) for batch in batches] or [()]
        self._divisor = len(self._batches)
        self._statistics = Statistics(module)
        self._states: list[RandomState | None] = [None] * len(self._batches)
        self._has_run = False

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

    def _run_first(self) -> Tensor:
        """The one evaluation of a step that moves statistics, logs and counts; leaves its gradient in ``.grad``."""
        for p in self.params:
            p.grad = None
        losses = []
        for index, batch in enumerate(self._batches):
            self._states[index] = RandomState.capture()
            losses.append(self._differentiate(self._evaluate, self._loss_fn, batch, index))
        self._average([p.grad for p in self.params if p.grad is not None])
        return self._mean_over_ranks(losses)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """An extra evaluation: what it moves, other than what the method asked for, is put back."""
        outside = RandomState.capture()
        try:
            with self._statistics.frozen():
                yield
        finally:
            outside.restore()

    # The questions.

    @torch.enable_grad()
    def __call__(self) -> Tensor:
        """The loss at the current parameters, with its fresh gradient in ``.grad``.

        Returns:
            The mean loss over the window and over ranks: a 0-d tensor without a graph.
        """
        self.evaluations += 1
        if not self._has_run:
            self._has_run = True
            return self._run_first()
        loss, gradients = self._gradient_of(self._loss_fn)
        for p, gradient in zip(self.params, gradients, strict=True):
            p.grad = gradient
        return loss

    def gradient(self) -> tuple[Tensor, list[Tensor]]:
        """The loss and its gradient as new tensors; ``.grad`` stays as it was.

        Returns:
            The loss, and one tensor a parameter (zeros where the loss does not depend on it).
        """
        kept = [p.grad for p in self.params]
        for p in self.params:
            p.grad = None
        try:
            loss = self()
            found = [p.grad for p in self.params]
        finally:
            for p, gradient in zip(self.params, kept, strict=True):
                p.grad = gradient
        return loss, self._filled(found)

    @torch.no_grad()
    def loss(self) -> Tensor:
        """The loss at the current parameters, without gradients: a 0-d tensor."""
        self.evaluations += 1
        with self._aside():
            fn = self._loss_fn
            if self._players:
                of_each = self._of_each_player(self._loss_fn)
                fn = lambda *batch: torch.stack(of_each(*batch)).sum()  # noqa: E731
            losses = [self._replay(fn, batch, index) / self._divisor for index, batch in enumerate(self._batches)]
        return self._mean_over_ranks(losses)

    @torch.enable_grad()
    def hvp(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The Hessian of the loss times a vector, by differentiating twice.

        Args:
            vectors: One tensor a parameter, in its shape.

        Returns:
            One tensor a parameter.

        Raises:
            ClosureError: The loss cannot be differentiated twice.
        """
        if self._players:
            raise ClosureError(
                "a game has no Hessian",
                found=f"players {', '.join(self._players)}",
                allowed="one loss",
                remedy="Choose a method that needs no second derivatives.",
            )
        self.evaluations += 1
        total: list[Tensor] = [torch.zeros_like(p) for p in self.params]
        where = [i for i, p in enumerate(self.params) if p.requires_grad]
        params = [self.params[i] for i in where]
        # The fused attention kernels have no second derivative; the plain one does.
        with self._aside(), sdpa_kernel(SDPBackend.MATH):
            for index, batch in enumerate(self._batches):
                loss = self._replay(self._loss_fn, batch, index) / self._divisor
                gradients = torch.autograd.grad(
                    loss, params, create_graph=True, allow_unused=True, materialize_grads=True
                )
                # A parameter that the loss is linear in has a gradient that does not depend on any.
                curved = [
                    (g, vectors[i].to(p.dtype))
                    for g, i, p in zip(gradients, where, params, strict=True)
                    if g.requires_grad
                ]
                if not curved:
                    continue
                try:
                    products = torch.autograd.grad(
                        [g for g, _ in curved],
                        params,
                        grad_outputs=[v for _, v in curved],
                        allow_unused=True,
                        materialize_grads=True,
                    )
                except RuntimeError as error:
                    raise ClosureError(
                        "the loss cannot be differentiated twice",
                        found=str(error).splitlines()[0],
                        allowed="a model made of operations that have a second derivative",
                        remedy="Choose a method that needs no second derivatives, or another layer in the model.",
                    ) from error
                for i, product in zip(where, products, strict=True):
                    total[i].add_(product.detach())
        self._average(total)
        return total

    @torch.enable_grad()
    def sampled(self) -> list[Tensor]:
        """The gradient with labels drawn from the model's own predictive distribution (Gauss-Newton-Bartlett).

        Dropout masks are those of the window; labels are drawn anew at every call.

        Returns:
            One tensor a parameter; ``.grad`` stays as it was.

        Raises:
            ClosureError: The task offers no ``sampled_loss``.
        """
        sampled_loss_fn = self._required(self._sampled_loss_fn, "sampled_loss", "sampled_loss(batch, generator)")
        self.evaluations += 1
        generator = torch.Generator(self.params[0].device)
        # One draw from the global generator: labels differ from step to step, and an exact resume repeats them.
        generator.manual_seed(int(torch.randint(2**62, (), dtype=torch.int64)) + self._rank)
        _, gradients = self._gradient_of(lambda *batch: sampled_loss_fn(*batch, generator))
        return self._filled(gradients)

    @torch.enable_grad()
    def groups(self, count: int) -> list[list[Tensor]]:
        """The gradients of ``count`` disjoint parts of the batch.

        Part j is the j-th of ``count`` slices along the leading axis, over all micro-batches and ranks.

        Args:
            count: How many parts, between 1 and the size of the smallest micro-batch.

        Returns:
            ``count`` lists of one tensor a parameter.

        Raises:
            ClosureError: No batch was given, or one is smaller than ``count``.
        """
        self.evaluations += 1
        parts = [split_batch(batch, count) for batch in self._batches]
        found = []
        for part in range(count):
            _, gradients = self._gradient_of(self._loss_fn, [parts[index][part] for index in range(len(self._batches))])
            found.append(self._filled(gradients))
        return found

    @torch.enable_grad()
    def clusters(self, count: int) -> list[tuple[int, list[Tensor]]]:
        """The gradient of the samples of each cluster, over the whole window and all ranks.

        Every sample is evaluated once, together with the others of its cluster.

        Args:
            count: How many clusters there are; the task numbers them from 0.

        Returns:
            For each cluster how many samples it has here, and the gradient of their mean loss (zeros where it has
            none), one tensor a parameter.

        Raises:
            ClosureError: The task offers no ``clusters``, or numbers one ``count`` or higher.
        """
        clusters_fn = self._required(self._clusters_fn, "clusters", "clusters(batch)")
        self.evaluations += 1
        parts = [split_by_cluster(batch, clusters_fn(*batch), count) for batch in self._batches]
        summed_loss = lambda *batch: self._loss_fn(*batch) * (leading_size(batch) or 0)  # noqa: E731
        sizes = torch.zeros(count, dtype=torch.float64, device=self.params[0].device)
        sums = []
        for cluster in range(count):
            members = [each[cluster] for each in parts]
            sizes[cluster] = sum(leading_size(batch) or 0 for batch in members) / self._divisor
            sums.append(self._filled(self._gradient_here(summed_loss, members)[1]))
        # All of them, on every rank: a rank may lack a cluster that another has.
        self._average([sizes, *(tensor for each in sums for tensor in each)])
        for size, each in zip(sizes.tolist(), sums, strict=True):
            if size:
                torch._foreach_div_(each, size)
        samples = [round(size * self._divisor * self._world_size) for size in sizes.tolist()]
        return list(zip(samples, sums, strict=True))

    @torch.enable_grad()
    def jacobian(self) -> list[list[Tensor]]:
        """One gradient an objective, for tasks with several losses.

        Returns:
            A list, an objective, of one tensor a parameter.

        Raises:
            ClosureError: The task offers no ``objectives``.
        """
        objectives_fn = self._required(self._objectives_fn, "objectives", "objectives(batch)")
        self.evaluations += 1
        rows: list[list[Tensor]] = []
        params = [p for p in self.params if p.requires_grad]
        with self._aside():
            for index, batch in enumerate(self._batches):
                values = _as_scalars(self._replay(objectives_fn, batch, index))
                for row, value in enumerate(values):
                    gradients = iter(
                        torch.autograd.grad(
                            value / self._divisor,
                            params,
                            retain_graph=row + 1 < len(values),
                            allow_unused=True,
                            materialize_grads=True,
                        )
                    )
                    full = [next(gradients) if p.requires_grad else torch.zeros_like(p) for p in self.params]
                    if index == 0:
                        rows.append(full)
                    else:
                        torch._foreach_add_(rows[row], full)
        for row in rows:
            self._average(row)
        return rows

    def num_samples(self) -> int:
        """How many terms the mean loss has, over the whole window and all ranks.

        Raises:
            ClosureError: No batch was given to count in.
        """
        count = sum(self._num_samples_fn(*b) if self._num_samples_fn else leading_size(b) or 0 for b in self._batches)
        if not count:
            raise ClosureError(
                "the closure cannot count the samples of its loss",
                found="a loss function that closes over its batch",
                allowed="lightrail.Closure(loss_fn, params, batch), or num_samples_fn",
                remedy="Pass the batch to lightrail.Closure, or give the method its batch size.",
            )
        total = torch.tensor([float(count)], dtype=torch.float64, device=self.params[0].device)
        self._average([total])
        return round(float(total) * self._world_size)

    @contextmanager
    def at(self, points: Sequence[Tensor]) -> Iterator[Closure]:
        """Inside, every question is answered at ``points``; on the way out the parameters are back, bit for bit.

        Args:
            points: One tensor a parameter, in its shape.
        """
        with torch.no_grad():
            origin = [p.detach().clone() for p in self.params]
            torch._foreach_copy_(self.params, list(points))
        try:
            yield self
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.params, origin)

    @contextmanager
    def turn(self, player: str) -> Iterator[Closure]:
        """Inside, one player of a game moves: parameters, loss and gradient are that player's alone.

        Args:
            player: Its name.
        """
        kept = self.params, self._moving
        self.params, self._moving = self._players[player], (player,)
        try:
            yield self
        finally:
            self.params, self._moving = kept

    # How they are answered.

    @property
    def _rank(self) -> int:
        distributed = torch.distributed
        return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0

    @property
    def _world_size(self) -> int:
        distributed = torch.distributed
        return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1

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
        self._average([gradient for gradient in found if gradient is not None])
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
        if loss.requires_grad:
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


def _as_scalars(objectives: Any) -> list[Tensor]:
    if isinstance(objectives, Mapping):
        return list(objectives.values())
    if isinstance(objectives, Tensor):
        return list(objectives.unbind())
    return list(objectives)
