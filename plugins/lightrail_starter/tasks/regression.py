"""Regression: one or several numbers a sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import R2Score

from lightrail_starter.tasks.losses import LossFn, loss_named, losses_of_samples, refuse_sampling
from lightrail_starter.tasks.metrics import means

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Regression"]

Batch = tuple[Tensor, Tensor]

LOSSES: dict[str, LossFn] = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}


class Regression(LightningModule):
    """Learns to predict numbers.

    Losses are those of the targets as the data module yields them; a data module that standardises its targets and has
    a ``target_scale`` and ``original_units`` gets mean absolute errors and figures in the units of its file.

    Args:
        model: Maps inputs to ``[B, out_features]``; a last axis of 1 that the target lacks is dropped.
        loss: ``mse``, ``l1``, ``huber``, or the dotted path of a function(prediction, target) that returns the mean
            over the batch.

    Example:
        >>> task = Regression(nn.Linear(4, 1))
        >>> task.training_step((torch.zeros(2, 4), torch.zeros(2)), 0)["loss"].shape
        torch.Size([])
    """

    monitor = ("val_loss", "min")

    def __init__(self, model: nn.Module, loss: str = "mse") -> None:
        super().__init__()
        self.model = model
        self.loss_name = loss
        self.loss_fn = loss_named(loss, LOSSES)
        self.metrics = means("loss", "mae")
        self.explained = nn.ModuleDict({f"{stage}_r2": R2Score() for stage in ("val", "test")})
        self._tested: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        """Predictions ``[B, out_features]``."""
        return self.model(x)

    def _predict(self, inputs: Tensor, target: Tensor) -> Tensor:
        prediction = self.model(inputs)
        # Without this, [B, 1] against [B] would broadcast to [B, B] and train on nonsense.
        return prediction.squeeze(-1) if prediction.dim() == target.dim() + 1 else prediction

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The loss."""
        inputs, target = batch
        return {"loss": self.loss_fn(self._predict(inputs, target), target)}

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Predictions and targets, in one shape."""
        return self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Predictions and targets, in one shape."""
        found = self._evaluate(batch, "test")
        self._tested.append((found["prediction"].float().cpu(), found["target"].float().cpu()))
        return found

    def on_test_epoch_start(self) -> None:
        self._tested = []

    def _evaluate(self, batch: Batch, stage: str) -> dict[str, Tensor]:
        inputs, target = batch
        prediction = self._predict(inputs, target)
        metrics: Any = {name: self.metrics[f"{stage}_{name}"] for name in ("loss", "mae")}
        explained: Any = self.explained[f"{stage}_r2"]
        metrics["loss"].update(self.loss_fn(prediction, target), weight=len(target))
        metrics["mae"].update((prediction - target).abs() * getattr(self._data, "target_scale", 1.0))
        for name, metric in metrics.items():
            self.log(f"{stage}_{name}", metric, on_step=False, on_epoch=True, prog_bar=stage == "val")
        explained.update(prediction.flatten(), target.flatten())
        return {"prediction": prediction, "target": target}

    def on_validation_epoch_end(self) -> None:
        self._log_explained("val")

    def on_test_epoch_end(self) -> None:
        self._log_explained("test")

    def _log_explained(self, stage: str) -> None:
        metric: Any = self.explained[f"{stage}_r2"]
        # The share of explained variance of fewer than two samples is undefined.
        if metric.update_called and int(metric.total) > 1:
            self.log(f"{stage}_r2", metric.compute())
        metric.reset()

    def outputs(self, batch: Batch) -> Tensor:
        """Predictions, in the shape of the targets: what the loss looks at."""
        return self._predict(*batch)

    def output_loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The mean loss of these predictions."""
        return self.loss_fn(outputs, batch[1])

    def sample_losses(self, batch: Batch) -> Tensor:
        """The loss of each sample, ``[B]``: over several targets, their mean."""
        return losses_of_samples(self.loss_fn, self.outputs(batch), batch[1])

    def sampled_loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """½ ‖f(x) − y‖², averaged over the batch, with y drawn from the Gaussian N(f(x), I).

        That is the negative log-likelihood of unit variance, up to a constant; squares are summed over outputs. Its
        gradient ĝ is such that E[ĝ ⊙ ĝ] · B is the diagonal of JᵀJ averaged over a batch of B: for one output, half of
        the Gauss-Newton matrix of ``mse``, and the Fisher matrix of ``l1`` (a Laplace likelihood of unit scale); for
        ``huber`` it bounds the curvature from above.

        Args:
            batch: As in training; its targets serve for their shape only.
            generator: Where the targets are drawn from.

        Raises:
            ClosureError: The loss of this task is the user's own.
        """
        if self.loss_name not in LOSSES:
            refuse_sampling(self.loss_name, "mse, l1 or huber")
        prediction = self._predict(*batch)
        with torch.no_grad():
            noise = torch.randn(prediction.shape, generator=generator, device=prediction.device, dtype=prediction.dtype)
            target = prediction + noise
        return 0.5 * (prediction - target).square().sum() / len(prediction)

    @property
    def _data(self) -> Any:
        return getattr(self._trainer, "datamodule", None)

    def figures(self) -> dict[str, Figure]:
        """Predictions of the last test against the truth; under several processes, those of the first."""
        from lightrail_starter.figures.regression import predicted_against_true

        if not self._tested:
            return {}
        prediction, target = (torch.cat(parts) for parts in zip(*self._tested, strict=True))
        convert = getattr(self._data, "original_units", lambda values: values)
        name = getattr(self._data, "target", "target")
        return {"predicted_against_true": predicted_against_true(convert(prediction), convert(target), str(name))}
