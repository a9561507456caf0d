"""The step under Lightning: the accumulation window as a closure, for methods that need more than a gradient.

Lightning calls ``optimizer.step(closure)`` with a closure that zeroes gradients only on the first micro-batch, clips on
every call, logs on every call and knows the last micro-batch only. Here the first evaluation of every micro-batch is
Lightning's own, hooks and logging included; every further one replays the whole window in silence.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.optimization.automatic import Closure as LightningClosure
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from lightning.pytorch.strategies.parallel import ParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from lightrail.step.closure import Closure
from lightrail.step.evaluation import loss_in
from lightrail.step.players import Game, TurnsOptimizer
from lightrail.step.randomness import RandomState
from lightrail.step.running_statistics import Statistics
from lightrail.step.sharded import are_sharded, gathered
from lightrail.step.transform import TransformedOptimizer

__all__ = ["WindowClosure", "WindowLoop", "silenced"]

_LOGGING_METHODS = ("log", "log_dict")


class _SkipUpdate(Exception):
    """The loss is not finite, and the run was told to go on without this update."""


class WindowClosure(Closure):
    """One accumulation window of a LightningModule, as a :class:`Closure`.

    Args:
        trainer: The trainer whose loop owns the window.
        params: The parameters that are being optimized.
        statistics: The module's buffers and metrics, found once.
        skips_non_finite: Whether a loss that is NaN or infinite ends the step without an update.
        game: The players, where the task has several.
    """

    def __init__(
        self,
        trainer: Trainer,
        params: list[Tensor],
        statistics: Statistics,
        skips_non_finite: bool = False,
        game: Game | None = None,
    ) -> None:
        module = trainer.lightning_module
        self.params = params
        self._set_players(game.players if game else None, bool(game and game.in_turn))
        self._trainer = trainer
        self._module: LightningModule = module
        self._returned_fn = module.training_step
        self._loss_fn = loss_in(module.training_step) if game is None else _of_player(module)
        self._sampled_loss_fn = self._on_batch("sampled_loss")
        self._objectives_fn = self._on_batch("objectives")
        self._clusters_fn = self._on_batch("clusters")
        self._num_samples_fn = self._on_batch("num_samples")
        self._sample_losses_fn = self._on_batch("sample_losses")
        # These are given what they look at, rather than all that training_step is given.
        self._outputs_fn = getattr(module, "outputs", None)
        self._output_loss_fn = getattr(module, "output_loss", None)
        self._statistics = statistics
        self._open([])
        self._divisor = trainer.accumulate_grad_batches
        self._skips_non_finite = skips_non_finite
        self._first_closure: LightningClosure | None = None
        self._losses: list[Tensor] = []

    def _on_batch(self, name: str) -> Callable[..., Any] | None:
        """The task's optional method, called without the batch index that ``training_step`` may get."""
        method = getattr(self._module, name, None)
        return (lambda *args: method(args[0], *args[len(self._batches[0]) :])) if callable(method) else None

    def add(self, kwargs: Mapping[str, Any], closure: LightningClosure) -> None:
        """Takes in a micro-batch, before Lightning evaluates it."""
        self._batches.append(tuple(kwargs.values()))
        self._states.append(RandomState.capture())
        self._first_closure = closure

    def run_micro_batch(self) -> None:
        """Lightning's own evaluation of the newest micro-batch: hooks, logging, gradient accumulation."""
        assert self._first_closure is not None
        loss = self._first_closure()
        if loss is not None:
            self._losses.append(loss.detach())

    def _run_first(self) -> Tensor:
        if self._players and isinstance(self._trainer.strategy, ParallelStrategy):
            # DDP's reducer expects one backward pass through everything; a game has one a player.
            with self._trainer.strategy.block_backward_sync():
                self.run_micro_batch()
            self._average([p.grad for p in self.params if p.grad is not None])
        else:
            self.run_micro_batch()
        # Lightning divides each loss by the number of micro-batches before it hands it on.
        loss = self._losses[0] if len(self._losses) == 1 else torch.stack(self._losses).sum()
        # Ranks must take the same decision, or the next gradient exchange never ends.
        if self._skips_non_finite and not bool(torch.isfinite(self._mean_over_ranks([loss.clone()]))):
            raise _SkipUpdate
        return loss

    def _evaluate(self, fn: Callable[..., Tensor], batch: tuple[Any, ...], index: int) -> Tensor:
        with self._trainer.precision_plugin.train_step_context():
            return fn(*batch)

    def _average(self, tensors: list[Tensor]) -> None:
        if isinstance(self._trainer.strategy, ParallelStrategy):
            super()._average(tensors)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        with super()._aside(), silenced(self._module):
            yield

    @contextmanager
    def _whole(self) -> Iterator[list[Tensor]]:
        if not are_sharded(self.params):
            yield self.params
            return
        with gathered(self._module, self.params) as seen:
            yield seen

    @property
    def _rank(self) -> int:
        return self._trainer.global_rank


