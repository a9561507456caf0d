"""Runs that the same command begins on several machines: the first one writes the order, the others join it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from lightrail.errors import CheckpointError, ConfigurationError, RunFolderError
from lightrail.launch.job import outcome_of
from lightrail.launch.order import Order, read_order, write_order

if TYPE_CHECKING:
    from lightrail.configuration import Composition

__all__ = ["joined_order"]

# From the folder, which decides who is first, to the order in it, in seconds.
_PATIENCE = 60.0


def joined_order(composition: Composition) -> Order | None:
    """The order of a run that every machine begins by the same command, found by its name.

    Args:
        composition: What was composed.

    Returns:
        ``None`` where the launch has no ``rendezvous``, so that nobody else begins the run.

    Raises:
        UserError: The run has no name, has ended, or is another one.
    """
    from lightrail.run.execution import new_folder

    launch = composition.config.get("launch") or {}
    if launch.get("rendezvous") is None:
        return None
    if composition.config.run.name is None:
        raise ConfigurationError(
            "several machines find their run by its name, and it has none",
            found=f"launch.rendezvous={launch['rendezvous']}, run.name=null",
            allowed="the same run.name on every machine, on a disk that all of them see",
            remedy="Add run.name=NAME.",
        )
    try:
        return write_order(composition, new_folder(composition).path)
    except RunFolderError as taken:
        folder = (Path(composition.config.run.root) / composition.config.run.name).resolve()
        if outcome_of(folder) is not None or not folder.is_dir():
            raise
        return _order_of_another(composition, folder, taken)


def _order_of_another(composition: Composition, folder: Path, taken: RunFolderError) -> Order:
    from lightrail.configuration import fingerprint

    order = _awaited(folder, taken)
    theirs, ours = fingerprint(order.composition().config), fingerprint(composition.config)
    if theirs != ours:
        raise ConfigurationError(
            f"another machine began the run {folder.name} with another configuration",
            found=f"a run in {folder} of other choices or options than those typed here",
            allowed="the same command on every machine",
            remedy="Type the same command, or choose another run.name for another run.",
        )
    return order


def _awaited(folder: Path, taken: RunFolderError) -> Order:
    end = time.monotonic() + (_PATIENCE if (folder / "launch").is_dir() or not (folder / "config.yaml").exists() else 0)
    while True:
        try:
            return read_order(folder)
        except CheckpointError:
            if time.monotonic() > end:
                raise taken from None
            time.sleep(0.2)
