"""``train launch=NAME``: the order is written, and handed to whom the user chose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightrail.launch.choice import chosen_launch
from lightrail.launch.job import clear_outcome
from lightrail.launch.joining import joined_order
from lightrail.launch.launch import Launch
from lightrail.launch.order import Order, write_order

if TYPE_CHECKING:
    from lightrail.configuration import Composition
    from lightrail.run.resume import Resumed

__all__ = ["checked_launch", "ordered", "submitted"]


def submitted(composition: Composition, resumed: Resumed | None) -> int | None:
    """Hands a run over to the launch that its configuration chooses.

    Args:
        composition: What was composed.
        resumed: The run that it continues.

    Returns:
        The exit status; ``None`` where the run belongs in this very process.

    Raises:
        UserError: It cannot be carried out there.
    """
    launch = checked_launch(composition)
    if launch is None or launch.in_this_process:
        return None
    return launch.carry_out(ordered(composition, resumed))


def checked_launch(composition: Composition) -> Launch | None:
    """The launch that a composition chooses, asked whether it can carry that out; ``None`` for none.

    Raises:
        UserError: It cannot.
    """
    from omegaconf import OmegaConf

    from lightrail.run.resolve import resolve

    launch = chosen_launch(composition)
    if launch is not None and not launch.in_this_process:
        resolve(composition, is_here=False)
        trainer: Any = OmegaConf.to_container(composition.config.trainer, resolve=True)
        launch.check(trainer)
    return launch


def ordered(composition: Composition, resumed: Resumed | None = None) -> Order:
    """Writes the order of a run into its folder: a new one, or that of the run which it continues.

    Args:
        composition: What was composed.
        resumed: The run that it continues.

    Raises:
        UserError: The folder cannot be made, or the run was made of other plugins.
    """
    from lightrail.run.execution import new_folder
    from lightrail.run.lock import check_lock, lock_of

    if resumed is None:
        return joined_order(composition) or write_order(composition, new_folder(composition).path)
    check_lock(resumed.lock, lock_of(composition), accept_changes=bool(composition.config.run.accept_changes))
    folder: Path = new_folder(composition).path if resumed.folder is None else resumed.folder.path
    (folder / "launch").mkdir(exist_ok=True)
    clear_outcome(folder)
    return write_order(composition, folder, resumed.checkpoint)
