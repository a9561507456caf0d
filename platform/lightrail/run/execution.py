"""Executing a run: the folder, the trainer with our loops, fit, test, report."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import OmegaConf

from lightrail.configuration import Composition, fingerprint
from lightrail.errors import CompositionError, Interrupted, UserError
from lightrail.run.added_metrics import AddedMetrics
from lightrail.run.assembly import attach_optimizer, attach_step
from lightrail.run.checkpoint import AtomicCheckpointIO, load_checkpoint
from lightrail.run.folder import FOLDER_VARIABLE, RunFolder, folder_from_environment
from lightrail.run.interruption import Interruption, StoppedAtOnce
from lightrail.run.lock import check_lock, lock_of
from lightrail.run.observation import Observation, checkpoint_path
from lightrail.run.processes import is_first_rank, started_processes
from lightrail.run.ranks import Ranks
from lightrail.run.rendezvous import cluster_environment
from lightrail.run.run import Result, Run
from lightrail.run.sharded_state import load_weights
from lightrail.run.sharding import strategy_for
from lightrail.run.sharding_checks import is_sharding
from lightrail.run.worker_signals import shield_workers

if TYPE_CHECKING:
    from lightrail.sweep.pruning import Pruning

__all__ = ["execute", "new_folder"]

# Keys of the trainer group that Lightning's Trainer knows by another name or not at all.
_RENAMED = {"accumulate": "accumulate_grad_batches"}
_OWN = ("checkpoint_every", "max_samples", "strategy", "shard", "distributed_checkpoint")
# What a run reports whose work is done; the others have failed or were stopped by a signal.
_ENDED_WELL = ("finished", "stopped early")


def execute(run: Run, *, show_progress: bool) -> Result:
    """See :meth:`lightrail.Run.execute`."""
    began = time.monotonic()
    lock = lock_of(run.composition)
    notes = list(run.notes)
    if run.resumed is not None:
        accept = bool(run.composition.config.run.accept_changes)
        notes += check_lock(run.resumed.lock, lock, accept_changes=accept)
        # Before anything of the run that it continues is touched.
        load_checkpoint(run.resumed.checkpoint, with_shards=False)
    with _folder_for_children():
        return _execute_in(run, _open_folder(run, lock), lock, notes, began, show_progress)


def _execute_in(
    run: Run, folder: RunFolder, lock: Mapping[str, Any], notes: list[str], began: float, show_progress: bool
) -> Result:
    interruption = Interruption()
    observation = Observation(
        folder,
        lock,
        interruption,
        every=run.trainer.get("checkpoint_every"),
        skips_non_finite=run.composition.config.run.on_nan == "skip",
        shows_progress=show_progress,
    )
    with _quiet_lightning():
        pruning = _pruning(run, folder)
        trainer = _make_trainer(run, folder, observation, pruning)
        note = observation.note = _noting(trainer, notes)
        attach_optimizer(run, trainer, observation.speakers, note)
        if pruning is not None:
            pruning.note = note
        for logger in trainer.loggers:
            logger.log_hyperparams(OmegaConf.to_container(run.composition.config, resolve=True))  # type: ignore[arg-type]
        ranks = _ranks(run, trainer, observation)
        record = _Record(run, trainer, observation, began, notes)
        try:
            with interruption.listening(), ranks.together():
                _fit(run, trainer, observation)
                if not _is_pruned(pruning):
                    _test(run, trainer, observation)
        except BaseException as error:
            record.write("stopped" if isinstance(error, Interrupted | StoppedAtOnce) else "failed")
            raise
        record.write("stopped early" if _is_pruned(pruning) else "finished")
        for logger in trainer.loggers:
            if callable(close := getattr(logger, "close", None)):
                close()
    return record.result()


@contextlib.contextmanager
def _folder_for_children() -> Iterator[None]:
    """The variable in which other ranks find the folder is this run's alone."""
    kept = os.environ.get(FOLDER_VARIABLE)
    try:
        yield
    finally:
        os.environ.pop(FOLDER_VARIABLE, None)
        if kept is not None:
            os.environ[FOLDER_VARIABLE] = kept


