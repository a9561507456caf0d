"""Rectified diffusion: training again on the noise and data that a trained model paired."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightrail.errors import CompositionError
from lightrail.generation import Condition, Denoiser, KarrasVE, Level, Noise
from lightrail.options import at_least
from lightrail.step.randomness import RandomState
from lightrail.traits import Traits
from lightrail_generation.samplers.ddim import transfer
from lightrail_generation.tasks.data_range import inputs_of
from lightrail_generation.tasks.denoising import Example
from lightrail_generation.tasks.denoising_regression import DenoisingRegression
from lightrail_generation.tasks.diffusion import Diffusion
from lightrail_generation.tasks.draws import Draws
from lightrail_generation.tasks.flow_matching import FlowMatching
from lightrail_generation.tasks.pfgmpp import PFGMPP
from lightrail_generation.time_grids.karras import Karras
from lightrail_generation.time_grids.uniform import Uniform

__all__ = ["Pairs", "RectifiedDiffusion", "generate_pairs"]

_AT_ONCE = 256
_HELD_OUT = 0.1


@dataclass(frozen=True)
class Pairs:
    """Noise and the data that a model made of it, on the CPU.

    Args:
        z: Standard normal ``[N, …]``.
        x0: Where the probability flow leads from there, as states ``[N, …]``.
        label: What it was steered by, ``[N]``; ``None`` for nothing.
    """

    z: Tensor
    x0: Tensor
    label: Tensor | None

    def __len__(self) -> int:
        return len(self.z)


@torch.no_grad()
def generate_pairs(denoiser: Denoiser, count: int, steps: int, guidance: float = 1.0, seed: int = 0) -> Pairs:
    """Follows the probability flow of a model from noise to data, by Euler steps in σ/α.

    Args:
        denoiser: The model; where it knows classes, they are taken in turn.
        count: Pairs.
        steps: Steps for each, of one evaluation, or of two with guidance.
        guidance: w of D = D_∅ + w (D_c − D_∅); 1 for none.
        seed: Of the noise.

    Example:
        >>> from lightrail.generation import GaussianMixture
        >>> tuple(generate_pairs(GaussianMixture(), count=4, steps=10).x0.shape)
        (4, 2)
    """
    times = Karras() if isinstance(denoiser.path, KarrasVE) else Uniform()
    grid = times.grid(denoiser.path, steps)
    parts = []
    for first in range(0, count, _AT_ONCE):
        indices = range(first, min(first + _AT_ONCE, count))
        z = Noise(seed, indices, denoiser.shape, denoiser.dtype, denoiser.device).normal(-1)
        condition = denoiser.condition({}, indices)
        x = z * denoiser.path.starting_scale(grid[0])
        for here, there in itertools.pairwise(grid):
            x = _euler(denoiser, x, here, there, condition, guidance)
        parts.append((z.cpu(), x.cpu(), None if condition is None else condition["label"].cpu()))
    columns = list(zip(*parts, strict=True))
    label = None if columns[2][0] is None else torch.cat(columns[2])
    return Pairs(torch.cat(columns[0]), torch.cat(columns[1]), label)


def _euler(
    denoiser: Denoiser, x: Tensor, here: Level, there: Level, condition: Condition | None, guidance: float
) -> Tensor:
    prediction = denoiser.predict(x, here, condition)
    if guidance != 1 and condition is not None:
        plain = denoiser.predict(x, here, denoiser.unconditional(condition)).data
        prediction = prediction.with_data(plain + guidance * (prediction.data - plain))
    return transfer(prediction, there)


class RectifiedDiffusion(DenoisingRegression):
    """Trains a trained model again, with its own loss, on pairs of noise and the data that it makes of that noise.

    z ~ N(0, I), x0 = the teacher's probability flow from z; the teacher's own loss at x = α x0 + σ z with that same z

    With data and noise paired, one step from z can go the whole way: what is straightened is a first-order path, not
    necessarily a line, so that any noise path and any prediction will do. The network starts with the teacher's
    weights.

    Args:
        model: ``model(x, time, label)``, of the teacher's architecture.
        teacher: The folder of the run that trained the teacher, with task ``diffusion``, ``flow_matching`` or
            ``rectified_diffusion``. Its loss, path, center and scale are taken over, so it must stay where it is.
        pairs: How many pairs, at least 10; they are made when training begins and kept in memory, a tenth of them for
            validation and test.
        steps: Steps of the teacher for each pair, at least 1.
        guidance: The weight of classifier-free guidance in them; 1 for none.
        label_dropout: The share of labels that the network is not told, in [0, 1).

    Raises:
        CheckpointError: There is no such run.
        CompositionError: Its task has another objective, or its network another shape.

    Deviations:
        The batches of the run's data say how many pairs make a step, and nothing else of them is used. One phase; no
        consistency distillation afterwards. Data and noise that belong together give no score.

    Example:
        >>> RectifiedDiffusion(model, teacher="runs/teacher", pairs=4096)  # doctest: +SKIP

    Reference:
        F.-Y. Wang, L. Yang, Z. Huang, M. Wang and H. Li (2024), Rectified Diffusion: Straightness Is Not Your Need in
        Rectified Flow, arXiv 2410.07303.
    """

    traits: ClassVar[Traits] = Traits(
        rule="loss = E w ‖y(x0, z) − ŷ(α x0 + σ z, t)‖², x0 = the teacher's flow from z",
        paper="F.-Y. Wang, L. Yang, Z. Huang, M. Wang, H. Li, 2024, Rectified Diffusion: Straightness Is Not Your Need "
        "in Rectified Flow, arXiv 2410.07303",
    )
    gives = ("data", "noise", "velocity", "flow")

    def __init__(
        self,
        model: nn.Module,
        teacher: str,
        pairs: int = 4096,
        steps: int = 25,
        guidance: float = 1.0,
        label_dropout: float = 0.1,
    ) -> None:
        at_least(10, pairs=pairs)
        at_least(1, steps=steps)
        super().__init__(model, label_dropout)
        self.count, self.steps, self.guidance = pairs, steps, float(guidance)
        self._pairs: Pairs | None = None
        trained = _load(teacher)
        objective = trained.objective if isinstance(trained, RectifiedDiffusion) else trained
        self.teacher = teacher
        self._objective = [objective.over(model)]  # in a list, so that its network is registered once
        self.path, self.form = objective.path, objective.form
        self.time_sampling, self.sampler_name = objective.time_sampling, objective.sampler_name
        for name, buffer in trained.named_buffers(recurse=False):
            getattr(self, name).copy_(buffer)
        _take_over(model, trained.model, teacher)

    @property
    def objective(self) -> Any:
        """The teacher's objective of this network, with this module's numbers wherever they are."""
        found = self._objective[0]
        found.sigma_data = self.sigma_data
        return found

    def answer(self, x: Tensor, level: Level, time: Tensor, label: Tensor | None) -> Tensor:
        return self.objective.answer(x, level, time, label)

    def weight(self, level: Level, t: Tensor) -> Any:
        return self.objective.weight(level, t)

    def on_fit_start(self) -> None:
        self._ready_pairs()

    def _ready_pairs(self) -> Pairs:
        """The pairs, made once."""
        if self._pairs is None:
            teacher = _load(self.teacher).to(self.device).denoiser()
            self._pairs = generate_pairs(teacher, self.count, self.steps, self.guidance)
        return self._pairs

    def example(self, batch: Any, draws: Draws) -> Example:
        pairs = self._ready_pairs()
        count = len(inputs_of(batch))
        held_out = max(1, int(_HELD_OUT * len(pairs)))
        first, width = (0, held_out) if draws.evaluates else (held_out, len(pairs) - held_out)
        rows = (first + draws.uniform(count) * width).long().cpu()
        x0, z = (each[rows].to(draws.device) for each in (pairs.x0, pairs.z))
        label = None if pairs.label is None else pairs.label[rows].to(draws.device)
        return Example(x0, label, self._shown(label, draws), self._times(count, draws), draws, z)


def _load(folder: str) -> Any:
    """The task of a run; the random numbers of this one are left alone."""
    from lightrail.generation.trained_run import load_trained

    with RandomState.kept():
        task = load_trained(folder).task
    if isinstance(task, PFGMPP) or not isinstance(task, Diffusion | FlowMatching | RectifiedDiffusion):
        raise CompositionError(
            "this teacher cannot be rectified",
            found=f"teacher={folder}, whose task is {type(task).__name__}",
            allowed="a run with task=diffusion, flow_matching or rectified_diffusion",
            remedy="Train one of these first, and name its run folder with task.teacher=FOLDER.",
        )
    return task


def _take_over(model: nn.Module, teacher: nn.Module, folder: str) -> None:
    """Copies the teacher's weights."""
    theirs, ours = teacher.state_dict(), model.state_dict()
    odd: Sequence[str] = [
        name for name in sorted(theirs.keys() | ours.keys())
        if name not in theirs or name not in ours or theirs[name].shape != ours[name].shape
    ]  # fmt: skip
    if odd:
        raise CompositionError(
            "the model is not of the teacher's architecture",
            found=f"{odd[0]} differs between the model and that of {folder}",
            allowed="the model group of the teacher's run, with its options",
            remedy="Choose the same model with the same options as the teacher's config.yaml says.",
        )
    model.load_state_dict(theirs)
