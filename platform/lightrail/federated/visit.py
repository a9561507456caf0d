"""A visit to a client: the run's own training, for a few steps, on the client's samples."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from lightrail.federated.local_model import as_it_was
from lightrail.federated.plain_loop import is_plain, train_plainly
from lightrail.run.assembly import attach_optimizer, attach_step
from lightrail.run.run import Run
from lightrail.run.tracking import TrainingMetrics
from lightrail.step.transform import Transform

__all__ = ["Trained", "Visit", "VisitingTrainer", "fresh"]

# What of the trainer belongs to the run as a whole; the rest holds on every client.
_OF_THE_RUN = (
    "max_epochs", "min_epochs", "max_steps", "min_steps", "max_samples", "max_time", "checkpoint_every", "devices",
    "num_nodes", "strategy", "check_val_every_n_epoch", "val_check_interval", "log_every_n_steps", "limit_val_batches",
    "limit_test_batches", "profiler", "fast_dev_run", "reload_dataloaders_every_n_epochs", "shard",
    "distributed_checkpoint",
)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """What training on a client gave.

    Args:
        steps: Optimizer steps that were made.
        metrics: Means of what the task returned, by name: ``loss`` and others.
        lr: The learning rate of the first group after the last step.
    """

    steps: int
    metrics: Mapping[str, float]
    lr: float | None


class VisitingTrainer:
    """A trainer that says and writes nothing, for all visits: to make one takes longer than a small visit.

    Args:
        run: Of the clients.
    """

    def __init__(self, run: Run) -> None:
        options = {key: value for key, value in run.trainer.items() if key not in _OF_THE_RUN}
        self.trainer = Trainer(
            logger=False,
            devices=1,
            max_epochs=1,
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **{{"accumulate": "accumulate_grad_batches"}.get(key, key): value for key, value in options.items()},
        )
        self.trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        self.is_plain = is_plain(run, self.trainer, options)
        """Whether the plain loop does what the trainer would."""


class Visit:
    """Trains a task for some steps as the run would, and says nothing.

    Args:
        run: As it was composed; with the task of this process and the loader of the client.
        loader: The client's samples.
        epochs: Passes over them.
        steps: Optimizer steps in place of passes.
        trainer: That of all visits.
        place: Which visit this is, and of how many: what is planned for the whole run, as a schedule is, goes on from
            visit to visit.
    """

    def __init__(
        self,
        run: Run,
        loader: DataLoader[Any],
        *,
        epochs: int,
        steps: int | None,
        place: tuple[int, int],
        trainer: VisitingTrainer,
    ) -> None:
        self._run = run
        self._loader = loader
        self._epochs, self._steps = epochs, steps
        self._place = place
        self._trainer = trainer

    def train(self, corrections: Sequence[Transform] = (), change_batch: Callable[[Any], Any] | None = None) -> Trained:
        """Trains.

        Args:
            corrections: What acts on the gradient after the run's own transforms.
            change_batch: What the task sees in the place of each batch.

        Raises:
            NeedsTrainer: The task was trained without one, and asked for it; the visit has to begin again.
        """
        run = dataclasses.replace(
            self._run,
            transforms=[*fresh(self._run.transforms, self._run.task), *corrections],
            batching=copy.deepcopy(self._run.batching),
            schedule=None if self._run.schedule is None else self._part_of_schedule(self._run.schedule),
            callbacks=(),
        )
        if self._trainer.is_plain:
            known = {"folder": self._trainer.trainer.default_root_dir, "batch_size": self._loader.batch_size}
            with as_it_was(run.task, "training_step"):
                if change_batch is not None:
                    _change_batches(run.task, change_batch)
                return Trained(*train_plainly(run, self._loader, self._epochs, self._steps, known))
        trainer, figures = self._trainer.trainer, _Figures()
        trainer.callbacks = [figures]  # type: ignore[attr-defined]
        # Loops of its own: nothing of an earlier visit is left.
        trainer.fit_loop.max_epochs = self._epochs if self._steps is None else -1
        trainer.fit_loop.epoch_loop.max_steps = -1 if self._steps is None else self._steps
        attach_step(run, trainer)
        with as_it_was(run.task, "configure_optimizers", "training_step"):
            attach_optimizer(run, trainer, {}, lambda text: None)
            if change_batch is not None:
                _change_batches(run.task, change_batch)
            trainer.fit(run.task, **_data(run, self._loader))
        optimizer = trainer.optimizers[0] if trainer.optimizers else None
        lr = None if optimizer is None else float(optimizer.param_groups[0]["lr"])
        return Trained(trainer.global_step, figures.means(trainer), lr)

    def _part_of_schedule(self, schedule: Callable[..., LRScheduler]) -> Callable[..., LRScheduler]:
        """The run's schedule, planned for the whole run, from where this visit stands in it."""

        def make(optimizer: Optimizer, steps: int, **known: Any) -> LRScheduler:
            before, visits = self._place
            made = schedule(optimizer, steps * visits, **known)
            _advance(made, steps * before)
            return made

        return make


def _change_batches(task: LightningModule, change: Callable[[Any], Any]) -> None:
    step: Callable[..., Any] = task.training_step
    # functools.wraps would hide from Lightning that this is one.
    task.training_step = lambda batch, *rest: step(change(batch), *rest)  # type: ignore[method-assign]


def _advance(schedule: LRScheduler, steps: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of steps of a schedule without steps of its optimizer
        for _ in range(steps):
            schedule.step()


def fresh(transforms: Sequence[Transform], task: LightningModule) -> list[Transform]:
    """Copies whose state is that before the first step; what they hold of the task stays the task's."""
    if not transforms:
        return []
    kept: list[Any] = [*task.modules(), *task.parameters(), *task.buffers()]
    return copy.deepcopy(list(transforms), {id(each): each for each in kept})


def _data(run: Run, loader: DataLoader[Any]) -> dict[str, Any]:
    """The client's loader, with the hooks of the run's data module around it."""
    if run.data is None:
        return {"train_dataloaders": loader}
    data: LightningDataModule = copy.copy(run.data)
    data.train_dataloader = lambda: loader  # type: ignore[method-assign]
    data.prepare_data = lambda: None  # type: ignore[method-assign]
    data.setup = data.teardown = lambda stage: None  # type: ignore[method-assign,assignment]
    return {"datamodule": data}


class _Figures(Callback):
    """The means of what the task returned or logged."""

    def __init__(self) -> None:
        self._metrics = TrainingMetrics(checks_each=False)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *rest: Any) -> None:
        self._metrics.add(outputs, trainer.global_step)

    def means(self, trainer: Trainer) -> dict[str, float]:
        found = {name.removeprefix("train_"): value for name, value in self._metrics.flush(trainer).items()}
        if "loss" in found:
            found["loss"] *= trainer.accumulate_grad_batches
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        return {**{name.removeprefix("train_"): value for name, value in logged.items()}, **found}