def _open_folder(run: Run, lock: Mapping[str, Any]) -> RunFolder:
    config = run.composition.config
    if run.order is not None:
        return RunFolder(run.order.folder)
    inherited = folder_from_environment()
    if inherited is not None:
        return inherited
    if run.resumed is not None and run.resumed.folder is not None:
        folder = run.resumed.folder
    elif not is_first_rank():
        # Another program started this rank; the first one says at set-up where the folder is.
        return RunFolder(Path(config.run.root))
    else:
        folder = new_folder(run.composition)
    if is_first_rank():
        os.environ[FOLDER_VARIABLE] = str(folder.path)
        folder.write_text(folder.config, OmegaConf.to_yaml(config, resolve=True))
        folder.write_json(folder.lock, lock)
    return folder


def new_folder(composition: Composition) -> RunFolder:
    """Makes the folder of a run that begins.

    Raises:
        RunFolderError: It cannot be made, or its name is taken.
    """
    title = "_".join(
        each.name.rpartition(".")[2].replace(":", "-")
        for kind in ("data", "model", "optimizer")
        for each in composition.chosen
        if each.kind == kind
    )
    return RunFolder.create(Path(composition.config.run.root), composition.config.run.name, title)


def _pruning(run: Run, folder: RunFolder) -> Pruning | None:
    """A trial of a sweep asks that sweep whether it is still worth its time."""
    if run.order is None:
        return None
    from lightrail.sweep.pruning import pruning_of

    return pruning_of(folder.path)


def _is_pruned(pruning: Pruning | None) -> bool:
    return pruning is not None and pruning.has_stopped


def _make_trainer(run: Run, folder: RunFolder, observation: Observation, pruning: Pruning | None = None) -> Trainer:
    arguments = {_RENAMED.get(key, key): value for key, value in run.trainer.items() if key not in _OWN}
    callbacks: list[Callback] = [observation] if pruning is None else [pruning, observation]
    if run.metrics:
        callbacks.insert(0, AddedMetrics(run.metrics))
    with _as_user_errors():
        trainer = Trainer(
            logger=[make(str(folder.path)) for make in run.loggers],
            callbacks=[*run.callbacks, *callbacks],
            plugins=[AtomicCheckpointIO(), cluster_environment(started_processes(), _rank_timeout(run))],
            default_root_dir=str(folder.path),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            strategy=strategy_for(run.trainer),
            **arguments,
        )
    # One owner of the signals.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    shield_workers(trainer)
    loop = attach_step(run, trainer)
    observation.attach(trainer, loop, run.privacy)
    return trainer


def _rank_timeout(run: Run) -> float:
    return float(run.composition.config.run.rank_timeout)


def _ranks(run: Run, trainer: Trainer, observation: Observation) -> Ranks:
    """The ranks of a run, which agree before they begin."""

    def advice() -> tuple[str, str]:
        folder = observation.folder
        return str(folder.last) if folder.last.exists() else "none yet", str(folder.path)

    error_file = None if run.order is None else run.order.workspace / "error.txt"
    ranks = Ranks(trainer, _rank_timeout(run), lambda: observation.steps, advice, error_file)
    if trainer.world_size > 1:
        observation.on_setup = lambda: _agree(run, trainer, observation, ranks)
    return ranks


def _noting(trainer: Trainer, notes: list[str]) -> Callable[[str], None]:
    """Decisions that fall while the run is put together stand in its notes, and are said at once."""

    def note(text: str) -> None:
        notes.append(text)
        if trainer.is_global_zero:
            print(f"note: {text}", file=sys.stderr)

    return note


def _fit(run: Run, trainer: Trainer, observation: Observation) -> None:
    checkpoint = run.resumed.checkpoint if run.resumed is not None else None
    with _as_user_errors():
        trainer.fit(run.task, datamodule=run.data, ckpt_path=None if checkpoint is None else str(checkpoint))


def _test(run: Run, trainer: Trainer, observation: Observation) -> None:
    """Tests the weights that the best checkpoint holds."""
    has_loader = is_overridden("test_dataloader", run.data if run.data is not None else run.task)
    if not has_loader or not is_overridden("test_step", run.task):
        return
    path = checkpoint_path(observation.folder)
    if path is not None:
        # Else the weights, which are already those to be evaluated, would be taken for those of the training point.
        observation.move_to_evaluation_point(trainer)
        load_weights(run.task, load_checkpoint(path)["state_dict"])
    trainer.test(run.task, datamodule=run.data, verbose=False)


