"""The job's side of a sweep: a trial asks after each validation whether it is still worth its time."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightrail.sweep.method import Goal, SweepMethod, space_from

__all__ = ["Pruning", "pruning_of"]


class Pruning(Callback):
    """Ends a run of a sweep early, and well, once the sweep's method calls it hopeless.

    The first rank asks and all of them stop at the same batch: what is there is saved and reported.

    Args:
        method: Of the sweep.
        number: The trial, from 0.
        note: Is told what was decided.
    """

    def __init__(self, method: SweepMethod, number: int, note: Callable[[str], None] = print) -> None:
        self.method = method
        self.number = number
        self.note = note
        self.validations = 0
        self.has_stopped = False
        self._is_silent = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Asks, and stops the trainer where there is no hope."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self.validations += 1
        value = trainer.callback_metrics.get(self.method.goal.metric)
        mine = trainer.is_global_zero and value is not None and self._asked(float(value))
        if trainer.strategy.broadcast(mine):
            self.has_stopped = trainer.should_stop = True
            self.note(
                f"stopped early after validation {self.validations}, at step {trainer.global_step}: the sweep has seen "
                f"better at that point than {self.method.goal.metric} {float(value or 0.0):.4g}"
            )

    def _asked(self, value: float) -> bool:
        try:
            return bool(self.method.is_hopeless(self.number, self.validations, value))
        except Exception as error:
            # What a sweep cannot say must not cost a run.
            if not self._is_silent:
                print(f"note: the sweep cannot be asked whether to go on: {error}", file=sys.stderr, flush=True)
            self._is_silent = True
            return False

    def state_dict(self) -> dict[str, Any]:
        """How many validations there were: a run that goes on counts on."""
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the count."""
        self.validations = state_dict["validations"]


def pruning_of(folder: Path) -> Pruning | None:
    """The callback for a run; ``None`` where it is no trial of a sweep with a method that can give trials up.

    Args:
        folder: The run folder; that of a trial is ``jobs/NAME`` in the sweep's, and holds ``trial.json``.

    Raises:
        UserError: The method of the sweep is not installed here, or lacks its extra.
    """
    try:
        number = json.loads((folder / "trial.json").read_bytes())["number"]
        sweep = folder.resolve().parent.parent
        content = json.loads((sweep / "sweep.json").read_bytes())
    except FileNotFoundError:
        return None
    if content.get("method") is None:
        return None
    method = _method_of(sweep, content)
    overrides = type(method).is_hopeless is not SweepMethod.is_hopeless
    return Pruning(method, number) if overrides else None


def _method_of(sweep: Path, content: dict[str, Any]) -> SweepMethod:
    from lightrail.catalogue.plugin import find
    from lightrail.catalogue.target import import_target

    said = content["method"]
    if said["name"] != said["target"]:
        find("sweep", said["name"]).check_extras()
    made = import_target(said["target"])
    return made(**{**said["options"], "space": space_from(content["space"]), "folder": sweep, "goal": _goal(content)})


def _goal(content: dict[str, Any]) -> Goal:
    return Goal(**content["goal"])
