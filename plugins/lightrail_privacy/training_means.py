"""What a task's validation would say of training samples."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from torch.utils.data import DataLoader, Subset
from torchmetrics import Metric

from lightrail.errors import CompositionError
from lightrail.step.randomness import RandomState

__all__ = ["as_many_training_samples", "training_means"]


def as_many_training_samples(trainer: Trainer) -> tuple[int, DataLoader[Any]]:
    """How many samples are held out, and as many of the training, if there are so many, the same in every run."""
    held, train = trainer.val_dataloaders, trainer.train_dataloader
    for name, loader in (("validation", held), ("training", train)):
        if not (isinstance(loader, DataLoader) and _has_length(loader.dataset) and loader.batch_sampler is not None):
            raise CompositionError(
                f"thresholdout cannot measure the {name} data",
                found=type(loader).__name__,
                allowed="one DataLoader over a data set with a length, which makes the batches",
                remedy="Give the data in one such loader, or leave thresholdout out.",
            )
    assert isinstance(held, DataLoader)
    assert isinstance(train, DataLoader)
    size = held.batch_size or 64
    count = int(min(len(held.dataset), sum(trainer.fit_loop.epoch_loop.val_loop.max_batches) * size))  # type: ignore[arg-type]
    own = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(train.dataset), generator=own)[:count].sort().values.tolist()  # type: ignore[arg-type]
    loader = DataLoader(Subset(train.dataset, chosen), size, collate_fn=train.collate_fn, generator=own)
    return count, loader


def _has_length(dataset: Any) -> bool:
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


def training_means(trainer: Trainer, module: LightningModule, loader: DataLoader[Any]) -> dict[str, float]:
    """What ``validation_step`` would log as means over these samples; of the module and of chance nothing is moved."""
    takes_index = "batch_idx" in inspect.signature(module.validation_step).parameters
    found = _Means()
    chance = RandomState.capture()
    with _undone(module), found.listening(module):
        for index, each in enumerate(loader):
            batch = trainer.precision_plugin.convert_input(each)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            found.batch = batch
            trainer.strategy.validation_step(*((batch, index) if takes_index else (batch,)))
        values = found.values()
    chance.restore()
    return values


class _Means:
    """What a module logs, kept apart from what its trainer gathers."""

    def __init__(self) -> None:
        self.batch: Any = None
        self._metrics: dict[str, Metric] = {}
        self._sums: dict[str, tuple[float, int]] = {}

    @contextmanager
    def listening(self, module: LightningModule) -> Iterator[None]:
        kept = vars(module).get("log")
        module.log = self._log  # type: ignore[method-assign]
        try:
            yield
        finally:
            del module.log
            if kept is not None:
                module.log = kept

    def _log(self, name: str, value: Any, *args: Any, batch_size: int | None = None, **options: Any) -> None:
        if isinstance(value, Metric):
            self._metrics[name] = value
        elif options.get("reduce_fx", "mean") in ("mean", torch.mean) and options.get("on_epoch") is not False:
            size = batch_size or extract_batch_size(self.batch)
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + float(value) * size, count + size)

    def values(self) -> dict[str, float]:
        computed = {name: metric.compute() for name, metric in self._metrics.items()}
        scalars = {name: float(value) for name, value in computed.items() if value.numel() == 1}
        return scalars | {name: total / count for name, (total, count) in self._sums.items()}


@contextmanager
def _undone(module: LightningModule) -> Iterator[None]:
    """Puts the module's torchmetrics, and the lists that it gathers in, back to how they stood."""
    metrics = [each for each in module.modules() if isinstance(each, Metric)]
    states = [(each._copy_state_dict(), each._update_count) for each in metrics]
    lists: Sequence[tuple[list[Any], list[Any]]] = [(v, list(v)) for v in vars(module).values() if type(v) is list]
    try:
        yield
    finally:
        for metric, (state, updates) in zip(metrics, states, strict=True):
            for name, value in state.items():
                setattr(metric, name, value)
            metric._update_count, metric._computed = updates, None
        for current, before in lists:
            current[:] = before
