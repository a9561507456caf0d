"""torchmetrics of the user's choice, beside those that the task logs itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightrail.errors import CompositionError

__all__ = ["AddedMetrics"]


class AddedMetrics(Callback):
    """Updates metrics with the predictions and targets that a task's evaluation steps return.

    Args:
        metrics: torchmetrics by the name under which they are logged.
    """

    def __init__(self, metrics: Mapping[str, Any]) -> None:
        self._metrics = dict(metrics)

    def on_validation_batch_end(self, *args: Any) -> None:
        self._update(*args[:3])

    def on_test_batch_end(self, *args: Any) -> None:
        self._update(*args[:3])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(pl_module, "test")

    def _update(self, trainer: Trainer, pl_module: LightningModule, outputs: Any) -> None:
        if not (isinstance(outputs, Mapping) and "prediction" in outputs and "target" in outputs):
            raise CompositionError(
                f"metric '{next(iter(self._metrics))}' has nothing to measure",
                found=f"the evaluation step of {type(pl_module).__name__} returned {type(outputs).__name__}",
                allowed="a mapping with 'prediction' and 'target'",
                remedy='Return {"prediction": ..., "target": ...} from validation_step and test_step.',
            )
        for name, metric in self._metrics.items():
            self._metrics[name] = metric.to(pl_module.device)
            self._metrics[name].update(outputs["prediction"], outputs["target"])

    def _log(self, module: LightningModule, stage: str) -> None:
        for name, metric in self._metrics.items():
            module.log(f"{stage}_{name}", metric.compute(), sync_dist=False)
            metric.reset()
