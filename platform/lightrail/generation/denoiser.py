"""A denoiser: a network on a noise path, with what is asked of it and what its samples are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lightrail.errors import CompositionError
from lightrail.generation.noise import Noise
from lightrail.generation.noise_path import Level, NoisePath
from lightrail.generation.prediction import Prediction, mapped_level
from lightrail.traits import Traits

if TYPE_CHECKING:
    from pathlib import Path

    from lightning.pytorch import LightningDataModule
    from matplotlib.figure import Figure

    from lightrail.generation.measurement import Observed
    from lightrail.generation.time_grid import Grid

__all__ = ["Condition", "Denoiser", "Generated", "mapped_condition"]

Condition = Mapping[str, Any]
"""What steers a batch, by name: ``label`` ``[B]``, an embedding ``[B, …]``; anything else is for the whole batch."""


@dataclass(frozen=True)
class Generated:
    """Samples with how they came about, on the CPU.

    Args:
        samples: In the user's units, as :meth:`Denoiser.decode` gives them, ``[N, …]``.
        start: The states that they came from, ``[N, *shape]``.
        condition: What they were steered by, one row each.
        grid: The levels that were visited; ``None`` where they are not known.
        observed: What was measured of the samples that were sought, where something was.
        is_guided: Whether guidance steered them, so that they are not the model's own.
    """

    samples: Tensor
    start: Tensor
    condition: Condition | None = None
    grid: Grid | None = None
    observed: Observed | None = None
    is_guided: bool = False


class Denoiser(ABC):
    """A network on a noise path; what samplers, guidance and ``generate`` know of a generative model.

    Subclasses write :meth:`output` and set ``path``, ``form`` and ``shape``.

    Attributes:
        path: The noise path that the network was trained on.
        form: What the network's output is: data, noise, velocity, flow or score.
        shape: Of one state, ``(channels, height, width)`` or ``(features,)``.
        dtype: Of the state; the network's own by default.
        device: Where the network is.
        gives: The forms that can be had of it; one that learned from other than Gaussian noise has no noise or score.
        classes: How many labels it knows; 0 for none.
        sampler_name: The sampler where the user names none.
        network: The module behind it, for guidance that reaches into its blocks; ``None`` where there is none.
    """

    traits: ClassVar[Traits] = Traits()
    path: NoisePath
    form: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    gives: tuple[str, ...] = ("data", "noise", "velocity", "flow", "score")
    classes: int = 0
    sampler_name: str = "dpm_solver_pp"
    network: Any = None

    @abstractmethod
    def output(self, x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        """What the network says, ``[B, *shape]`` in the form :attr:`form`.

        Args:
            x: The state ``[B, *shape]``.
            t: The time of each sample on the path, ``[B]`` float64.
            condition: What it is steered by; ``None`` for nothing.
        """

    def predict(
        self, x: Tensor, level: Level, condition: Condition | None = None, network_time: Tensor | float | None = None
    ) -> Prediction:
        """One evaluation.

        Args:
            x: The state ``[B, *shape]``.
            level: Its level of noise, one for all or one a sample.
            condition: What steers it.
            network_time: The time that the network is told, where it is not the level's.
        """
        time = level.t if network_time is None else network_time
        times = torch.as_tensor(time, dtype=torch.float64, device=x.device).reshape(-1).expand(len(x))
        return Prediction(x, level, self.form, self.output(x, times, condition).to(x.dtype))

    def predict_each(
        self,
        x: Tensor,
        level: Level,
        conditions: Sequence[Condition | None],
        network_time: Tensor | float | None = None,
    ) -> list[Prediction]:
        """The prediction under each of several conditions, in one call of the network where they are alike.

        Args:
            x: The state ``[B, *shape]``.
            level: Its level of noise.
            conditions: Each for the whole batch.
            network_time: The time that the network is told, where it is not the level's.
        """
        first = conditions[0]
        are_alike = all(
            (each is None) == (first is None) and (each is None or each.keys() == (first or {}).keys())
            for each in conditions
        )
        if len(conditions) == 1 or not are_alike:
            return [self.predict(x, level, each, network_time) for each in conditions]
        count, size = len(conditions), len(x)

        def widened(tensor: Tensor) -> Tensor:
            return tensor.repeat(count, *[1] * (tensor.ndim - 1))

        time = widened(network_time) if isinstance(network_time, Tensor) and network_time.ndim else network_time
        joined = _joined([each for each in conditions if each is not None])
        together = self.predict(widened(x), mapped_level(level, widened), joined, time)
        apart = [together.map(lambda tensor, i=i: tensor[i * size : (i + 1) * size]) for i in range(count)]
        for prediction in apart:
            # Of the very states that were asked about, so that a gradient leads to them.
            prediction.x, prediction.level = x, level
        return apart

    def start(self, noise: Noise, level: Level) -> Tensor:
        """The states that sampling starts from, ``[B, *shape]``."""
        return noise.normal(-1) * self.path.starting_scale(level)

    def condition(self, request: Mapping[str, Any], indices: Sequence[int]) -> Condition | None:
        """What the user asked for, for these samples.

        Args:
            request: The ``generate`` group: ``label`` (a number, a list to go through in turn, or ``None`` for all
                classes in turn), ``prompt``, ….
            indices: Which samples.
        """
        if not self.classes:
            if request.get("label") is not None:
                raise CompositionError(
                    "this model knows no classes",
                    found=f"generate.label={request['label']}",
                    allowed="generate.label=null",
                    remedy="Leave generate.label out, or train with a model of classes (model.num_classes).",
                )
            return None
        wanted = request.get("label")
        labels = list(range(self.classes)) if wanted is None else [wanted] if isinstance(wanted, int) else list(wanted)
        for label in labels:
            if not 0 <= label < self.classes:
                raise CompositionError(
                    f"there is no class {label}",
                    found=f"generate.label={wanted}",
                    allowed=f"0 to {self.classes - 1}",
                    remedy="Choose labels within that range.",
                )
        return {"label": torch.tensor([labels[i % len(labels)] for i in indices], device=self.device)}

    def unconditional(self, condition: Condition | None) -> Condition | None:
        """The condition that says nothing, for guidance; ``None`` where the network takes that for it."""
        return None

    def decode(self, x: Tensor) -> Tensor:
        """The samples in the user's own units, ``[B, …]``: pixels in [0, 1], points as in the data."""
        return x

    def encode(self, samples: Tensor) -> Tensor:
        """The states of samples: undoes :meth:`decode`."""
        return samples

    def measure(self, generated: Generated) -> dict[str, float]:
        """How good all the samples of a generation are, by name."""
        return {}

    def figures(self, generated: Generated) -> dict[str, Figure]:
        """Pictures for the report; where there is none of ``samples``, states of images are drawn as a grid."""
        return {}

    def to(self, device: torch.device) -> Denoiser:
        """Moves the network to a device; one that needs more than the attribute overrides this."""
        self.device = device
        return self

    def attach(self, data: LightningDataModule | None, folder: Path | None) -> None:  # noqa: B027
        """Shows where the model comes from, once, before anything is sampled.

        Args:
            data: What it was trained on.
            folder: The folder of the run that trained it.
        """

    def examples(self, count: int) -> Tensor:
        """Data that the model was not trained on, in the user's units, ``[count, …]``.

        Raises:
            CompositionError: None are known.
        """
        raise CompositionError(
            f"{type(self).__name__} has no data to measure",
            found="neither generate.image nor generate.observed",
            allowed="an image of yours, or a trained run, whose validation data are known",
            remedy="Name one: generate.image=FILE, or generate.observed=FILE for what was measured already.",
        )

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean ``[n]`` and covariance ``[n, n]`` of the data as states, float64; n is the size of a state.

        Raises:
            CompositionError: Nothing is known of the data.
        """
        raise CompositionError(
            f"{type(self).__name__} does not know its data",
            found="no mean and covariance of the data",
            allowed="a trained run, whose data are known, or denoiser=gaussian_mixture",
            remedy="Leave out what needs the data's moments, or generate from the run: generate run=FOLDER.",
        )

    def fingerprint(self) -> str:
        """A digest of the weights, by which what was fitted for this model is known again."""
        raise CompositionError(
            f"{type(self).__name__} has no fingerprint",
            found="no digest of its weights",
            allowed="a denoiser with fingerprint()",
            remedy="Add fingerprint() to it.",
        )


def mapped_condition(condition: Condition | None, function: Callable[[Tensor], Tensor]) -> Condition | None:
    """A condition with a function applied to each tensor that has one row a sample."""
    if condition is None:
        return None
    return {
        name: function(value) if isinstance(value, Tensor) and value.ndim else value
        for name, value in condition.items()
    }


def _joined(conditions: Sequence[Condition]) -> Condition | None:
    """Several batches' conditions as one batch's; what is for a whole batch must be the same in all."""
    if not conditions:
        return None
    return {
        name: torch.cat([each[name] for each in conditions]) if isinstance(value, Tensor) and value.ndim else value
        for name, value in conditions[0].items()
    }
