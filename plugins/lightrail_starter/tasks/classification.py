"""Classification: one label a sample."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightrail.errors import ConfigurationError
from lightrail.options import between
from lightrail_starter.tasks.losses import LossFn, loss_named, losses_of_samples, refuse_sampling
from lightrail_starter.tasks.metrics import means
from lightrail_starter.tasks.stablemax import stablemax, stablemax_cross_entropy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Classification"]

Batch = tuple[Tensor, Tensor]

PICTURED = 36


def _focal(logits: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """−(1 − p)² log p for the probability p of the right class."""
    log_p = F.log_softmax(logits, dim=-1).gather(-1, target[:, None])[:, 0]
    losses = -((1 - log_p.exp()).square() * log_p)
    return losses.mean() if reduction == "mean" else losses


LOSSES: dict[str, LossFn] = {
    "cross_entropy": F.cross_entropy,
    "focal": _focal,
    "multi_margin": F.multi_margin_loss,
    "stablemax": stablemax_cross_entropy,
}

LIKELIHOODS = ("cross_entropy", "stablemax")


class Classification(LightningModule):
    """Learns which of several classes each sample belongs to.

    Args:
        model: Maps inputs to logits ``[B, C]``.
        loss: ``cross_entropy``, ``focal``, ``multi_margin``, ``stablemax`` (the cross entropy of probabilities that
            grow with the logits, not with their exponentials; worked out in double precision), or the dotted path of a
            function(logits, target) that returns the mean over the batch.
        label_smoothing: Probability mass that is spread over all classes, in [0, 1); for ``cross_entropy`` only.

    Example:
        >>> task = Classification(nn.Linear(4, 3))
        >>> sorted(task.training_step((torch.zeros(2, 4), torch.tensor([0, 2])), 0))
        ['accuracy', 'loss']
    """

    monitor = ("val_accuracy", "max")

    def __init__(self, model: nn.Module, loss: str = "cross_entropy", label_smoothing: float = 0.0) -> None:
        super().__init__()
        between(0, 1, label_smoothing=label_smoothing)
        if label_smoothing and loss != "cross_entropy":
            raise ConfigurationError(
                "label_smoothing belongs to the cross entropy",
                found=f"loss={loss}, label_smoothing={label_smoothing}",
                allowed="label_smoothing=0, or loss=cross_entropy",
                remedy="Set one of the two.",
            )
        self.model = model
        self.loss_name = loss
        self.loss_fn = loss_named(loss, LOSSES)
        if label_smoothing:
            self.loss_fn = partial(F.cross_entropy, label_smoothing=label_smoothing)
        self.metrics = means("loss", "accuracy")
        self._tested: list[tuple[Tensor, Tensor]] = []
        self._pictured: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, C]``."""
        return self.model(x)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The loss, and the share of samples that are classified rightly."""
        inputs, target = batch
        logits = self.model(inputs)
        accuracy = logits.argmax(1).eq(target).mean(dtype=torch.float32)
        return {"loss": self.loss_fn(logits, target), "accuracy": accuracy}

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Probabilities ``[B, C]`` and labels ``[B]``."""
        return self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Probabilities ``[B, C]`` and labels ``[B]``."""
        found = self._evaluate(batch, "test")
        probabilities = found["prediction"].float().cpu()
        if batch[0].dim() == 4 and len(self._tested) * len(batch[1]) < 8 * PICTURED:
            self._pictured.append(batch[0].detach().float().cpu())
        self._tested.append((probabilities, batch[1].cpu()))
        return found

    def on_test_epoch_start(self) -> None:
        self._tested, self._pictured = [], []

    def _evaluate(self, batch: Batch, stage: str) -> dict[str, Tensor]:
        inputs, target = batch
        logits = self.model(inputs)
        values = {"loss": self.loss_fn(logits, target), "accuracy": logits.argmax(1).eq(target).float().mean()}
        for name, value in values.items():
            metric: Any = self.metrics[f"{stage}_{name}"]
            metric.update(value, weight=len(target))
            self.log(f"{stage}_{name}", metric, on_step=False, on_epoch=True, prog_bar=stage == "val")
        return {"prediction": self._probabilities(logits), "target": target}

    def _probabilities(self, logits: Tensor) -> Tensor:
        """Those that the loss knows, ``[B, C]``: of the softmax, except under ``stablemax``."""
        return stablemax(logits).float() if self.loss_name == "stablemax" else logits.softmax(-1)

    def sampled_loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """The mean cross entropy with labels drawn from the model's own probabilities.

        Its gradient ĝ estimates curvature: E[ĝ ⊙ ĝ] · B is the diagonal of the Gauss-Newton matrix of the mean cross
        entropy of a batch of B. Label smoothing leaves that matrix as it is. Under ``stablemax``, where labels are
        drawn from those probabilities, it is the Gauss-Newton matrix with log s(z) for outputs, the Fisher matrix.

        Args:
            batch: As in training; its labels are not used.
            generator: Where the labels are drawn from.

        Raises:
            ClosureError: The loss of this task is not the negative logarithm of a likelihood.
        """
        if self.loss_name not in LIKELIHOODS:
            refuse_sampling(self.loss_name, " or ".join(LIKELIHOODS))
        logits = self.model(batch[0])
        with torch.no_grad():
            labels = torch.multinomial(self._probabilities(logits), 1, generator=generator)[:, 0]
        return LOSSES[self.loss_name](logits, labels)

    def outputs(self, batch: Batch) -> Tensor:
        """Logits ``[B, C]``: what the loss looks at."""
        return self.model(batch[0])

    def output_loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The mean loss of these logits."""
        return self.loss_fn(outputs, batch[1])

    def sample_losses(self, batch: Batch) -> Tensor:
        """The loss of each sample, ``[B]``."""
        return losses_of_samples(self.loss_fn, self.outputs(batch), batch[1])

    def clusters(self, batch: Batch) -> Tensor:
        """The class of each sample ``[B]``: what methods that keep one average a cluster take for its cluster."""
        return batch[1]

    def figures(self) -> dict[str, Figure]:
        """The confusion matrix of the last test, and pictures with their predictions where the inputs are images.

        Under several processes, they show the samples of the first.
        """
        from lightrail_starter.figures.classification import confusion_matrix, prediction_grid

        if not self._tested:
            return {}
        probabilities, target = (torch.cat(parts) for parts in zip(*self._tested, strict=True))
        classes = probabilities.shape[1]
        names = self._class_names()
        names = list(names) if names is not None and len(names) == classes else [str(i) for i in range(classes)]
        drawn = {"confusion_matrix": confusion_matrix(probabilities.argmax(1), target, names)}
        if self._pictured and self._pictured[0].shape[1] in (1, 3):
            images = torch.cat(self._pictured)
            shown = len(images)
            drawn["predictions"] = prediction_grid(images, probabilities[:shown], target[:shown], names, PICTURED)
        return drawn

    def _class_names(self) -> Any:
        datamodule = getattr(self._trainer, "datamodule", None)
        return getattr(datamodule, "class_names", None)
