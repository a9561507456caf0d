"""The private step: what every other part of a run gets to see of a batch is one noisy gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loops.optimization.automatic import Closure as LightningClosure
from lightning.pytorch.strategies.parallel import ParallelStrategy
from torch import Tensor

from lightrail.errors import ClosureError, CompositionError
from lightrail.privacy.refusals import buffers_of, check_buffers
from lightrail.sample_gradients import Recording, SampleGradients, gradients_one_by_one, learn, refuse_unseen
from lightrail.sample_gradients.paths import Path
from lightrail.step.batches import leading_size
from lightrail.step.closure import QUESTIONS
from lightrail.step.randomness import RandomState
from lightrail.step.running_statistics import Statistics
from lightrail.step.sharded import are_sharded, gradients_left_alone, whole_parameters
from lightrail.step.window import WindowClosure, silenced

if TYPE_CHECKING:
    from lightrail.privacy.engine import PrivacyEngine

__all__ = ["PrivateWindow"]

_PROVED_AGAIN = (1, 2, 4, 8)  # steps


class PrivateWindow(WindowClosure):
    """The accumulation window of one private step, as a closure that answers once: with the private gradient.

    Args:
        trainer: The trainer whose loop owns the window.
        params: The parameters that are being optimized.
        statistics: The module's buffers and metrics.
        engine: Of this run.
    """

    path: Path | None = None

    def __init__(self, trainer: Trainer, params: list[Tensor], statistics: Statistics, engine: PrivacyEngine) -> None:
        super().__init__(trainer, params, statistics)
        self._engine = engine
        self._windows: Any = trainer.fit_loop.windows  # type: ignore[attr-defined]
        self._updated = [p for p in params if p.requires_grad]
        # What operations see: the same, except where ranks hold parts of them.
        self._is_sharded = are_sharded(self._updated)
        if engine.whole is None:
            engine.whole = whole_parameters(self._module, self._updated)
        self._trained = engine.whole
        self._elsewhere = engine.method.elsewhere(self._trained)
        self._sums: list[Tensor] | None = None

    def add(self, kwargs: Mapping[str, Any], closure: LightningClosure) -> None:
        # One micro-batch at a time: a method that looks twice does so before the next is drawn.
        states: list[RandomState | None] = [RandomState.capture()]
        self._batches, self._states = [tuple(kwargs.values())], states
        self._first_closure = closure

    def run_micro_batch(self) -> None:
        batch = self._batches[0]
        size = leading_size(batch[0])
        if size is None:
            raise _without_samples(batch[0])
        if not size and not self._is_sharded:
            return
        method = self._engine.method
        is_one_pass = method.engine == "one_pass"
        alone = gradients_left_alone(self._module) if self._is_sharded else nullcontext()
        with torch.compiler.set_stance("force_eager"), self._without_wrapper(), alone:
            if not size:
                self._keep_step_with_others(batch)
                return
            if is_one_pass and (self._engine.path is None or self._is_due()):
                self._learn(batch)
            here = self._first_in_one_pass(batch) if is_one_pass else self._first_one_by_one(batch)
            there = None if self._elsewhere is None else self._at_other_point(batch, self._elsewhere)
        with torch.no_grad():
            found = method.contribution(here, there)
        if math.isnan(self._engine.difference):
            self._engine.path = None  # no sample was finite, so nothing is proved yet
        self._sums = found if self._sums is None else [a + b for a, b in zip(self._sums, found, strict=True)]

    def _is_due(self) -> bool:
        """Whether the proof is made once more: the samples of one step may have been too much alike."""
        return self._engine.step in _PROVED_AGAIN and self._sums is None and not self._is_sharded

    def _run_first(self) -> Tensor:
        self.run_micro_batch()
        with torch.no_grad():
            sums = self._engine.method.nothing(self._trained) if self._sums is None else self._sums
            drawn = self._windows.portion.samples
            self._engine.release(sums, self._trained, self._updated, drawn, self._sum_over_ranks)
        # The loss itself is not private: a method that reads it finds out.
        return torch.full((), torch.nan, device=self._trained[0].device)

    # The gradients of a micro-batch.

    def _scale(self, batch: tuple[Any, ...]) -> float:
        """From what Lightning differentiates, a mean over samples and micro-batches, to the loss of a sample."""
        size = leading_size(batch[0]) if self._engine.method.loss == "mean" else 1
        return (size or 1) * self._trainer.accumulate_grad_batches

    def _first_in_one_pass(self, batch: tuple[Any, ...]) -> SampleGradients:
        """Lightning's own evaluation: hooks, logging, and the one backward pass."""
        assert self._engine.path is not None
        recording = Recording(self._trained, self._engine.path)
        with self._watched(recording):
            self._run_lightning()
        pieces = recording.pieces()
        refuse_unseen(self._trained)
        return SampleGradients(self._trained, pieces, self._scale(batch))

    def _keep_step_with_others(self, batch: tuple[Any, ...]) -> None:
        """Ranks that hold parts of the parameters gather them together: one without samples evaluates another record,
        of which nothing is kept."""
        record = (self._trainer.strategy.batch_to_device(self._windows.stand_in), *batch[1:])
        if self._engine.path is None:
            self._learn(record)
        assert self._engine.path is not None
        with torch.enable_grad(), self._aside():
            with Recording(self._trained, self._engine.path):
                loss = self._evaluate(self._loss_fn, record, 0)
            loss.backward()
        for p in self._trained:
            p.grad = None

    def _first_one_by_one(self, batch: tuple[Any, ...]) -> SampleGradients:
        self._run_lightning()
        return self._one_by_one(batch)

    def _run_lightning(self) -> None:
        strategy = self._trainer.strategy
        blocked = strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()
        quiet = nullcontext() if self._engine.method.public_metrics else silenced(self._module)
        watched = {id(p) for p in self._trained} if self._engine.method.engine == "one_pass" else set()
        with blocked, quiet, _without_gradients(p for p in self._module.parameters() if id(p) not in watched):
            before = None if self._engine.has_begun else buffers_of(self._module)
            super().run_micro_batch()
        if before is not None:
            check_buffers(before, self._module)
            self._engine.has_begun = True

    def _at_other_point(self, batch: tuple[Any, ...], points: Sequence[Tensor]) -> SampleGradients:
        with torch.enable_grad(), _at(self._trained, points), self._aside():
            if self._engine.method.engine == "one_by_one":
                return self._one_by_one(batch)
            assert self._engine.path is not None
            recording = Recording(self._trained, self._engine.path)
            state = self._states[0]
            assert state is not None
            state.restore()
            with recording:
                loss = self._evaluate(self._loss_fn, batch, 0)
            (loss / self._trainer.accumulate_grad_batches).backward()
            pieces = recording.pieces()
            refuse_unseen(self._trained)
            return SampleGradients(self._trained, pieces, self._scale(batch))

    def _one_by_one(self, batch: tuple[Any, ...]) -> SampleGradients:
        state = self._states[0]
        with self._aside():
            if state is not None:
                state.restore()
            return gradients_one_by_one(
                lambda b: self._evaluate(self._loss_fn, (b, *batch[1:]), 0), self._trained, batch[0]
            )

    def _learn(self, batch: tuple[Any, ...]) -> None:
        """Where samples lie, and the proof that they do not mix, on a few of them and in silence."""
        is_mean = self._engine.method.loss == "mean"
        # Steps without samples may lie behind, whose gradients are still there.
        kept = [p.grad for p in self._trained]
        for p in self._trained:
            p.grad = None
        with self._aside():
            self._engine.path, self._engine.difference = learn(
                lambda b: self._evaluate(self._loss_fn, (b, *batch[1:]), 0),
                self._trained,
                batch[0],
                is_mean=is_mean,
                is_half="16" in str(self._trainer.precision),
            )
        for p, gradient in zip(self._trained, kept, strict=True):
            p.grad = gradient

    @contextmanager
    def _watched(self, recording: Recording) -> Iterator[None]:
        """Inside, the task's ``training_step``, and nothing else that Lightning does, is recorded."""
        module = self._module
        kept = module.__dict__.get("training_step")
        original = module.training_step

        def training_step(*args: Any, **kwargs: Any) -> Any:
            with recording:
                return original(*args, **kwargs)

        module.__dict__["training_step"] = training_step
        try:
            yield
        finally:
            if kept is None:
                del module.__dict__["training_step"]
            else:
                module.__dict__["training_step"] = kept

    @contextmanager
    def _without_wrapper(self) -> Iterator[None]:
        """Inside, the strategy evaluates the task itself: DDP's wrapper would exchange gradients and buffers."""
        strategy = self._trainer.strategy
        wrapper = strategy.model
        strategy.model = strategy.lightning_module
        try:
            yield
        finally:
            strategy.model = wrapper

    def _sum_over_ranks(self, tensor: Tensor) -> None:
        if self._trainer.world_size > 1:
            torch.distributed.all_reduce(tensor)

    def _refuse(self, *_args: Any, **_options: Any) -> Any:
        raise ClosureError(
            "a method evaluates the private data again within a step",
            found="a question to the closure beyond its one gradient",
            allowed="methods that evaluate the gradient once a step",
            remedy="Choose an optimizer and transforms without extra evaluations: each would release more than is "
            "accounted for.",
        )

    def __call__(self) -> Tensor:
        if self._has_run:
            self._refuse()
        return super().__call__()

    at = part = turn = _refuse


for _question in QUESTIONS:
    setattr(PrivateWindow, _question, PrivateWindow._refuse)


@contextmanager
def _without_gradients(params: Iterable[Tensor]) -> Iterator[None]:
    """Inside, a gradient of the batch is gone as soon as it is there: no hook and no callback sees it."""

    def forget(p: Tensor) -> None:
        p.grad = None

    handles = [p.register_post_accumulate_grad_hook(forget) for p in params if p.requires_grad]
    try:
        yield
    finally:
        for each in handles:
            each.remove()


def _without_samples(batch: Any) -> CompositionError:
    return CompositionError(
        "the batch does not say how many samples it has",
        found=f"a {type(batch).__name__} without a tensor that is known",
        allowed="tensors, samples along their first axis, in tuples, lists and dictionaries",
        remedy="Return such a batch from the dataset or its collate_fn.",
    )


@contextmanager
def _at(params: Sequence[Tensor], points: Sequence[Tensor]) -> Iterator[None]:
    """Inside, parameters are elsewhere; on the way out they are back, bit for bit."""
    with torch.no_grad():
        origin = [p.detach().clone() for p in params]
        torch._foreach_copy_(list(params), list(points))
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(params), origin)
