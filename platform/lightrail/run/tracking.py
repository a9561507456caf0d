"""Training metrics at almost no cost: references are kept, and turned into numbers every so often.

``self.log`` costs more than a small model's whole step. A task returns its scalars beside the loss instead, and they
are averaged, logged and shown from here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightrail.errors import NonFiniteLoss

__all__ = ["TrainingMetrics", "non_finite_loss"]


def non_finite_loss(step: int, value: float, checkpoint: str) -> NonFiniteLoss:
    """The error that stops a run whose loss is not a number any more."""
    return NonFiniteLoss(
        f"the loss became {value} at step {step}",
        found=f"loss={value} at optimizer step {step}; the last good checkpoint is {checkpoint}",
        allowed="a finite loss",
        remedy="Lower optimizer.lr, add '+transform=[clip_norm]', or pass over such steps with run.on_nan=skip.",
    )


class TrainingMetrics:
    """The scalars that ``training_step`` returned since the last logging step.

    Args:
        checks_each: Whether each loss is checked at once for being finite; where reading a value makes the device
            wait, they are checked together at the logging step.
        accumulate: Micro-batches in a step; Lightning hands on each loss divided by their number.
    """

    def __init__(self, checks_each: bool, accumulate: int = 1) -> None:
        self._checks_each = checks_each
        self._accumulate = accumulate
        self._values: dict[str, list[Tensor]] = {}
        self._first_step = 0
        self.last: dict[str, float] = {}

    def add(self, outputs: Any, step: int) -> float | None:
        """Takes in what ``training_step`` returned.

        Args:
            outputs: A mapping with 0-d tensors, as Lightning hands it on.
            step: The optimizer step that it belongs to, counted from 1.

        Returns:
            The loss, where it is known to be not finite.
        """
        if not isinstance(outputs, Mapping):
            return None
        if self._checks_each:
            loss = outputs.get("loss")
            if loss is not None and not math.isfinite(value := loss.item()):
                return value
        if not self._values:
            self._first_step = step
        for name, value in outputs.items():
            values = self._values.get(name)
            if values is not None:
                values.append(value)
            elif isinstance(value, Tensor) and value.dim() == 0:
                self._values[name] = [value]
        return None

    def first_non_finite(self) -> tuple[int, float] | None:
        """The step and value of the first loss, among those kept, that is not finite."""
        losses = self._values.get("loss")
        if not losses:
            return None
        values = torch.stack(losses)
        bad = (~torch.isfinite(values)).nonzero()
        if len(bad) == 0:
            return None
        return self._first_step + int(bad[0]), float(values[bad[0]])

    def flush(self, trainer: Trainer) -> dict[str, float]:
        """Their means since the last call, averaged over ranks, named ``train_…``."""
        if not self._values:
            return {}
        names = list(self._values)
        means = torch.stack([torch.stack(self._values[name]).double().mean() for name in names])
        self._values = {}
        if trainer.world_size > 1:
            means = trainer.strategy.reduce(means, reduce_op="mean")  # type: ignore[assignment]
        if "loss" in names:
            means[names.index("loss")] *= self._accumulate
        self.last = {f"train_{name}": value for name, value in zip(names, means.tolist(), strict=True)}
        return self.last

    def state_dict(self) -> dict[str, Any]:
        """What is kept and not yet logged."""
        return {
            "values": {name: torch.stack(values).cpu() for name, values in self._values.items()},
            "first_step": self._first_step,
            "last": dict(self.last),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._values = {name: list(values.unbind()) for name, values in state["values"].items()}
        self._first_step = state["first_step"]
        self.last = dict(state["last"])
