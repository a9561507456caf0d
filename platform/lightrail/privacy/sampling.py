"""Which records make a step of private training: drawn in secret, from integers, on every rank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lightrail.errors import CheckpointError, CompositionError
from lightrail.privacy.events import steps_per_epoch
from lightrail.run.windows import MicroBatch, Windows, describe_loader
from lightrail.sample_gradients.paths import take
from lightrail.step.batching import Batching, Extent, Portion

if TYPE_CHECKING:
    from lightrail.privacy.engine import PrivacyEngine

__all__ = ["PrivateWindows"]

_DEVIATIONS = 6  # by which a Poisson batch may exceed its expectation and still be evaluated at once


class PrivateWindows(Windows):
    """Batches for private training, cut into micro-batches: as many on every rank, some of them perhaps empty.

    Every rank draws from records of its own with the rate of all, so that a batch of all ranks is one Poisson batch.
    How many records a step really has is private: what is told outside is what is expected.

    Args:
        engine: Whose secret numbers decide.
        max_samples: The horizon in expected samples, where it is given so.
    """

    def __init__(self, engine: PrivacyEngine, max_samples: int | None = None) -> None:
        super().__init__(Batching())
        self.stand_in: Any = None  # a record in place of an empty micro-batch's, for ranks that must evaluate something
        self._max_samples = max_samples
        self._engine = engine
        self.is_secret = not engine.method.deterministic_noise
        self.counts_steps = True
        self.steps_in_epoch = 1
        self._epoch_step = 0
        self._order: Tensor | None = None
        self._goes_on: dict[str, Any] | None = None

    # Joining a run.

    def take(self, loader: Any, rank: int, world_size: int, device: torch.device) -> PrivateWindows:
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            raise _unknown_size(loader)
        known = (RandomSampler, SequentialSampler, DistributedSampler)
        if type(loader.batch_sampler) is not BatchSampler or type(loader.sampler) not in known:
            raise CompositionError(
                "the guarantee rests on how records are drawn, and this loader draws them in its own way",
                found=describe_loader(loader) + f" and a {type(loader.sampler).__name__}",
                allowed="a torch DataLoader over a map-style dataset, with batch_size, shuffled or not",
                remedy="Return such a DataLoader from train_dataloader; privacy.sampling then decides on the batches.",
            )
        self._loader, self.rank, self.world_size, self._device = loader, rank, world_size, device
        self._sampler = None
        size = _length(loader)
        if self.is_open and size != self.data_size:
            raise CompositionError(
                "the training data has changed its size during a private run",
                found=f"{size:,} records after {self.data_size:,}",
                allowed="the same records from the first step to the last",
                remedy="Return the same data from train_dataloader whenever it is asked.",
            )
        if not self.is_open:
            self.data_size = size
            self.base = min(int(loader.batch_size or 1) * world_size, size)
        return self

    def begin(self, epochs: int | None, scales_with_gradient: bool) -> Extent:
        engine = self._engine
        batch = self.data_size if engine.method.sampling == "full" else self.base
        self.base = batch
        self._steps_of_all = steps_per_epoch(batch, self.data_size)
        self.steps_in_epoch = engine.limited(self._steps_of_all)
        most = None if self._max_samples is None else max(1, self._max_samples // batch)
        steps = engine.begin(self.data_size, batch, self.steps_in_epoch, most)
        self.is_open = True
        return Extent(self.data_size, batch, steps * batch, scales_with_gradient)

    @property
    def batch_size(self) -> int:
        return self.base

    def close_window(self) -> None:
        self.steps += 1
        self._epoch_step += 1
        self.samples = self.steps * self.base

    # Loading.

    def __iter__(self) -> Iterator[Any]:
        if not self.is_open:
            return iter(())
        before, self._goes_on = self._goes_on, None
        self._epoch_step = before["epoch_step"] if before else 0
        own = torch.arange(self.rank, self.data_size, self.world_size)
        if self._engine.method.sampling == "shuffle":
            if before is None:
                self._order = self._engine.shuffled(len(own))
            else:
                self._order = before["order"]
                self._engine.order_is_new = False
        self._current = None
        self._drawn.clear()
        return self._counted(iter(self._reloaded(self._draw_epoch(own, self._epoch_step, self.steps))))

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._current = current = self._drawn.popleft()
            self.stand_in = None if current.size else batch
            yield batch if current.size else take(batch, [])

    def _draw_epoch(self, own: Tensor, first: int, step: int) -> Iterator[list[int]]:
        for place in range(first, self.steps_in_epoch):
            # Counted from the start, since workers load ahead of the steps that were made.
            chosen = own[self._choose(len(own), step + place - first, place)]
            expected = Portion(self._engine.expected(step + place - first))
            sizes = self._sizes(len(chosen))
            is_last = place + 1 == self.steps_in_epoch
            for i, (size, part) in enumerate(zip(sizes, chosen.split(sizes), strict=True)):
                closes = i + 1 == len(sizes)
                self._drawn.append(MicroBatch(expected, size, len(sizes), closes, closes and is_last))
                # A loader has no empty batches; of one record's, no sample is kept.
                yield part.tolist() if size else [self.rank % self.data_size]

    def _choose(self, count: int, step: int, place: int) -> Tensor:
        """Which of this rank's records a step has: a mask, or positions in a shuffled order."""
        if self._order is None:
            return self._engine.drawn(count, step)
        each = self.base // self.world_size
        # The last batch of an epoch has what is left: every record once.
        return self._order[place * each : None if place + 1 == self._steps_of_all else (place + 1) * each]

    def _sizes(self, count: int) -> list[int]:
        """As few micro-batches as fit, even in size, as many as the rank with the most needs."""
        most = self._engine.method.max_physical_batch or self._room()
        needed = max(1, math.ceil(count / most))
        if self.world_size > 1:
            agreed = torch.tensor(needed, device=self._device)
            torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MAX)
            needed = int(agreed)
        return [count // needed + (i < count % needed) for i in range(needed)]

    def _room(self) -> int:
        each = int(self._loader.batch_size or 1)
        return each + math.ceil(_DEVIATIONS * math.sqrt(each))

    # Saving.

    def position(self) -> dict[str, Any]:
        # The order of fixed batches amplifies nothing, and is no secret.
        cut = {"order": self._order, "base": self.base, "ranks": self.world_size}
        return {"samples": self.samples, "steps": self.steps, "epoch_step": self._epoch_step, **cut}

    def go_to(self, position: dict[str, Any], *, epoch_is_open: bool) -> None:
        self.samples, self.steps = position["samples"], position["steps"]
        self._goes_on = position if epoch_is_open and position["epoch_step"] else None
        cuts = [(position["base"], position["ranks"]), (self.base, self.world_size)]
        if self._goes_on and position["order"] is not None and cuts[0] != cuts[1]:
            (batch, ranks), (batch_now, ranks_now) = cuts
            raise CheckpointError(
                "an epoch of fixed batches cannot go on with others: a record could be in two of them",
                found=f"batches of {batch_now} on {ranks_now} ranks",
                allowed=f"batches of {batch} on {ranks} ranks, as the epoch began",
                remedy="Resume with the same data.batch_size and trainer.devices.",
            )


def _length(loader: DataLoader[Any]) -> int:
    try:
        return len(loader.dataset)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        raise _unknown_size(loader) from None


def _unknown_size(loader: Any) -> CompositionError:
    return CompositionError(
        "the privacy of a run depends on how many records there are, and this data does not say",
        found=describe_loader(loader),
        allowed="a torch DataLoader over a map-style dataset with a length",
        remedy="Return one from train_dataloader; a stream has to be stored, or at least indexed, first.",
    )
