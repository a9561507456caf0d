"""Lightning's fit and epoch loops, with one addition: the batch boundary.

At the boundary, before the next batch is fetched, everything that belongs to the past is done (the update, validation,
logging, the counters) and nothing of the future has begun. A run that is saved there and resumed goes on bit for bit;
Lightning's own hooks all lie to one side or the other of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher, _PrefetchDataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader

from lightrail.errors import CompositionError
from lightrail.run.clock import Horizon
from lightrail.run.epoch_rest import loader_of, order_of, rest_of
from lightrail.run.windows import Windows
from lightrail.step.players import Game
from lightrail.step.randomness import RandomState
from lightrail.step.window import WindowClosure, WindowLoop

__all__ = ["EpochLoop", "FitLoop", "install_loops", "progress_of"]


def install_loops(
    trainer: Trainer,
    *,
    window: bool,
    skips_non_finite: bool,
    game: Game | None = None,
    windows: Windows | None = None,
    max_samples: int | None = None,
    make_window: Callable[..., WindowClosure] | None = None,
) -> EpochLoop:
    """Puts our loops in the place of Lightning's.

    Args:
        trainer: A trainer that has not run yet.
        window: Whether a method needs the accumulation window.
        skips_non_finite: Whether a non-finite loss skips its update; asks for the window.
        game: The players, where the task has several; asks for the window.
        windows: Who cuts the data, where steps differ in size; asks for the window.
        max_samples: The horizon in samples, where it is given so.
        make_window: What a window of the step is, where it is more than the plain one.

    Returns:
        The epoch loop, whose ``at_boundary`` is to be set.
    """
    old = trainer.fit_loop
    fit_loop = FitLoop(trainer, min_epochs=old.min_epochs, max_epochs=old.max_epochs)
    epoch_loop = EpochLoop(trainer, min_steps=old.min_steps, max_steps=old.max_steps)
    fit_loop.windows = epoch_loop.windows = windows
    fit_loop.max_samples = max_samples
    if window:
        loop = WindowLoop(trainer, skips_non_finite=skips_non_finite, game=game)
        loop.windows = windows
        loop.make_window = make_window
        epoch_loop.automatic_optimization = loop
    fit_loop.epoch_loop = epoch_loop
    trainer.fit_loop = fit_loop
    return epoch_loop


def progress_of(trainer: Trainer) -> tuple[float, float]:
    """How far a run is and how far it goes: in optimizer steps, or in samples where steps differ in size.

    Args:
        trainer: Any trainer that is fitting.

    Returns:
        What is done, and the whole, which is infinite where nothing says.
    """
    windows = getattr(trainer.fit_loop, "windows", None)
    if windows is None or windows.counts_steps:
        whole = trainer.max_steps if windows is not None else trainer.estimated_stepping_batches
        return trainer.global_step, whole if whole != -1 else math.inf
    return windows.samples, windows.end


class PositionedLoader(CombinedLoader):
    """A loader that remembers the random state in which its current pass began."""

    random_at_start: RandomState | None = None
    # Whether its workers began with the pass, which draws a seed for them, or were there from an earlier one.
    began_workers: bool = True
    # What the next pass is to give in place of everything, and what the current one gives.
    next_rest: dict[str, Any] | None = None
    rest: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        self.random_at_start = RandomState.capture()
        self.began_workers = not any(_lasting_workers(each) for each in self.flattened)
        self.rest, self.next_rest = self.next_rest, None
        if self.rest is None:
            return super().__iter__()
        loaders = self.flattened
        self.flattened = [loader_of(loaders[0], self.rest["indices"])]
        try:
            return super().__iter__()
        finally:
            self.flattened = loaders

    def end_workers(self) -> None:
        """Ends the workers that would last, so that the next pass begins with new ones."""
        for each in self.flattened:
            if (workers := _lasting_workers(each)) is not None:
                workers._shutdown_workers()
                each._iterator = None

    @property
    def order(self) -> dict[str, Any] | None:
        """What tells another number of processes which samples were seen."""
        return order_of(self.flattened[0]) if len(self.flattened) == 1 else None


def _lasting_workers(loader: Any) -> Any:
    """What holds a loader's persistent workers; ``None`` where they have not begun, or end with each pass."""
    return getattr(loader, "_iterator", None) if isinstance(loader, DataLoader) else None


