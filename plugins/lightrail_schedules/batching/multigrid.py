"""Multigrid training: small inputs in large batches first, full ones at the end."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lightrail import Batching, Extent, Portion, Traits
from lightrail.errors import CompositionError, ConfigurationError
from lightrail.options import at_least, between
from lightrail_schedules.batching.filled import require_filled

__all__ = ["Grid", "Multigrid", "Stage", "grids_of", "long_cycles", "resized"]

_HALF = math.sqrt(0.5)
IMAGES = ((1.0, 0.5), (1.0, _HALF), (1.0, 1.0))
VIDEOS = ((0.25, _HALF), (0.5, _HALF), (0.5, 1.0), (1.0, 1.0))
SHORT = (0.5, _HALF)


@dataclass(frozen=True)
class Grid:
    """One shape of the inputs and the batch that keeps their volume.

    Args:
        batch: How many times the base batch.
        time: Share of the frames.
        space: Share of each side.
    """

    batch: float
    time: float
    space: float


@dataclass(frozen=True)
class Stage:
    """A part of the run with one long-cycle shape.

    Args:
        index: Which stage of the learning-rate schedule it belongs to.
        grids: The shapes of the short cycle, the long cycle's own last.
        until: Where it ends, in epochs.
    """

    index: int
    grids: tuple[Grid, ...]
    until: float


def grids_of(time: float, space: float, short_cycle: bool) -> tuple[Grid, ...]:
    """The shapes that steps take in turn within one long-cycle shape; ``B T S²`` stays what it was.

    Args:
        time: Share of the frames of the long cycle's shape.
        space: Share of each side.
        short_cycle: Whether steps take smaller shapes in turn.

    Example:
        >>> [round(grid.batch, 3) for grid in grids_of(1.0, 1.0, short_cycle=True)]
        [4.0, 2.0, 1.0]
    """
    spaces = [*(min(factor, space) for factor in SHORT), space] if short_cycle else [space]
    return tuple(Grid(1 / (time * side**2), time, side) for side in spaces)


def long_cycles(
    starts: Sequence[float],
    end: float,
    shapes: Sequence[tuple[float, float]] = VIDEOS,
    short_cycle: bool = True,
    epoch_factor: float = 1.0,
) -> list[Stage]:
    """Which shape when: every stage of the learning rate goes through all shapes, the last one fine-tunes in full.

    Within a stage every shape makes as many steps as every other, so that its epochs are in proportion to its mean
    batch. The last stage, at the full shape, saves as many steps as the others do.

    Args:
        starts: Where each stage of the learning rate begins, from 0, ascending; in epochs, or shares of the run.
        end: Where the run would end.
        shapes: Of the long cycle, ``(time, space)``, from small to full.
        short_cycle: See :func:`grids_of`.
        epoch_factor: Epochs of the multigrid run over those of the run without.

    Example:
        >>> [round(stage.until) for stage in long_cycles([0, 94, 154, 196], 239, epoch_factor=1.5)][:5]
        [73, 110, 142, 158, 205]
    """
    grids = [grids_of(time, space, short_cycle) for time, space in shapes]
    means = [sum(grid.batch for grid in each) / len(each) for each in grids]
    pieces: list[tuple[int, tuple[Grid, ...], float]] = []
    steps = 0.0
    for index, (start, stop) in enumerate(itertools.pairwise(starts)):
        for each, mean in zip(grids, means, strict=True):
            epochs = (stop - start) * mean / sum(means)
            steps += epochs / mean
            pieces.append((index, each, epochs))
    saving = starts[-1] / steps if steps else 1.0
    pieces.append((len(starts) - 1, grids[-1], (end - starts[-1]) / saving * means[-1]))
    scale = end * epoch_factor / sum(epochs for _, _, epochs in pieces)
    stages, until = [], 0.0
    for index, each, epochs in pieces:
        until += epochs * scale
        stages.append(Stage(index, each, until))
    return stages


def resized(inputs: Tensor, shape: Sequence[int]) -> Tensor:
    """Images ``[B, C, H, W]`` or clips ``[B, C, T, H, W]`` in another shape: frames are picked, sides interpolated.

    Args:
        inputs: Floating point.
        shape: The new (T,) H, W.

    Example:
        >>> resized(torch.zeros(2, 3, 8, 8), (4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """
    if len(shape) == 3:
        frames = torch.linspace(0, inputs.shape[2] - 1, shape[0]).round().long()
        clips = inputs[:, :, frames].transpose(1, 2)
        flat = resized(clips.flatten(0, 1), shape[1:])
        return flat.view(*clips.shape[:2], *flat.shape[1:]).transpose(1, 2)
    if tuple(inputs.shape[-2:]) == tuple(shape):
        return inputs
    return F.interpolate(inputs, size=tuple(shape), mode="bilinear", antialias=True)


class Multigrid(Batching):
    """Trades the size of the inputs for the size of the batch: coarse and many first, fine and few at the end.

    With shares t of the frames and s of each side, ``b = b0 / (t s²)`` samples, and ``lr b`` with the long cycle's b.
    Every stage of the run goes through the shapes of the long cycle; within one, steps take ½, 1/√2 and 1 of its sides
    in turn. The last stage is at the full shape.

    Args:
        stages: Where the learning rate of a run without it would fall, as shares of the run, from 0 ascending; the
            last stage fine-tunes at the full shape.
        short_cycle: Whether steps take smaller shapes in turn.
        video: Whether inputs are clips ``[B, C, T, H, W]`` rather than images ``[B, C, H, W]``.
        multiple: Sides are rounded to a multiple of it, >= 1: a network's total stride.
        scale_lr: Whether the learning rate is multiplied by the batch factor of the long cycle.
        micro_batch: Samples that a device evaluates at once at most; ``None`` for as many as fit.

    Raises:
        ConfigurationError: Stages that do not ascend from 0.
        CompositionError: The horizon is given in steps, the data cannot fill the largest batch, or inputs have another
            number of axes.

    Deviations:
        For images the long cycle has the shapes ½, 1/√2 and 1 of the sides, since there is no time to trade. The run is
        as long as ``trainer.max_epochs`` says; the paper makes it 1.5 times as long. BatchNorm takes its statistics
        from the whole micro-batch, where the paper splits it into groups of 8 clips.

    Example:
        >>> batching = Multigrid(stages=(0.0, 0.5))
        >>> batching.begin(Extent(data_size=1000, batch_size=10, total_samples=10000, scales_with_gradient=True))
        >>> batching.next(samples=0, step=0), batching.next(samples=9999, step=2).samples
        (Portion(samples=40, shape=(1.0, 0.5), lr_factor=4.0), 10)

    Reference:
        Wu, Girshick, He, Feichtenhofer and Krähenbühl, 2020, "A Multigrid Method for Efficiently Training Video
        Models", arXiv:1912.00998, section 3.
    """

    traits = Traits(
        rule="b T S² stays the same; lr b",
        paper=(
            "Wu, Girshick, He, Feichtenhofer, Krähenbühl, 2020, A Multigrid Method for Efficiently Training Video "
            "Models, arXiv:1912.00998"
        ),
        example={"stages": (0.0, 0.5)},
    )

    def __init__(
        self,
        stages: Sequence[float] = (0.0, 0.4, 0.65, 0.82),
        short_cycle: bool = True,
        video: bool = False,
        multiple: int = 1,
        scale_lr: bool = True,
        micro_batch: int | None = None,
    ) -> None:
        starts = [float(each) for each in stages]
        if len(starts) < 2 or starts[0] != 0 or starts != sorted(set(starts)):
            raise ConfigurationError(
                "the stages of a multigrid run are no stages",
                found=f"batching.stages={list(stages)}",
                allowed="at least two shares of the run, ascending from 0",
                remedy="Use batching.stages=[0,0.5] for one long cycle and a fine-tuning half.",
            )
        between(0.0, 1.0, last_stage=starts[-1])
        at_least(1, multiple=multiple)
        super().__init__(micro_batch)
        self.video = video
        self.multiple = multiple
        self.scale_lr = scale_lr
        self._plan = long_cycles(starts, 1.0, VIDEOS if video else IMAGES, short_cycle)
        self._extent: Extent | None = None
        self._shape = (1.0, 1.0)

    def begin(self, extent: Extent) -> None:
        if extent.total_samples is None:
            raise CompositionError(
                "a multigrid run must know how many samples it will see",
                found="a horizon in steps, trainer.max_steps",
                allowed="trainer.max_epochs or trainer.max_samples",
                remedy="Set trainer.max_samples in place of trainer.max_steps.",
            )
        largest = max(grid.batch for stage in self._plan for grid in stage.grids)
        require_filled(
            extent, **{f"multigrid's largest batch, {largest:.0f} x data.batch_size": self._samples(largest, extent)}
        )
        self._extent = extent

    def next(self, samples: int, step: int) -> Portion:
        assert self._extent is not None
        assert self._extent.total_samples is not None
        share = samples / self._extent.total_samples
        stage = next((each for each in self._plan if share < each.until), self._plan[-1])
        grid = stage.grids[step % len(stage.grids)]
        factor = stage.grids[-1].batch if self.scale_lr else 1.0
        return Portion(self._samples(grid.batch, self._extent), (grid.time, grid.space), factor)

    @staticmethod
    def _samples(factor: float, extent: Extent) -> int:
        return max(1, round(factor * extent.batch_size))

    def reshape(self, batch: Any, shape: tuple[float, ...]) -> Any:
        self._shape = time, space = shape[0], shape[1]
        axes = 5 if self.video else 4
        leaves, structure = pytree.tree_flatten(batch)
        where = next((i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()), None)
        if where is None or leaves[where].dim() != axes:
            raise CompositionError(
                "multigrid has no inputs whose size it could trade",
                found="no floating-point tensor in the batch"
                if where is None
                else f"inputs {list(leaves[where].shape)}",
                allowed="[B, C, T, H, W] with batching.video=true, [B, C, H, W] without",
                remedy="Set batching.video to what the data are, or leave batching=multigrid out.",
            )
        inputs = leaves[where]
        sides = [max(self.multiple, round(side * space / self.multiple) * self.multiple) for side in inputs.shape[-2:]]
        frames = [max(1, round(inputs.shape[2] * time))] if self.video else []
        leaves[where] = resized(inputs, [*frames, *sides])
        return pytree.tree_unflatten(leaves, structure)

    def logged(self) -> dict[str, float]:
        return {"side": self._shape[1], **({"frames": self._shape[0]} if self.video else {})}
