"""Loading what a run trained: its task with the weights that are to be used, and its data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightrail.errors import CheckpointError

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule

__all__ = ["TrainedRun", "load_trained"]


@dataclass(frozen=True)
class TrainedRun:
    """A run that was trained.

    Args:
        task: With its weights, in evaluation mode, on the CPU.
        data: What it was trained on; ``None`` where the task has its own loaders.
        folder: The run folder; ``None`` for a checkpoint that was moved out of one.
        checkpoint: Whose weights they are.
        lock: What the run was made of.
    """

    task: LightningModule
    data: LightningDataModule | None
    folder: Path | None
    checkpoint: Path
    lock: dict[str, Any]


def load_trained(run: str, root: str | Path = "runs", config_dirs: Sequence[str | Path] = ()) -> TrainedRun:
    """Loads a run's best weights, else its last; those of an average where the run evaluates one.

    Args:
        run: A run folder, a checkpoint, or ``latest`` for the newest run under ``root``.
        root: Where runs are.
        config_dirs: The user's own folders of configuration, where the run had some.

    Raises:
        CheckpointError: There is no such run, or nothing in it can be loaded.
    """
    import torch

    from lightrail.configuration import compose
    from lightrail.run.build import build
    from lightrail.run.checkpoint import load_checkpoint
    from lightrail.run.resume import Resumed, find_resumed

    found = find_resumed([f"run.resume={run}", f"run.root={root}"])
    assert isinstance(found, Resumed)
    checkpoint = found.checkpoint
    is_folder = run == "latest" or Path(run).is_dir()
    if is_folder and found.folder is not None and found.folder.best.is_file():
        checkpoint = found.folder.best
    state = load_checkpoint(checkpoint)["state_dict"]
    # What was drawn for these weights is replaced; the caller's random numbers are left alone.
    with torch.random.fork_rng(devices=[]):
        built = build(compose(found.overrides([]), config_dirs=[str(each) for each in config_dirs]))
    try:
        built.task.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights of {checkpoint} do not fit the model of the run",
            found=str(error).strip().splitlines()[-1].strip(),
            allowed="the model that the run was made with",
            remedy="Install the versions that lock.json names, or name another checkpoint.",
        ) from error
    folder = None if found.folder is None else found.folder.path
    return TrainedRun(built.task.eval(), built.data, folder, checkpoint, found.lock)
