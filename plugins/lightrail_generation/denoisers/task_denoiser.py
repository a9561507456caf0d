"""A trained task as samplers know it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lightrail.errors import CompositionError
from lightrail.generation import Condition, Denoiser, Generated, Level, Noise, Prediction
from lightrail.traits import Traits
from lightrail_generation.tasks.data_range import inputs_of, training_batches
from lightrail_generation.tasks.evaluating import evaluating

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule
    from matplotlib.figure import Figure

    from lightrail_generation.tasks.denoising import DenoisingTask

__all__ = ["TaskDenoiser"]


class TaskDenoiser(Denoiser):
    """The network of a generative task, in evaluation mode, on the path that it was trained on.

    Args:
        task: A denoising task. Its weights stay its own: what trains them further changes what is sampled.

    Example:
        >>> from lightrail_generation.tasks.flow_matching import FlowMatching
        >>> TaskDenoiser(FlowMatching(torch.nn.Identity())).form
        'flow'
    """

    traits: ClassVar[Traits] = Traits(rule="the network of a trained task")

    def __init__(self, task: DenoisingTask) -> None:
        self.task = task
        self.path = task.noise_path()
        self.form = task.form
        self.gives = task.gives
        self.classes = task.classes
        self.sampler_name = task.sampler_name
        self.network = task.model
        weight = next(task.model.parameters(), torch.empty(0))
        self.dtype, self.device = weight.dtype, weight.device
        self.data: LightningDataModule | None = None
        self.folder: Path | None = None
        self._quality: Any = None

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of one state: that of the data which the task has seen, or that were attached.

        Raises:
            CompositionError: Neither is known.
        """
        if not self.task.state_shape and self.data is not None:
            found = tuple(next(training_batches(self._ready_data().train_dataloader()))[0].shape[1:])
            self.task.state_sizes[: len(found)] = torch.tensor(found)
        if not self.task.state_shape:
            raise CompositionError(
                "it is not known what a sample of this model looks like",
                found="a task that was never trained, without data",
                allowed="a trained run, or attach(data, folder)",
                remedy="Train the task, or attach its data.",
            )
        return self.task.state_shape

    def to(self, device: torch.device) -> TaskDenoiser:
        self.task.to(device)
        self.device = torch.device(device)
        return self

    # Predictions.

    def output(self, x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        with evaluating(self.task):
            return self.task.answer(x, self.path.levels(t.to(x.device), x.dim()), t, _label(condition))

    def predict(
        self, x: Tensor, level: Level, condition: Condition | None = None, network_time: Tensor | float | None = None
    ) -> Prediction:
        time = level.t if network_time is None else network_time
        times = torch.as_tensor(time, dtype=torch.float64).reshape(-1).expand(len(x))
        with evaluating(self.task):
            return self.task.prediction(x, level, times, _label(condition))

    def start(self, noise: Noise, level: Level) -> Tensor:
        return self.task.start(noise, level)

    def unconditional(self, condition: Condition | None) -> Condition | None:
        """The label that means none.

        Raises:
            CompositionError: The network never saw it.
        """
        if condition is None or not self.classes:
            return None
        if not self.task.label_dropout:
            raise CompositionError(
                "this model was never trained without its labels, and cannot be guided by leaving them out",
                found="task.label_dropout=0",
                allowed="a share of dropped labels above 0, such as 0.1",
                remedy="Leave guidance out, or train with task.label_dropout=0.1.",
            )
        return {**condition, "label": torch.full_like(condition["label"], self.classes)}

    # Samples.

    def decode(self, x: Tensor) -> Tensor:
        center, scale = self._units(x)
        return x * scale + center

    def encode(self, samples: Tensor) -> Tensor:
        center, scale = self._units(samples)
        return (samples - center) / scale

    def _units(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.task.center.to(like.device, like.dtype), self.task.scale.to(like.device, like.dtype)

    def measure(self, generated: Generated) -> dict[str, float]:
        quality = self._of_samples()
        return {} if quality is None else dict(quality.measure(generated.samples, self._labels(generated)))

    def figures(self, generated: Generated) -> dict[str, Figure]:
        quality = self._of_samples()
        return {} if quality is None else dict(quality.figures(generated.samples, self._labels(generated)))

    def _labels(self, generated: Generated) -> Tensor | None:
        label = _label(generated.condition)
        return None if label is None or bool((label >= self.classes).any()) else label.cpu()

    def _of_samples(self) -> Any:
        """What measures samples against the data, made once; ``None`` where the data are not known."""
        if self._quality is None and self.data is not None:
            from lightrail_generation.quality.sample_quality import SampleQuality

            self._quality = SampleQuality.for_data(self.data, self.folder)
        return self._quality

    # The data.

    def attach(self, data: LightningDataModule | None, folder: Path | None) -> None:
        self.data, self.folder, self._quality = data, folder, None

    def _ready_data(self) -> LightningDataModule:
        data = self.data
        assert data is not None
        data.prepare_data()
        data.setup("fit")
        return data

    def examples(self, count: int) -> Tensor:
        """Data of validation, else of training where there are none."""
        if self.data is None:
            return super().examples(count)
        data = self._ready_data()
        loader = data.val_dataloader() or data.train_dataloader()
        found: list[Tensor] = []
        for batch in loader:
            found.append(inputs_of(batch))
            if sum(map(len, found)) >= count:
                break
        return torch.cat(found)[:count]

    @torch.no_grad()
    def moments(self) -> tuple[Tensor, Tensor]:
        if self.data is None:
            return super().moments()
        count, total, products = 0, torch.zeros(()), torch.zeros(())
        for batch in training_batches(self._ready_data().train_dataloader()):
            states = self.encode(inputs_of(batch).cpu().double()).flatten(1)
            count, total = count + len(states), total + states.sum(0)
            products = products + states.T @ states
        mean = total / count
        return mean, products / count - mean[:, None] * mean

    def fingerprint(self) -> str:
        """A digest of the weights and of what maps data to states."""
        digest = hashlib.sha256(f"{type(self.task).__name__} {type(self.path).__name__} {self.form}".encode())
        for name, value in sorted(self.task.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def _label(condition: Condition | None) -> Tensor | None:
    return None if condition is None else condition.get("label")
