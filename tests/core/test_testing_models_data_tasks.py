"""The suites of models, data and tasks can fail: each mistake fails its check, and the right ones pass all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from matplotlib import pyplot
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightrail.testing import DataSuite, ModelSuite, Suite, TaskSuite, examine
from lightrail.testing.made_up import MadeUpTable
from lightrail.testing.suite import name_of


def failures(suite: type[Suite], plugin: Any) -> set[str]:
    return {name_of(check) for check in suite.checks if examine(check, plugin).state == "failed"}


class RightModel(nn.Module):
    """One linear layer."""

    def __init__(self, in_features: int, out_features: int | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(in_features, out_features or 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


class LeavesALayerOut(RightModel):
    """Has a layer that it does not use."""

    def __init__(self, in_features: int, out_features: int | None = None) -> None:
        super().__init__(in_features, out_features)
        self.other = nn.Linear(2, 2)


class DropsInEvaluation(RightModel):
    """Drops units whatever its mode."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), training=True)


class MixesSamples(RightModel):
    """Centres over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class HidesItsState(RightModel):
    """Keeps a running mean where no checkpoint sees it."""

    mean: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = x.detach().mean(0)
        return super().forward(x - self.mean)


class CopiesNothing(RightModel):
    """Takes itself for its copy."""

    def __deepcopy__(self, memo: Any) -> CopiesNothing:
        return self


class SumsTheBatch(RightModel):
    """Gives one output for all."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sum(0)


@pytest.mark.parametrize(
    ("plugin", "expected"),
    [
        (RightModel, set()),
        (LeavesALayerOut, {"gradient_reaches_every_parameter"}),
        (DropsInEvaluation, {"is_deterministic_in_evaluation"}),
        (MixesSamples, {"keeps_samples_apart"}),
        (HidesItsState, {"restores_its_state"}),
        (CopiesNothing, {"copies"}),
        (SumsTheBatch, {"gives_one_output_a_sample"}),
    ],
)
def test_models(plugin: Any, expected: set[str]) -> None:
    found = failures(ModelSuite, plugin)
    assert expected <= found
    assert expected or not found


class Unshuffled(MadeUpTable):
    """Trains in order."""

    def train_dataloader(self) -> Any:
        return DataLoader(self._rows(0), batch_size=self.batch_size)


class ShuffledValidation(MadeUpTable):
    """Validates in any order."""

    def val_dataloader(self) -> Any:
        return DataLoader(self._rows(1), batch_size=self.batch_size, shuffle=True)


class AnotherTableEachTime(MadeUpTable):
    """Has other rows in every instance."""

    instances = 0

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__(batch_size)
        type(self).instances += 1
        self.instance = type(self).instances

    def test_dataloader(self) -> Any:
        return DataLoader(self._rows(2 + self.instance), batch_size=self.batch_size)


class TellsAnotherSize(MadeUpTable):
    """Has five features and says six."""

    def dimensions(self) -> dict[str, int]:
        return {**super().dimensions(), "in_features": 6}


class TellsAFloat(MadeUpTable):
    """Says five point nothing."""

    def dimensions(self) -> Any:
        return {**super().dimensions(), "in_features": 5.0}


class IgnoresBatchSize(MadeUpTable):
    """Has batches of two."""

    def train_dataloader(self) -> Any:
        return DataLoader(self._rows(0), batch_size=2, shuffle=True)


class HasNoTest(MadeUpTable):
    """Has nothing to test on."""

    def test_dataloader(self) -> Any:
        return []


@pytest.mark.parametrize(
    ("plugin", "expected"),
    [
        (MadeUpTable, set()),
        (Unshuffled, {"shuffles_training"}),
        (ShuffledValidation, {"keeps_the_order_of_validation"}),
        (AnotherTableEachTime, {"keeps_the_order_of_validation"}),
        (TellsAnotherSize, {"has_the_dimensions_that_it_gives"}),
        (TellsAFloat, {"gives_its_dimensions"}),
        (IgnoresBatchSize, {"honours_batch_size"}),
        (HasNoTest, {"yields_batches"}),
    ],
)
def test_data(plugin: Any, expected: set[str]) -> None:
    found = failures(DataSuite, plugin)
    assert expected <= found
    assert expected or not found


class RightTask(LightningModule):
    """Cross-entropy, with everything that a task may offer."""

    monitor = ("val_loss", "min")

    def __init__(self, model: nn.Module, smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.smoothing = smoothing

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, label_smoothing=self.smoothing)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.model(batch[0])
        return {"loss": self.loss(logits, batch[1]), "accuracy": (logits.argmax(-1) == batch[1]).float().mean()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(self.model(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(self.model(batch[0]), batch[1]))

    def sampled_loss(self, batch: Any, generator: torch.Generator | None) -> Tensor:
        logits = self.model(batch[0])
        return self.loss(logits, torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1))

    def objectives(self, batch: Any) -> Any:
        return {"first": self.loss(self.model(batch[0]), batch[1]), "size": self.model(batch[0]).square().mean()}

    def figures(self) -> dict[str, Any]:
        return {"nothing": Figure()}


class CutsItsGraph(RightTask):
    """Detaches its loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx)["loss"].detach()}


class ReturnsGraphs(RightTask):
    """Returns the loss twice."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)["loss"]
        return {"loss": loss, "again": 2 * loss}


class LearnsNothing(RightTask):
    """Has a loss that its parameters do not change."""

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return 1 + 0 * super().loss(logits, target)


class IgnoresTheGenerator(RightTask):
    """Draws from the global generator."""

    def sampled_loss(self, batch: Any, generator: torch.Generator | None) -> Tensor:
        return super().sampled_loss(batch, None)


class SamplesNothing(RightTask):
    """Takes the labels that there are."""

    def sampled_loss(self, batch: Any, generator: torch.Generator | None) -> Tensor:
        return self.loss(self.model(batch[0]), batch[1])


class HasDetachedObjectives(RightTask):
    """Gives numbers for objectives."""

    def objectives(self, batch: Any) -> Any:
        return [loss.detach() for loss in super().objectives(batch).values()]


class MonitorsNothing(RightTask):
    """Monitors what it does not log."""

    monitor = ("val_accuracy", "max")


class DrawsWithPyplot(RightTask):
    """Leaves its figures open."""

    def figures(self) -> dict[str, Any]:
        return {"nothing": pyplot.figure()}


class FitsNothing(RightTask):
    """Wants batches of three."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        _, _, _ = batch


@pytest.mark.parametrize(
    ("plugin", "expected"),
    [
        (RightTask, set()),
        (CutsItsGraph, {"gives_a_loss"}),
        (ReturnsGraphs, {"gives_a_loss"}),
        (LearnsNothing, {"learns"}),
        (IgnoresTheGenerator, {"samples_its_loss"}),
        (SamplesNothing, {"samples_its_loss"}),
        (HasDetachedObjectives, {"gives_its_objectives"}),
        (MonitorsNothing, {"validates"}),
        (DrawsWithPyplot, {"draws_figures"}),
        (FitsNothing, {"builds_from_options"}),
    ],
)
def test_tasks(plugin: Any, expected: set[str]) -> None:
    by_name = {name_of(check): check for check in TaskSuite.checks}
    if not expected:
        assert failures(TaskSuite, plugin) == set()
    for name in expected:
        assert examine(by_name[name], plugin).state == "failed"
    pyplot.close("all")