def _agree(run: Run, trainer: Trainer, observation: Observation, ranks: Ranks) -> None:
    """Every rank learns the first one's folder and proves that it composed the same configuration."""
    path = trainer.strategy.broadcast(str(observation.folder.path))
    observation.folder = RunFolder(Path(path))
    ranks.begin(path)
    found: list[Any] = [None] * trainer.world_size
    digest = None if run.order is None else run.order.digest
    torch.distributed.all_gather_object(found, (fingerprint(run.composition.config), digest))
    if len(set(found)) > 1:
        odd = [rank for rank, each in enumerate(found) if each != found[0]]
        raise CompositionError(
            "the ranks composed different configurations",
            found=f"ranks {odd} differ from rank 0",
            allowed="one configuration on all ranks",
            remedy="Remove what differs between processes: times, random or environment resolvers, local files.",
        )
    ranks.watch()


class _Record:
    """What is written about a run when it ends, however it ends."""

    def __init__(self, run: Run, trainer: Trainer, observation: Observation, began: float, notes: list[str]) -> None:
        self._run = run
        self._trainer = trainer
        self._observation = observation
        self._began = began
        self._notes = notes
        self._summary: dict[str, Any] = {}

    def write(self, status: str) -> None:
        """Writes ``summary.json`` and, where it can be drawn, ``report.html``."""
        if not self._trainer.is_global_zero:
            return
        folder, best = self._observation.folder, self._observation.best
        metrics = {**self._observation.training.last, **self._seen()}
        self._summary = {
            "name": folder.path.name,
            "status": status,
            "metrics": metrics,
            "wall_time": round(time.monotonic() - self._began, 3),
            "steps": self._observation.steps,
            "epochs": self._trainer.current_epoch,
            "parameters": sum(p.numel() for p in self._run.task.parameters()),
            "device": str(self._trainer.strategy.root_device),
            "checkpoint": str(folder.last) if folder.last.is_file() else None,
            "best_checkpoint": str(folder.best) if folder.best.is_file() else None,
            "monitor": None
            if best is None
            else {"name": best["name"], "mode": best["mode"], "best": best["value"], "step": best["step"]},
            "resumed_from": str(self._run.resumed.checkpoint) if self._run.resumed else None,
            "notes": self._notes,
        }
        if self._run.privacy is not None:
            self._summary["privacy"] = self._run.privacy.write(folder.path)
        for each in self._run.callbacks:
            tell: Any = getattr(each, "in_summary", None)
            told: Any = tell(folder.path) if callable(tell) else {}
            self._summary |= told
        # A run that failed has said why; a second error on the way out would hide it.
        with contextlib.suppress(UserError) if status not in _ENDED_WELL else contextlib.nullcontext():
            folder.write_json(folder.summary, self._summary)
            self._write_report(status)

    def _write_report(self, status: str) -> None:
        from lightrail.report import write_report

        drawn: dict[str, Any] = {}
        # A model in shards cannot be evaluated by the first process alone.
        draws = status in _ENDED_WELL and not is_sharding(self._run.trainer)
        for each in (self._run.task, *self._run.callbacks) if draws else ():
            figures: Any = getattr(each, "figures", None)
            made: Any = figures() if callable(figures) else {}
            drawn |= made
        write_report(self._observation.folder.path, figures=drawn)

    def _seen(self) -> dict[str, float]:
        return {**self._observation.evaluated, **_floats(self._trainer.callback_metrics)}

    def result(self) -> Result:
        folder = self._observation.folder
        return Result(
            metrics=self._summary.get("metrics", {}),
            folder=folder.path,
            checkpoint=checkpoint_path(folder),
            last_checkpoint=folder.last if folder.last.is_file() else None,
            summary=self._summary,
        )


def _floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


@contextlib.contextmanager
def _as_user_errors() -> Iterator[None]:
    """What Lightning says against the user's configuration, in four parts."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        yield
    except MisconfigurationException as error:
        raise CompositionError(
            "Lightning refuses this run",
            found=str(error).strip().splitlines()[0],
            allowed="what Lightning's Trainer and the task's hooks agree on",
            remedy="Change the trainer.* option or the hook that it names.",
        ) from error


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Lightning's advice about itself is not about the user's run."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
