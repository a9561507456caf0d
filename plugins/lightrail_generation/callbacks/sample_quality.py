"""A probe of what a generative model has learned: samples drawn now and then, measured and shown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightrail import catalogue
from lightrail.errors import CompositionError
from lightrail.generation import Denoiser, Grid, Sampler, check_fit, sample
from lightrail.options import at_least
from lightrail.traits import Traits
from lightrail_generation.quality.sample_quality import SampleQuality

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SampleQualityProbe"]

TIMES = 8  # a run, where nothing else is said
SAMPLER = "ddim"  # where the task names none
ROWS, COLUMNS, POINTS = 8, 10, 500  # of the picture over training
KEPT = 2 * ROWS  # moments; of a long run, some are dropped


@dataclass(frozen=True)
class _Moment:
    """What was seen after one epoch."""

    epoch: int
    samples: Tensor
    measured: Mapping[str, float]


class SampleQualityProbe(Callback):
    """Draws the same few hundred samples again and again while a generative model trains, and measures them.

    Samples are drawn after a validation, from the weights that it saw: with ``callback=ema``, whatever the order of the
    two, those of the average. After the test they are drawn once more, from the checkpoint that was tested.

    Logged are ``samples/kid``, ``samples/frechet``, ``samples/sliced_wasserstein`` and ``samples/accuracy``, and after
    the test the same with ``test_`` before; see :class:`SampleQuality` for what they are. All samples start from the
    same noise each time, with the classes in turn; the report shows some of them over training, and all at the end.

    Args:
        every: Epochs from one probe to the next, at least 1, and one after the last validation; ``None`` for eight
            probes a run.
        count: Samples, at least 2; the error of the measures falls with it.
        sampler: By name; ``None`` for the one that suits the task.
        steps: Of the sampler, at least 1.
        batch_size: Samples drawn at a time, at least 1; it does not change them.
        sample_seed: Of their noise, independent of the seed of the run.

    Raises:
        ConfigurationError: An option is out of range.
        CompositionError: The task does not generate, the sampler cannot work with it, or there is no data module to
            measure against.

    Guarantees:
        A run with the probe ends bit for bit where one without it does: it draws from no random number generator of the
        run, and changes nothing in it. Under several processes each draws its share of the samples.

    Example:
        >>> SampleQualityProbe(every=5, count=64).every
        5
    """

    traits: ClassVar[Traits] = Traits(example={"every": 1, "count": 8, "steps": 2})

    def __init__(
        self,
        every: int | None = None,
        count: int = 256,
        sampler: str | None = None,
        steps: int = 20,
        batch_size: int = 128,
        sample_seed: int = 0,
    ) -> None:
        super().__init__()
        if every is not None:
            at_least(1, every=every)
        at_least(2, count=count)
        at_least(1, steps=steps, batch_size=batch_size)
        at_least(0, sample_seed=sample_seed)
        self.every = every
        self.count = count
        self.sampler = sampler
        self.steps = steps
        self.batch_size = batch_size
        self.sample_seed = sample_seed
        self._quality: SampleQuality | None = None
        self._moments: list[_Moment] = []
        self._latest: tuple[Tensor, Tensor | None] | None = None

    # When.

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not callable(getattr(pl_module, "denoiser", None)):
            raise _refusal(
                "has nothing to draw samples from",
                f"task {type(pl_module).__name__}, without denoiser()",
                "a generative task: diffusion, flow_matching",
            )
        self._attach(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach(trainer)

    def _attach(self, trainer: Trainer) -> None:
        if self._quality is None:
            data = getattr(trainer, "datamodule", None)
            if data is None:
                raise _refusal("has nothing to measure against", "loaders without a data module", "a data module")
            self._quality = SampleQuality.for_data(data, Path(trainer.default_root_dir))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # By now every callback has put the weights where it wants them evaluated, and none has put them back.
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        epoch = trainer.current_epoch + 1
        last = self._moments[-1].epoch if self._moments else 0
        if epoch - last >= self._interval(trainer) or (_is_last(trainer, epoch) and epoch != last):
            samples, labels, measured = self._probe(trainer, pl_module, "samples/")
            self._remember(_Moment(epoch, self._shown(samples), measured))
            self._latest = samples, labels

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        samples, labels, _ = self._probe(trainer, pl_module, "test_samples/")
        self._latest = samples, labels

    def _interval(self, trainer: Trainer) -> int:
        if self.every is not None:
            return self.every
        epochs = trainer.max_epochs or 0
        return max(1, math.ceil(epochs / TIMES)) if epochs > 0 else 1

    # What.

    def _probe(
        self, trainer: Trainer, module: LightningModule, prefix: str
    ) -> tuple[Tensor, Tensor | None, dict[str, float]]:
        with trainer.precision_plugin.forward_context():
            samples, labels = self._draw(trainer, module)
        assert self._quality is not None
        measured = self._quality.measure(samples, labels)
        for name, value in measured.items():
            # The same on every rank, since all measure all samples.
            module.log(f"{prefix}{name}", value, sync_dist=trainer.world_size > 1)
        return samples, labels, measured

    @torch.no_grad()
    def _draw(self, trainer: Trainer, module: Any) -> tuple[Tensor, Tensor | None]:
        """The samples in the data's own units, and their labels where the model knows classes."""
        denoiser: Denoiser = module.denoiser()
        sampler, grid = self._solver(module, denoiser)
        ranks = trainer.world_size
        share = math.ceil(self.count / ranks)
        mine = [ranks * place + trainer.global_rank for place in range(share)]
        drawn, asked = [], []
        for first in range(0, share, self.batch_size):
            indices = mine[first : first + self.batch_size]
            condition = denoiser.condition({}, indices)
            made = sample(denoiser, sampler, grid, indices, seed=self.sample_seed, condition=condition)
            drawn.append(denoiser.decode(made.x))
            asked += [] if condition is None else [condition["label"]]
        samples = _gathered(trainer, torch.cat(drawn))[: self.count]
        labels = _gathered(trainer, torch.cat(asked))[: self.count] if asked else None
        return samples.float(), labels

    def _solver(self, module: Any, denoiser: Denoiser) -> tuple[Sampler, Grid]:
        name = self.sampler or getattr(module, "sampler_name", None) or SAMPLER
        sampler: Sampler = catalogue.load("sampler", name)(steps=self.steps)
        check_fit(denoiser, sampler)
        sampler.prepare(denoiser)
        return sampler, sampler.grid(denoiser.path, catalogue.load("time_grid", sampler.grid_name)())

    def _shown(self, samples: Tensor) -> Tensor:
        """Those that the picture over training shows."""
        return samples[: POINTS if samples.ndim == 2 else COLUMNS].clone()

    # What is left of it.

    def _remember(self, moment: _Moment) -> None:
        moments = self._moments = [*self._moments, moment]
        if len(moments) > KEPT:
            # The one whose neighbours are the nearest to each other; the first and the last always stay.
            between = [after.epoch - before.epoch for before, after in zip(moments, moments[2:], strict=False)]
            del moments[1 + between.index(min(between))]

    def figures(self) -> dict[str, Figure]:
        """``samples``: those drawn last; ``samples_over_training``: some of each probe."""
        if self._quality is None or self._latest is None:
            return {}
        return {**self._quality.figures(*self._latest), **self._over_training(self._latest[1])}

    def _over_training(self, labels: Tensor | None) -> dict[str, Figure]:
        from lightrail_generation.quality.pictures import images_over_time, is_image, points_over_time

        quality, moments = self._quality, self._moments
        if quality is None or len(moments) < 2:
            return {}
        chosen = sorted({round(place * (len(moments) - 1) / (ROWS - 1)) for place in range(ROWS)})
        rows = [(_label(moments[place]), moments[place].samples) for place in chosen]
        asked = None if labels is None else labels[: len(rows[0][1])]
        title = "The same noise, epoch after epoch"
        if is_image(rows[0][1].shape[1:]):
            headings = [] if asked is None else [quality.name_of(int(label)) for label in asked]
            return {"samples_over_training": images_over_time(rows, headings, title, quality.limits)}
        if rows[0][1].ndim == 2:
            return {"samples_over_training": points_over_time(rows, asked, quality.reference, title)}
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "moments": [
                {"epoch": each.epoch, "samples": each.samples, "measured": dict(each.measured)}
                for each in self._moments
            ]
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._moments = [_Moment(**each) for each in state_dict["moments"]]


def _is_last(trainer: Trainer, epoch: int) -> bool:
    """Whether no validation will follow."""
    by_steps = 0 <= trainer.max_steps <= trainer.global_step
    return by_steps or (trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epoch)


def _gathered(trainer: Trainer, mine: Tensor) -> Tensor:
    """The rows of all ranks in the order of their numbers, on the CPU."""
    if trainer.world_size == 1:
        return mine.cpu()
    every: Any = trainer.strategy.all_gather(mine)
    return every.transpose(0, 1).flatten(0, 1).cpu()


def _label(moment: _Moment) -> str:
    measured = moment.measured
    name = next((each for each in ("accuracy", "sliced_wasserstein") if each in measured), None)
    if name is None:
        return f"epoch {moment.epoch}"
    text = f"{measured[name]:.0%} recognised" if name == "accuracy" else f"sliced W₂ {measured[name]:.3g}"
    return f"epoch {moment.epoch}\n{text}"


def _refusal(what: str, found: str, allowed: str) -> CompositionError:
    return CompositionError(
        f"callback 'sample_quality' {what}",
        found=found,
        allowed=allowed,
        remedy="Leave out callback=sample_quality, or change what was found.",
    )