class _WindowFetcher(_PrefetchDataFetcher):
    """Fetches nothing ahead: the size of the next batch may depend on this one, and the windows know which is last."""

    def __init__(self, windows: Windows) -> None:
        super().__init__(prefetch_batches=0)
        self._windows = windows

    def __next__(self) -> Any:
        if self.done:
            raise StopIteration
        batch = super().__next__()
        self.done = self._windows.epoch_is_over
        return batch


class _PositionedSource:
    """Where the training loader comes from, with the loader made a :class:`PositionedLoader`."""

    def __init__(self, source: _DataLoaderSource, trainer: Trainer, windows: Windows | None) -> None:
        self._source = source
        self._trainer = trainer
        self._windows = windows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def dataloader(self) -> PositionedLoader:
        loader: Any = self._source.dataloader()
        if self._windows is not None:
            trainer = self._trainer
            device = trainer.strategy.root_device
            loader = self._windows.take(loader, trainer.global_rank, trainer.world_size, device)
        if isinstance(loader, CombinedLoader):
            return PositionedLoader(loader.iterables, mode=cast(Any, loader._mode))
        return PositionedLoader(loader, "max_size_cycle")


class FitLoop(_FitLoop):
    """Lightning's fit loop, over loaders whose position can be saved, to a horizon that may be given in samples."""

    windows: Windows | None = None
    max_samples: int | None = None

    def setup_data(self) -> None:
        source = self._data_source
        self._data_source = _PositionedSource(source, self.trainer, self.windows)  # type: ignore[assignment]
        before = self._combined_loader
        try:
            super().setup_data()
        finally:
            self._data_source = source
        if self._combined_loader is None or self._combined_loader is before:
            return
        if self.windows is not None:
            self._data_fetcher = _WindowFetcher(self.windows)
            self._data_fetcher.setup(self._combined_loader)
        elif self.max_samples is not None:
            steps = math.ceil(self.max_samples / _batch_size(self.trainer, self._combined_loader))
            self.epoch_loop.max_steps = steps if self.max_steps == -1 else min(steps, self.max_steps)

    @property
    def done(self) -> bool:
        return super().done or (self.windows is not None and self.windows.is_done)

    def batch_size(self) -> int | None:
        """Samples in an optimizer step, over all ranks and micro-batches; ``None`` where the loader does not say."""
        if self.windows is not None:
            return self.windows.base
        return None if self._combined_loader is None else _size_of(self.trainer, self._combined_loader)

    def horizon(self, scales_with_gradient: bool) -> Horizon | None:
        """Where the run ends; ``None`` where nothing says.

        Args:
            scales_with_gradient: Of the optimizer, for a batching.
        """
        trainer = self.trainer
        self.setup_data()
        if self.windows is None:
            steps = trainer.estimated_stepping_batches
            return None if math.isinf(steps) else Horizon(int(steps), self.batch_size())
        epochs = self.max_epochs if self.max_steps == -1 and self.max_epochs not in (None, -1) else None
        extent = self.windows.begin(epochs, scales_with_gradient)
        assert self._data_fetcher is not None
        iter(self._data_fetcher)
        if extent.total_samples is not None:
            return Horizon(max(1, extent.total_samples // extent.batch_size), extent.batch_size)
        return None if self.max_steps == -1 else Horizon(self.max_steps, extent.batch_size)


def _size_of(trainer: Trainer, loader: CombinedLoader) -> int | None:
    first = loader.flattened[0] if loader.flattened else None
    size = getattr(first, "batch_size", None) or getattr(getattr(first, "batch_sampler", None), "batch_size", None)
    return size * trainer.accumulate_grad_batches * trainer.world_size if isinstance(size, int) else None


def _batch_size(trainer: Trainer, loader: CombinedLoader) -> int:
    size = _size_of(trainer, loader)
    if size is None:
        raise CompositionError(
            "the horizon is given in samples, and the training loader does not say how many a batch has",
            found=f"trainer.max_samples, with a {type(loader.flattened[0]).__name__} that has no batch_size",
            allowed="a torch DataLoader with batch_size",
            remedy="Give the horizon as trainer.max_steps or trainer.max_epochs.",
        )
    return size


class EpochLoop(_TrainingEpochLoop):
    """Lightning's epoch loop, with the batch boundary.

    Args:
        trainer: The trainer.
        min_steps: As Lightning has it.
        max_steps: As Lightning has it.
    """

    at_boundary: Callable[[], None] | None = None
    at_horizon: Callable[[], None] | None = None
    windows: Windows | None = None
    _positions: Sequence[dict[str, Any]] = ()
    _note: Callable[[str], None]

    @property
    def window_is_closed(self) -> bool:
        """Whether no gradients of a step that is still to be made are waiting."""
        if self.windows is not None:
            return self.windows.window_is_closed or not self.batch_progress.current.ready
        return self.batch_progress.current.ready % self.trainer.accumulate_grad_batches == 0

    @property
    def _is_training_done(self) -> bool:
        return super()._is_training_done or (self.windows is not None and self.windows.is_done)

    def _accumulated_batches_reached(self) -> bool:
        return super()._accumulated_batches_reached() if self.windows is None else self.windows.window_is_closed

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        resumed = self._resuming_from_checkpoint
        if resumed:
            self._go_to_position(data_fetcher)
        super().on_run_start(data_fetcher)
        if resumed:
            # Everything up to the boundary was done before the checkpoint: Lightning's own notion of a restart, which
            # would skip or repeat a validation, does not apply.
            self.restarting = False
            self.trainer.fit_loop._restarting = False

    def advance(self, data_fetcher: _DataFetcher) -> None:
        if self.at_boundary is not None:
            self.at_boundary()
        super().advance(data_fetcher)

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        super().on_advance_end(data_fetcher)
        # Lightning closes the epoch when the horizon falls in the middle of one; a longer run that resumes from here
        # must find the epoch open.
        if self.at_horizon is not None and self._is_training_done and not self._num_ready_batches_reached():
            self.at_horizon()

    def _broadcast_sigterm_tensor(self) -> None:
        """Ranks agree on signals at the boundary, together with everything else that they must agree on."""

    def position(self, *, epoch_is_open: bool) -> dict[str, Any]:
        """Where this rank is in its data and in its random numbers: what :meth:`set_position` takes.

        Args:
            epoch_is_open: Whether the epoch goes on from here; otherwise the next one is to begin.
        """
        loader: Any = self.trainer.fit_loop._combined_loader
        started = loader.random_at_start if epoch_is_open and isinstance(loader, PositionedLoader) else None
        is_secret = self.windows is not None and self.windows.is_secret
        started = None if is_secret else started
        return {
            "random": None if is_secret else RandomState.capture().state_dict(),
            "random_at_start": None if started is None else started.state_dict(),
            "order": loader.order if started is not None else None,
            "rest": loader.rest if started is not None else None,
            "began_workers": started is not None and loader.began_workers,
            "epoch_is_open": epoch_is_open,
            "windows": None if self.windows is None else self.windows.position(),
        }

    def set_position(
        self, positions: Sequence[dict[str, Any]], note: Callable[[str], None] = lambda _text: None
    ) -> None:
        """Tells the loop where to go on when it starts from a checkpoint.

        Args:
            positions: Of each rank of the run that was saved.
            note: Is told where a different number of ranks goes on otherwise than those would have.
        """
        self._positions = positions
        self._note = note

    def _go_to_position(self, data_fetcher: _DataFetcher) -> None:
        positions, self._positions = self._positions, ()
        if not positions:
            return
        position = positions[self.trainer.global_rank % len(positions)]
        if len(positions) != self.trainer.world_size and position["epoch_is_open"] and position["random"] is not None:
            position = self._shared_anew(positions, position, data_fetcher)
        if not position["epoch_is_open"]:
            # Where steps are limited, Lightning takes an epoch that is over for one under way, and would pass it over.
            self.batch_progress.reset_on_run()
            self.scheduler_progress.reset_on_run()
            self.automatic_optimization.optim_progress.reset_on_run()
        if position["random"] is None:
            assert self.windows is not None
            self.windows.go_to(position["windows"], epoch_is_open=position["epoch_is_open"])
            iter(data_fetcher)
            return
        random = RandomState.from_state_dict(position["random"])
        if self.windows is not None and position["windows"] is not None:
            self.windows.go_to(position["windows"], epoch_is_open=position["epoch_is_open"])
            random.restore()
            iter(data_fetcher)
        elif _is_stateful(data_fetcher.combined_loader):
            random.restore()
        elif position["random_at_start"] is None:
            random.restore()
            iter(data_fetcher)
        else:
            # The order of the samples and the seeds of the workers were drawn when the pass began.
            RandomState.from_state_dict(position["random_at_start"]).restore()
            rest, loader = position.get("rest"), data_fetcher.combined_loader
            assert isinstance(loader, PositionedLoader)
            loader.next_rest = rest
            if position.get("began_workers"):
                # Lightning has begun them to look what there is, and they would not draw their seed again.
                loader.end_workers()
            first = 0 if rest is None else rest["first"]
            iter(data_fetcher)
            data_fetcher.fetched -= first  # Lightning adds all that the epoch has had
            _skip(data_fetcher, self.batch_progress.current.ready - first)
            random.restore()

    def _shared_anew(
        self, positions: Sequence[dict[str, Any]], position: dict[str, Any], data_fetcher: _DataFetcher
    ) -> dict[str, Any]:
        """Where a different number of ranks goes on: with the samples that are left, or the epoch once more."""
        trainer, loader = self.trainer, data_fetcher.combined_loader
        progress: Any = self.batch_progress.current
        told = f"the epoch that {len(positions)} process{'es' if len(positions) > 1 else ''} began goes on in "
        told += f"{trainer.world_size}: "
        rest = None
        if self.windows is None and isinstance(loader, PositionedLoader) and loader.order and data_fetcher.length:
            rest = rest_of(positions, progress.ready, trainer.global_rank, trainer.world_size)
        if rest is None or trainer.num_training_batches != data_fetcher.length:
            self._note(
                f"{told}its loader does not tell what is left, so it begins anew, and some samples are seen twice"
            )
            return {**position, "epoch_is_open": False, "random_at_start": None}
        count = len(loader_of(loader.flattened[0], rest))
        done = max(0, int(trainer.num_training_batches) - count)
        progress.ready = progress.started = progress.processed = progress.completed = done
        self._note(f"{told}the {len(rest) * trainer.world_size} samples that were left are shared anew")
        return {**position, "rest": {"indices": rest, "first": done}}


def _is_stateful(loader: CombinedLoader) -> bool:
    """Whether the user's loaders save their own position, as torchdata's do; Lightning then restores it."""
    return bool(loader.flattened) and all(
        callable(getattr(each, "state_dict", None)) and callable(getattr(each, "load_state_dict", None))
        for each in loader.flattened
    )


def _skip(data_fetcher: _DataFetcher, batches: int) -> None:
    """Passes over batches that were trained on before the checkpoint."""
    if data_fetcher.length is None:
        for _ in range(batches):
            next(data_fetcher)
        return
    iterator = data_fetcher.combined_loader._iterator
    assert iterator is not None
    loaders = data_fetcher.combined_loader.flattened
    if len(loaders) == 1 and isinstance(loaders[0], DataLoader) and loaders[0].num_workers == 0:
        # In-process loading: drawing the indices is enough, the samples need not be read.
        inner: Any = iterator.iterators[0]
        if hasattr(inner, "_next_index"):
            for _ in range(batches):
                inner._next_index()
                inner._num_yielded += 1
            iterator._idx += batches
            return
    for _ in range(batches):
        # The workers' own random state moves with every sample that they read, so they read them.
        next(iterator)
