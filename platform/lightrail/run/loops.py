"""Lightning's fit and epoch loops, with one addition: the batch boundary.

At the boundary, before the next batch is fetched, everything that belongs to the past is done (the update, validation,
logging, the counters) and nothing of the future has begun. A run that is saved there and resumed goes on bit for bit;
Lightning's own hooks all lie to one side or the other of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader

from lightrail.step.players import Game
from lightrail.step.randomness import RandomState
from lightrail.step.window import WindowLoop

__all__ = ["EpochLoop", "FitLoop", "install_loops"]


def install_loops(trainer: Trainer, *, window: bool, skips_non_finite: bool, game: Game | None = None) -> EpochLoop:
    """Puts our loops in the place of Lightning's.

    Args:
        trainer: A trainer that has not run yet.
        window: Whether a method needs the accumulation window.
        skips_non_finite: Whether a non-finite loss skips its update; asks for the window.
        game: The players, where the task has several; asks for the window.

    Returns:
        The epoch loop, whose ``at_boundary`` is to be set.
    """
    old = trainer.fit_loop
    fit_loop = FitLoop(trainer, min_epochs=old.min_epochs, max_epochs=old.max_epochs)
    epoch_loop = EpochLoop(trainer, min_steps=old.min_steps, max_steps=old.max_steps)
    if window:
        epoch_loop.automatic_optimization = WindowLoop(trainer, skips_non_finite=skips_non_finite, game=game)
    fit_loop.epoch_loop = epoch_loop
    trainer.fit_loop = fit_loop
    return epoch_loop


class PositionedLoader(CombinedLoader):
    """A loader that remembers the random state in which its current pass began."""

    random_at_start: RandomState | None = None

    def __iter__(self) -> Iterator[Any]:
        self.random_at_start = RandomState.capture()
        return super().__iter__()


class _PositionedSource:
    """Where the training loader comes from, with the loader made a :class:`PositionedLoader`."""

    def __init__(self, source: _DataLoaderSource) -> None:
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def dataloader(self) -> PositionedLoader:
        loader = self._source.dataloader()
        if isinstance(loader, CombinedLoader):
            return PositionedLoader(loader.iterables, mode=cast(Any, loader._mode))
        return PositionedLoader(loader, "max_size_cycle")


class FitLoop(_FitLoop):
    """Lightning's fit loop, over loaders whose position can be saved."""

    def setup_data(self) -> None:
        source = self._data_source
        self._data_source = _PositionedSource(source)  # type: ignore[assignment]
        try:
            super().setup_data()
        finally:
            self._data_source = source


class EpochLoop(_TrainingEpochLoop):
    """Lightning's epoch loop, with the batch boundary.

    Args:
        trainer: The trainer.
        min_steps: As Lightning has it.
        max_steps: As Lightning has it.
    """

    at_boundary: Callable[[], None] | None = None
    at_horizon: Callable[[], None] | None = None
    _position: dict[str, Any] | None = None

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
        loader = self.trainer.fit_loop._combined_loader
        started = loader.random_at_start if epoch_is_open and isinstance(loader, PositionedLoader) else None
        return {
            "random": RandomState.capture().state_dict(),
            "random_at_start": None if started is None else started.state_dict(),
        }

    def set_position(self, position: dict[str, Any]) -> None:
        """Tells the loop where to go on when it starts from a checkpoint."""
        self._position = position

    def _go_to_position(self, data_fetcher: _DataFetcher) -> None:
        position, self._position = self._position, None
        if position is None:
            return
        random = RandomState.from_state_dict(position["random"])
        if _is_stateful(data_fetcher.combined_loader):
            random.restore()
        elif position["random_at_start"] is None:
            random.restore()
            iter(data_fetcher)
        else:
            # The order of the samples and the seeds of the workers were drawn when the pass began.
            RandomState.from_state_dict(position["random_at_start"]).restore()
            iter(data_fetcher)
            _skip(data_fetcher, self.batch_progress.current.ready)
            random.restore()


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
