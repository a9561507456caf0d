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
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightrail.errors import ClosureError
from lightrail.step.parts import PartsOfTheBatch
from lightrail.step.sharded import copy_tensors, whole_of

__all__ = ["QUESTIONS", "Closure"]

# Each is answered by whoever holds the window; a closure around another one passes them on.
QUESTIONS = (
    "loss",
    "value_of",
    "gradient_of",
    "hvp",
    "sampled",
    "groups",
    "clusters",
    "jacobian",
    "sample_losses",
    "weighted",
    "sample_jacobian",
    "objectives",
    "outputs",
    "output_loss",
    "batch_sizes",
    "window_size",
    "num_samples",
)


class Closure(PartsOfTheBatch):
    """What a loss function answers about itself at and around the current parameters.

    Args:
        loss_fn: ``loss_fn(batch)``, or ``loss_fn()`` where no batches are given: a scalar, the mean over the batch; or
            a mapping with ``loss`` and other scalars, which :meth:`gradient_of` knows by name.
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
        sample_losses_fn: ``sample_losses_fn(batch)``: the loss of each sample, a 1-d tensor whose mean is the loss.
        outputs_fn: ``outputs_fn(batch)``: what the loss looks at (logits, predictions), samples along the first axis.
        output_loss_fn: ``output_loss_fn(outputs, batch)``: the mean loss of these outputs.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> closure = Closure(lambda: (w ** 2).sum(), [w])
        >>> closure().item(), w.grad.tolist()
        (5.0, [2.0, 4.0])
        >>> with closure.at([torch.zeros(2)]):
        ...     closure.loss().item()
        0.0
        >>> closure.hvp([torch.tensor([1.0, 0.0])])[0].tolist()
        [2.0, 0.0]
    """

    # The questions.

    @torch.enable_grad()
    def __call__(self) -> Tensor:
        """The loss at the current parameters, with its fresh gradient in ``.grad``.

        Returns:
            The mean loss over the window and over ranks: a 0-d tensor without a graph.
        """
        self._count()
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
        self._count()
        with self._aside():
            fn = self._loss_fn
            if self._players:
                of_each = self._of_each_player(self._loss_fn)
                fn = lambda *batch: torch.stack(of_each(*batch)).sum()  # noqa: E731
            losses = [self._replay(fn, batch, index) / self._divisor for index, batch in enumerate(self._batches)]
        return self._mean_over_ranks(losses)

    @torch.no_grad()
    def value_of(self, fn: str | Callable[..., Tensor]) -> Tensor:
        """Another function of the batch at the current parameters, without gradients.

        Args:
            fn: As for :meth:`gradient_of`.

        Returns:
            Its mean over the window and over ranks: a 0-d tensor.
        """
        self._count()
        asked = self._function(fn)
        with self._aside():
            values = [self._replay(asked, batch, index) / self._divisor for index, batch in enumerate(self._batches)]
        return self._mean_over_ranks(values)

    @torch.enable_grad()
    def gradient_of(self, fn: str | Callable[..., Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Another function of the batch and its gradient: a penalty, a constraint, one of several losses.

        Args:
            fn: ``fn(batch)``, a scalar, called once a micro-batch and in their order; or the name of a scalar that the
                loss function returns beside the loss.

        Returns:
            Its mean over the window and over ranks, and one tensor a parameter (zeros where it does not depend on
            it); ``.grad`` stays as it was.

        Raises:
            ClosureError: Nothing has that name, or it cannot be differentiated.
        """
        self._count()
        value, gradients = self._gradient_of(self._function(fn))
        return value, self._filled(gradients)

    def _function(self, fn: str | Callable[..., Tensor]) -> Callable[..., Tensor]:
        if self._players:
            raise ClosureError(
                "a game has no one loss beside which another could stand",
                found=f"players {', '.join(self._players)}",
                allowed="a task with one loss",
                remedy="Choose a transform that asks for the loss alone.",
            )
        if fn == "loss":
            return self._loss_fn
        if isinstance(fn, str):
            return _named(fn, self._returned_fn)
        return lambda *args: fn(*args[:1])  # a task's step may get more than its batch

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
        self._count()
        vectors = [whole_of(v) for v in vectors]
        # The fused attention kernels have no second derivative; the plain one does.
        with self._whole() as seen, self._aside(), sdpa_kernel(SDPBackend.MATH):
            total = [torch.zeros_like(p) for p in seen]
            where = [i for i, p in enumerate(seen) if p.requires_grad]
            params = [seen[i] for i in where]
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
        return self._cut(total)

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
        self._count()
        generator = torch.Generator(self.params[0].device)
        # One draw from the global generator: labels differ from step to step, and an exact resume repeats them.
        generator.manual_seed(int(torch.randint(2**62, (), dtype=torch.int64)) + self._rank)
        _, gradients = self._gradient_of(lambda *batch: sampled_loss_fn(*batch, generator))
        return self._filled(gradients)

    @contextmanager
    def at(self, points: Sequence[Tensor]) -> Iterator[Closure]:
        """Inside, every question is answered at ``points``; on the way out the parameters are back, bit for bit.

        Args:
            points: One tensor a parameter, in its shape.
        """
        with torch.no_grad():
            origin = [p.detach().clone() for p in self.params]
            copy_tensors(self.params, points)
        try:
            yield self
        finally:
            with torch.no_grad():
                copy_tensors(self.params, origin)

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


def _named(name: str, returned_fn: Callable[..., Any]) -> Callable[..., Tensor]:
    """One of the scalars that a loss function returns beside the loss."""

    def value(*args: Any) -> Tensor:
        returned = returned_fn(*args)
        scalars = returned if isinstance(returned, Mapping) else {}
        if not isinstance(scalars.get(name), Tensor):
            raise ClosureError(
                f"the loss function returns nothing named '{name}'",
                found=f"it returns {', '.join(scalars) or 'the loss alone'}",
                allowed="a scalar that training_step returns beside the loss: {'loss': …, '" + name + "': …}",
                remedy=f"Return '{name}' from training_step, or use one of the names above.",
            )
        if torch.is_grad_enabled() and not scalars[name].requires_grad:
            raise ClosureError(
                f"'{name}' does not depend on the parameters in a way that can be differentiated",
                found=f"a tensor without a gradient under '{name}'",
                allowed="a differentiable scalar: no argmax, no detach, no threshold",
                remedy=f"Return a smooth stand-in for '{name}' from training_step.",
            )
        return scalars[name]

    return value
