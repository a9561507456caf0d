"""A run is an object: what the configuration composed, and what executing it gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.loggers.logger import Logger
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrail.configuration import Composition
from lightrail.launch.order import Order
from lightrail.run.resume import Resumed
from lightrail.step.batching import Batching
from lightrail.step.players import Game
from lightrail.step.transform import Transform
from lightrail.traits import Traits

if TYPE_CHECKING:
    from lightrail.privacy.engine import PrivacyEngine

__all__ = ["Result", "Run"]


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Args:
        metrics: The final metrics by name: ``train_…``, ``val_…``, ``test_…``.
        folder: The run folder.
        checkpoint: The checkpoint to use: the best by the task's monitor, else the last.
        last_checkpoint: Where the run can be continued from.
        summary: What ``summary.json`` holds.
    """

    metrics: Mapping[str, float]
    folder: Path
    checkpoint: Path | None
    last_checkpoint: Path | None
    summary: Mapping[str, Any]


@dataclass
class Run:
    """What the configuration composed. ``execute`` does it; a wrapper takes one and returns one.

    Args:
        composition: The configuration and the plugins that were chosen.
        task: The LightningModule, with its weights drawn.
        data: The data module; ``None`` where the task has its own loaders.
        optimizer: Makes the optimizer of a task; ``None`` where the task configures its own.
        schedule: Makes the schedule from the optimizer, the number of steps and, by name, what a schedule may ask for
            (``folder``, ``batch_size``); ``None`` for none.
        transforms: Between the gradient and the update, in order.
        batching: How much data goes into a step over time; ``None`` for always the same.
        callbacks: Lightning's own.
        metrics: torchmetrics that are added to validation and test, by name.
        loggers: Each makes a logger from the path of the run folder.
        names: The names of the plugins by their class, under which what they log stands.
        method_traits: The traits of the optimizer, the transforms, the schedule and the batching.
        game: The players, where the task has several.
        privacy: What makes every step private; ``None`` where nothing does.
        trainer: The ``trainer`` group of the configuration.
        resumed: The run that this one continues.
        order: The written order that it carries out, in the folder where that stands; ``None`` for what was just typed.
        notes: What was decided for the user, one sentence each.
    """

    composition: Composition
    task: LightningModule
    data: LightningDataModule | None
    optimizer: Callable[[LightningModule], Optimizer] | None
    schedule: Callable[..., LRScheduler] | None
    transforms: Sequence[Transform] = ()
    batching: Batching | None = None
    callbacks: Sequence[Callback] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    loggers: Sequence[Callable[[str], Logger]] = ()
    names: Mapping[Any, str] = field(default_factory=dict)
    method_traits: Sequence[Traits] = ()
    game: Game | None = None
    privacy: PrivacyEngine | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)
    resumed: Resumed | None = None
    order: Order | None = None
    notes: Sequence[str] = ()

    def execute(self, *, show_progress: bool = True) -> Result:
        """Trains, tests and reports.

        Args:
            show_progress: Whether progress is shown on standard error.

        Returns:
            The final metrics and where everything lies.

        Raises:
            UserError: Something the user can mend, from a folder that cannot be written to a loss that is not finite.
            Interrupted: A signal asked for a stop; the state is saved.
        """
        from lightrail.run.execution import execute

        return execute(self, show_progress=show_progress)
