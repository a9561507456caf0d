"""What all denoising objectives share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightrail.errors import CompositionError
from lightrail.generation import KarrasVE, Level, Noise, NoisePath, Prediction
from lightrail.generation.prediction import FORMS
from lightrail.options import between, positive
from lightrail_generation.tasks.data_range import inputs_of, labels_of, measured, training_batches
from lightrail_generation.tasks.draws import Draws
from lightrail_generation.tasks.time_sampling import TimeSampling

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightrail_generation.denoisers.task_denoiser import TaskDenoiser

__all__ = ["DenoisingTask", "Example"]

_MOST_AXES = 8
_STAGES = ("val", "test")


@dataclass(frozen=True)
class Example:
    """What a loss is worked out from.

    Args:
        x0: The data as states ``[B, …]``.
        label: The class of each, ``[B]``; ``None`` where the model knows none.
        shown: The class that the network is told, some of them dropped.
        t: The time of each, ``[B]`` in double precision.
        draws: Where further random numbers come from.
        noise: The noise that goes with each, where it is not to be drawn.
    """

    x0: Tensor
    label: Tensor | None
    shown: Tensor | None
    t: Tensor
    draws: Draws
    noise: Tensor | None = None


class DenoisingTask(LightningModule, ABC):
    """Learns to tell data from noise; the objective is a subclass's :meth:`losses`.

    Data become states x0 = (x − center)/scale. Where they are not given, center and scale are the middle and half the
    range of the training data, measured in one pass when training begins, so that states lie in [−1, 1]; they are saved
    with the weights. Before that they are 0 and 1.

    Subclasses set ``path``, ``form`` and ``time_sampling``.

    Args:
        model: ``model(x [B, …], time [B], label [B] or None)`` gives ``[B, …]``; its ``num_classes`` says how many
            labels it knows, and that number itself means none.
        label_dropout: The share of labels that the network is not told, in [0, 1); guidance needs some.
        center: Subtracted from the data; ``None`` to measure it.
        scale: What they are then divided by, above 0; ``None`` to measure it.
        sigma_data: The root mean square of the states, above 0; ``None`` to measure it.

    Attributes:
        path: The noise path.
        form: What :meth:`answer` is: data, noise, velocity, flow or score.
        gives: The forms that can be had of it when it generates.
        sampler_name: The sampler where the user names none.
        time_sampling: The distribution of times.
    """

    monitor = ("val_loss", "min")
    path: NoisePath
    form: str
    gives: tuple[str, ...] = FORMS
    sampler_name: str = "dpm_solver_pp"
    time_sampling: TimeSampling
    center: Tensor
    scale: Tensor
    sigma_data: Tensor
    state_sizes: Tensor

    def __init__(
        self,
        model: nn.Module,
        label_dropout: float = 0.1,
        center: float | None = None,
        scale: float | None = None,
        sigma_data: float | None = None,
    ) -> None:
        super().__init__()
        between(0, 1, label_dropout=label_dropout)
        positive(**{name: v for name, v in (("scale", scale), ("sigma_data", sigma_data)) if v is not None})
        self.model = model
        self.label_dropout = label_dropout
        self._given = {"center": center, "scale": scale, "sigma_data": sigma_data}
        for name, unknown in (("center", 0.0), ("scale", 1.0), ("sigma_data", 0.5)):
            given = self._given[name]
            self.register_buffer(name, torch.tensor(unknown if given is None else float(given)))
        # The shape of a state, filled up with zeros; all zeros until it is known.
        self.register_buffer("state_sizes", torch.zeros(_MOST_AXES, dtype=torch.int64))
        # By default a mean drops NaN with a warning, and a broken model would look well; here NaN stays NaN.
        self.metrics = nn.ModuleDict({f"{stage}_loss": MeanMetric(nan_strategy=float("nan")) for stage in _STAGES})
        self._tested: list[tuple[Tensor, Tensor]] = []

    @property
    def classes(self) -> int:
        """How many labels the model knows; 0 for none."""
        return int(getattr(self.model, "num_classes", 0) or 0)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """The shape of a state; empty until it is known."""
        return tuple(size for size in self.state_sizes.tolist() if size)

    # What samples.

    def noise_path(self) -> NoisePath:
        """The path that the model is trained on."""
        return self.path

    def denoiser(self) -> TaskDenoiser:
        """The model as samplers know it."""
        from lightrail_generation.denoisers.task_denoiser import TaskDenoiser

        return TaskDenoiser(self)

    def start(self, noise: Noise, level: Level) -> Tensor:
        """The states that sampling starts from, ``[B, …]``."""
        return noise.normal(-1) * self.path.starting_scale(level)

    def prediction(self, x: Tensor, level: Level, time: Tensor, label: Tensor | None) -> Prediction:
        """What is known of states, for samplers; the arguments are those of :meth:`answer`."""
        return Prediction(x, level, self.form, self.answer(x, level, time, label).to(x.dtype))

    # The network.

    @abstractmethod
    def answer(self, x: Tensor, level: Level, time: Tensor, label: Tensor | None) -> Tensor:
        """What the network says, ``[B, …]`` in the form ``form``.

        Args:
            x: States ``[B, …]``.
            level: Their level of noise, one for all or one a sample.
            time: The time that the network is told, ``[B]`` on the path.
            label: The class that it is told, ``[B]``; ``None`` for none.
        """

    def network(self, x: Tensor, time: Tensor, label: Tensor | None, model: nn.Module | None = None) -> Tensor:
        """The bare output of the network, or of another, in the type of the states.

        Raises:
            CompositionError: It does not have the shape of its input.
        """
        model = self.model if model is None else model
        weight = next(model.parameters(), x)
        output = model(x.to(weight.dtype), self._network_time(time).to(x.device, torch.float32), label)
        if output.shape != x.shape:
            raise CompositionError(
                f"{type(model).__name__} does not give back what it takes",
                found=f"states {list(x.shape)} became {list(output.shape)}",
                allowed="a model(x, time, label) whose output has the shape of x",
                remedy="Choose model=unet or model=dit for images, model=point_mlp for points.",
            )
        return output.to(x.dtype)

    def _network_time(self, time: Tensor) -> Tensor:
        """Of order one: log σ/4 where σ has no bounds, as in EDM."""
        return time.log() / 4 if isinstance(self.path, KarrasVE) else time

    # The objective.

    @abstractmethod
    def losses(self, example: Example) -> Tensor:
        """The loss of each sample, ``[B]``."""

    def noise(self, example: Example) -> Tensor:
        """The noise z of x = α x0 + σ z, ``[B, …]``."""
        return example.draws.normal(example.x0) if example.noise is None else example.noise

    def states(self, x: Tensor) -> Tensor:
        """Data as states, in single precision at least."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return (x - self.center.to(x.dtype)) / self.scale.to(x.dtype)

    def example(self, batch: Any, draws: Draws) -> Example:
        """A batch as states, with times and dropped labels."""
        x0, label = self.states(inputs_of(batch)), self._labels(batch)
        return Example(x0, label, self._shown(label, draws), self._times(len(x0), draws), draws)

    def _times(self, count: int, draws: Draws) -> Tensor:
        return self.time_sampling.times(draws.places(count))

    def _labels(self, batch: Any) -> Tensor | None:
        label = labels_of(batch) if self.classes else None
        if self.classes and label is None:
            raise CompositionError(
                "the model wants labels that the data do not have",
                found=f"model.num_classes={self.classes}, and batches without labels",
                allowed="batches (x, label), or a model without classes",
                remedy="Set model.num_classes=0, or choose data with labels.",
            )
        return label

    def _shown(self, label: Tensor | None, draws: Draws) -> Tensor | None:
        if label is None or draws.evaluates or not self.label_dropout:
            return label
        return label.masked_fill(draws.uniform(len(label)) < self.label_dropout, self.classes)

    def _draws(self, batch: Any) -> Draws:
        return Draws.for_training(inputs_of(batch).device, self.global_rank)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """The loss."""
        return {"loss": self.sample_losses(batch).mean()}

    def sample_losses(self, batch: Any) -> Tensor:
        """The loss of each sample, ``[B]``."""
        return self.losses(self.example(batch, self._draws(batch)))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The loss at fixed levels with fixed noise, so that it can be compared from epoch to epoch."""
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """The loss, as in validation."""
        example, losses = self._evaluate(batch, batch_idx, "test")
        self._tested.append((example.t.float().cpu(), losses.float().cpu()))

    def on_test_epoch_start(self) -> None:
        self._tested = []

    def _evaluate(self, batch: Any, batch_idx: int, stage: str) -> tuple[Example, Tensor]:
        draws = Draws.for_evaluation(batch_idx, self.global_rank, inputs_of(batch).device)
        example = self.example(batch, draws)
        losses = self.losses(example).detach()
        metric: Any = self.metrics[f"{stage}_loss"]
        metric.update(losses.mean(), weight=len(losses))
        self.log(f"{stage}_loss", metric, on_step=False, on_epoch=True, prog_bar=stage == "val", batch_size=len(losses))
        return example, losses

    def figures(self) -> dict[str, Figure]:
        """The loss of the last test by level of noise; under several processes, that of the first."""
        from lightrail_generation.tasks.loss_by_level import loss_by_level

        if not self._tested:
            return {}
        times, losses = (torch.cat(parts) for parts in zip(*self._tested, strict=True))
        return {"loss_by_level": loss_by_level(times, losses, logarithmic=isinstance(self.path, KarrasVE))}

    # The data.

    def on_fit_start(self) -> None:
        if self.state_shape:
            return
        trainer: Any = self.trainer
        if trainer.datamodule is None:
            trainer.fit_loop.setup_data()
        loader = trainer.train_dataloader if trainer.datamodule is None else trainer.datamodule.train_dataloader()
        self.measure(training_batches(loader))

    @torch.no_grad()
    def measure(self, batches: Any) -> None:
        """Measures what was not given, in one pass over the training data.

        Raises:
            DataError: They have no range.
            CompositionError: They have more labels than the model knows.
        """
        found = measured(batches)
        if self.classes and found.classes > self.classes:
            raise CompositionError(
                "the data have labels that the model does not know",
                found=f"labels up to {found.classes - 1}, model.num_classes={self.classes}",
                allowed=f"model.num_classes={found.classes}, or 0 for a model without classes",
                remedy=f"Set model.num_classes={found.classes}.",
            )
        if self._given["center"] is None:
            self.center.fill_((found.low + found.high) / 2)
        if self._given["scale"] is None:
            self.scale.fill_((found.high - found.low) / 2)
        if self._given["sigma_data"] is None:
            self.sigma_data.fill_(found.root_mean_square(float(self.center), float(self.scale)))
        self.state_sizes[: len(found.shape)] = torch.tensor(found.shape)

    def over(self, model: nn.Module) -> Self:
        """The same objective of another network."""
        other = copy.copy(self)
        other._modules, other._buffers = dict(self._modules), dict(self._buffers)
        other.model = model
        return other