def _of_player(module: Any) -> Callable[..., Tensor]:
    return lambda player, *args: module.player_loss(player, args[0])


@contextmanager
def silenced(module: LightningModule) -> Iterator[None]:
    """``self.log`` does nothing inside: metrics are those of the first evaluation."""
    kept = {name: module.__dict__.get(name) for name in _LOGGING_METHODS}
    for name in _LOGGING_METHODS:
        module.__dict__[name] = _log_nothing
    try:
        yield
    finally:
        for name, method in kept.items():
            if method is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = method


def _log_nothing(*_args: Any, **_kwargs: Any) -> None:
    pass


class WindowLoop(_AutomaticOptimization):
    """Lightning's automatic optimization, with the accumulation window at hand for the method.

    It takes the place of Lightning's own only when a method or transform needs it.

    Args:
        trainer: The trainer.
        skips_non_finite: See :class:`WindowClosure`.
        game: See :class:`WindowClosure`.
    """

    def __init__(self, trainer: Trainer, skips_non_finite: bool = False, game: Game | None = None) -> None:
        super().__init__(trainer)
        self._game = game
        self._skips_non_finite = skips_non_finite
        self._window: WindowClosure | None = None
        self._statistics: Statistics | None = None
        # What a window is, where it is more than the plain one.
        self.make_window: Callable[[Trainer, list[Tensor], Statistics], WindowClosure] | None = None
        # Who says how many micro-batches a step has, where that changes.
        self.windows: Any = None
        self.skipped_updates = 0

    def run(self, optimizer: Optimizer, batch_idx: int, kwargs: OrderedDict[str, Any]) -> dict[str, Any]:
        assert isinstance(optimizer, TransformedOptimizer)
        if self.windows is not None:
            self.trainer.accumulate_grad_batches = self.windows.count
            # Lightning zeroes gradients where this index is a multiple of the number of micro-batches.
            batch_idx = 0 if self._window is None else 1
        closure = self._make_closure(kwargs, optimizer, batch_idx)
        strategy = self.trainer.strategy
        if self._window is None:
            self._statistics = self._statistics or Statistics(self.trainer.lightning_module)
            self._window = self._opened(optimizer.params, self._statistics)
        self._window.add(kwargs, closure)
        if self.trainer.fit_loop._should_accumulate():
            with strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else _nothing():
                self._window.run_micro_batch()
        else:
            self._step(optimizer, batch_idx)
        if closure._result is None:
            return {}  # a micro-batch without samples
        result = closure.consume_result()
        outputs = {} if result.loss is None else result.asdict()
        if self._window is None and isinstance(optimizer.optimizer, TurnsOptimizer):
            outputs.update({f"{name}_loss": loss for name, loss in optimizer.optimizer.losses.items()})
        return outputs

    def _opened(self, params: list[Tensor], statistics: Statistics) -> WindowClosure:
        if self.make_window is not None:
            return self.make_window(self.trainer, params, statistics)
        return WindowClosure(self.trainer, params, statistics, self._skips_non_finite, self._game)

    def _step(self, optimizer: TransformedOptimizer, batch_idx: int) -> None:
        trainer = self.trainer
        assert self._window is not None
        if self.windows is not None and self.windows.before_step is not None:
            self.windows.before_step()
        optimizer.window = self._window
        optimizer.finish = partial(trainer.precision_plugin._after_closure, trainer.lightning_module, optimizer)
        try:
            self._optimizer_step(batch_idx, self._window)
        except _SkipUpdate:
            self.skipped_updates += 1
            optimizer.zero_grad()
            # A step that was skipped is a step nonetheless: schedules and horizons count it.
            self.optim_progress.optimizer.step.increment_completed()
        finally:
            optimizer.window = optimizer.finish = None
            self._window = None
        if self.windows is not None:
            self.windows.close_window()


@contextmanager
def _nothing() -> Iterator[None]:
    yield
