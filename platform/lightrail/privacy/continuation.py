"""What a run that goes on has spent: all of it, whichever of its checkpoints it goes on from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightrail.privacy.events import Event
from lightrail.privacy.ledger import Ledger

__all__ = ["all_spent"]


def all_spent(checkpoint: Ledger, written: Path | None) -> tuple[list[Event], list[str]]:
    """The releases of a run up to a checkpoint and, where it had gone on from there before, those beyond it.

    Args:
        checkpoint: The ledger in the checkpoint.
        written: The ``privacy.json`` of the run's folder, where there is one.

    Returns:
        The releases, and what the ledger is to say where some lie beyond the checkpoint.
    """
    if written is None or not written.is_file():
        return list(checkpoint.events), []
    latest = Ledger.read(written).events
    beyond = _steps(latest) - _steps(checkpoint.events)
    if beyond <= 0:
        return list(checkpoint.events), []
    remark = f"The run went on from an earlier checkpoint; {beyond:,} releases that it had made since count too."
    return latest, [remark]


def _steps(events: Sequence[Event]) -> int:
    return sum(event.steps for event in events)
