"""The training data cut into windows of changing size: what a batching decides, as Lightning's loops need it."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lightrail.errors import CompositionError
from lightrail.run.worker_signals import shielded
from lightrail.step.batches import leading_size
from lightrail.step.batching import Batching, Extent, Portion
from lightrail.step.randomness import RandomState

__all__ = ["MicroBatch", "Windows", "describe_loader", "loader_like"]

_ON_A_PROCESSOR = 8  # times data.batch_size at once: nobody can be asked how much memory is left
_KEPT_FREE = 0.1  # of an accelerator's memory
_JOINED = 0.25  # a rest of less than this share of a step joins the last one: a few samples make a wild gradient


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch that was drawn: its portion, how many its window has, whether it ends window and epoch."""

    portion: Portion
    size: int
    count: int
    closes_window: bool
    closes_epoch: bool


class Windows:
    """Loads micro-batch after micro-batch, and says which belong to one step.

    It is an iterable without a length: how many batches an epoch has is known when it is over. Lightning's loops ask
    it where a window closes; schedules and progress ask it how many samples were seen.

    Args:
        batching: Who decides.
        total_samples: Where the run ends; ``None`` where epochs or steps alone decide.
    """

    def __init__(self, batching: Batching, total_samples: int | None = None) -> None:
        self.batching = batching
        self.total_samples = total_samples
        self.samples = 0
        self.steps = 0
        self.rank, self.world_size = 0, 1
        self.is_secret = False  # whether no checkpoint may hold the random numbers that batches and masks come from
        self.counts_steps = False  # where a number of steps is the horizon, rather than of samples
        self.is_open = False  # Lightning draws a batch when it sets up the data, before anything can be decided
        self.end = math.inf  # in samples
        self.before_step: Callable[[], None] | None = None
        self._current: MicroBatch | None = None
        self._planned: deque[MicroBatch] = deque()  # decided, and not yet asked of the data
        self._drawn: deque[MicroBatch] = deque()  # asked of the data, and not yet trained on
        self._done_in_epoch = 0  # samples of this rank whose step is made
        self._open_in_epoch = 0  # those of the window that is under way
        self._epoch_began: RandomState | None = None
        self._resumed: dict[str, Any] | None = None
        self._most_at_once: int | None = None
        self._device = torch.device("cpu")

    # Joining a run.

    def take(self, loader: Any, rank: int, world_size: int, device: torch.device) -> Windows:
        """Takes the place of the loader of the training data.

        Args:
            loader: The loader.
            rank: Of this process.
            world_size: How many there are.
            device: Where this rank trains: whose memory decides what is evaluated at once.

        Raises:
            CompositionError: Its samples cannot be chosen one by one.
        """
        plain = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
        if not plain or type(loader.batch_sampler) is not BatchSampler:
            raise CompositionError(
                "a batching needs to choose which samples make a batch, and this loader does not let it",
                found=describe_loader(loader),
                allowed="a torch DataLoader over a map-style dataset, with batch_size and without a batch_sampler",
                remedy="Leave batching out, or return such a DataLoader from train_dataloader.",
            )
        self._loader, self.rank, self.world_size, self._device = loader, rank, world_size, device
        sampler: Any = loader.sampler
        if world_size > 1 and isinstance(sampler, RandomSampler | SequentialSampler):
            # Seeded as Lightning seeds its own: by the run.
            seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
            shuffles = isinstance(sampler, RandomSampler)
            sampler = DistributedSampler(loader.dataset, world_size, rank, shuffle=shuffles, seed=seed)
        self._sampler = sampler
        self.data_size = len(sampler) * world_size
        self.base = int(loader.batch_size or 1) * world_size
        return self

    def begin(self, epochs: int | None, scales_with_gradient: bool) -> Extent:
        """Tells the batching what it works with.

        Args:
            epochs: Until the horizon; ``None`` where only a number of steps is given.
            scales_with_gradient: Of the optimizer.
        """
        by_epochs = None if epochs is None else epochs * self.data_size
        bounds = [bound for bound in (by_epochs, self.total_samples) if bound is not None]
        self.counts_steps = not bounds
        self.end = min(bounds, default=math.inf)
        self.is_open = True
        extent = Extent(self.data_size, self.base, min(bounds) if bounds else None, scales_with_gradient)
        self.batching.begin(extent)
        return extent

    # What the loops ask.

    @property
    def count(self) -> int:
        """Micro-batches in the current window."""
        return self._current.count if self._current else 1

    @property
    def portion(self) -> Portion | None:
        """The data of the current step, as it was decided."""
        return self._current.portion if self._current else None

    @property
    def batch_size(self) -> int:
        """Samples of the current step, over all ranks."""
        return self._current.size * self._current.count * self.world_size if self._current else self.base

    @property
    def window_is_closed(self) -> bool:
        """Whether the newest micro-batch is the last of its window."""
        return self._current is not None and self._current.closes_window

    @property
    def epoch_is_over(self) -> bool:
        """Whether the newest micro-batch is the last of its epoch."""
        return self._current is not None and self._current.closes_epoch

    @property
    def is_done(self) -> bool:
        """Whether the horizon in samples is reached."""
        return self.total_samples is not None and self.samples >= self.total_samples

    def close_window(self) -> None:
        """The step of the current window is made."""
        self._done_in_epoch += self._open_in_epoch
        self.samples += self._open_in_epoch * self.world_size
        self._open_in_epoch = 0
        self.steps += 1

    # Loading.

    @property
    def sampler(self) -> Any:
        """Where the order of the samples comes from; Lightning looks for it here to tell it the epoch."""
        return self._sampler

    def __iter__(self) -> Iterator[Any]:
        if not self.is_open:
            return iter(())
        resumed, self._resumed = self._resumed, None
        outside = RandomState.capture()
        if resumed is not None:
            RandomState.from_state_dict(resumed["random"]).restore()
        self._epoch_began = RandomState.capture()
        order = torch.tensor(list(self._sampler), dtype=torch.int64)
        self._done_in_epoch = resumed["done"] if resumed else 0
        self._open_in_epoch = 0
        self._current = None
        self._drawn.clear()
        self._planned = deque(_micro_batch(*each) for each in resumed["decided"]) if resumed else deque()
        iterator = iter(self._reloaded(self._draw(order, self._done_in_epoch)))
        if resumed is not None:
            outside.restore()  # all of this was drawn before the run was stopped
        return self._counted(iterator)

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._current = current = self._drawn.popleft()
            self._open_in_epoch += leading_size(batch) or current.size
            self._measure_memory(current.size)
            yield batch if current.portion.shape is None else self.batching.reshape(batch, current.portion.shape)

    def _reloaded(self, indices: Iterator[list[int]]) -> DataLoader[Any]:
        return loader_like(self._loader, batch_sampler=_Once(indices))

    def _draw(self, order: torch.Tensor, start: int) -> Iterator[list[int]]:
        """Index lists, one a micro-batch; each is noted down, since workers draw ahead of the training."""
        position, samples, step = start, self.samples, self.steps
        is_over = False
        while position < len(order) and not is_over:
            if not self._planned:
                self._planned.extend(self._cut(self.batching.next(samples, step), len(order) - position, samples))
            each = self._planned.popleft()
            self._drawn.append(each)
            yield order[position : position + each.size].tolist()
            position += each.size
            samples += each.size * self.world_size
            step += each.closes_window
            is_over = each.closes_epoch

    def _cut(self, portion: Portion, left: int, samples: int) -> list[MicroBatch]:
        """The micro-batches of one step: as few as fit, of one size; at the end of an epoch, what is left."""
        own = math.ceil(max(portion.samples, 1) / self.world_size)
        if self.total_samples is not None:
            own = min(own, max(1, math.ceil((self.total_samples - samples) / self.world_size)))
        if own >= left or left - own < own * _JOINED:
            own = left
        count = math.ceil(own / min(own, self._at_once()))
        size = math.ceil(own / count)
        sizes = [size] * count if size * count <= left else _evenly(own, count)
        last = count - 1
        is_rest = sum(sizes) == left
        return [MicroBatch(portion, each, count, i == last, is_rest and i == last) for i, each in enumerate(sizes)]

    # Memory.

    def _at_once(self) -> int:
        if self.batching.micro_batch is not None:
            return self.batching.micro_batch
        own = self.base // self.world_size
        if self._device.type != "cuda":
            return _ON_A_PROCESSOR * own
        most = self._most_at_once or own
        if self.world_size > 1:
            # Ranks whose windows had different numbers of micro-batches would wait for each other for ever.
            agreed = torch.tensor(most, device=self._device)
            torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MIN)
            most = int(agreed)
        return most

    def _measure_memory(self, size: int) -> None:
        """How many samples an accelerator would hold, from what those so far have taken."""
        device = self._device
        if self.batching.micro_batch is not None or device.type != "cuda":
            return
        free, total = torch.cuda.mem_get_info(device)
        standing, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        if peak > standing and self.steps:
            room = free + torch.cuda.memory_reserved(device) - standing - _KEPT_FREE * total
            self._most_at_once = max(self.base // self.world_size, int(room / ((peak - standing) / size)))
        torch.cuda.reset_peak_memory_stats(device)

    # Saving.

    def position(self) -> dict[str, Any]:
        """Where this rank is: what :meth:`go_to` takes."""
        began = self._epoch_began
        return {
            "random": None if began is None else began.state_dict(),
            "done": self._done_in_epoch,
            # What workers have drawn already was decided by sizes that may have changed since.
            "decided": [_plain(each) for each in (*self._drawn, *self._planned)],
            "batching": self.batching.state_dict(),
            "samples": self.samples,
            "steps": self.steps,
        }

    def go_to(self, position: dict[str, Any], *, epoch_is_open: bool) -> None:
        """Goes on from a position, with the next pass over the loader."""
        self.samples, self.steps = position["samples"], position["steps"]
        self.batching.load_state_dict(position["batching"])
        self._resumed = position if epoch_is_open and position["random"] is not None else None


class _Once:
    """Index lists for one pass of a loader."""

    def __init__(self, indices: Iterator[list[int]]) -> None:
        self._indices = indices

    def __iter__(self) -> Iterator[list[int]]:
        return self._indices


def _evenly(total: int, count: int) -> list[int]:
    return [total // count + (index < total % count) for index in range(count)]


def _plain(each: MicroBatch) -> list[Any]:
    portion, *rest = astuple(each)
    return [list(portion), *rest]


def _micro_batch(portion: Sequence[Any], *rest: Any) -> MicroBatch:
    samples, shape, lr_factor = portion
    return MicroBatch(Portion(samples, None if shape is None else tuple(shape), lr_factor), *rest)


def loader_like(loader: DataLoader[Any], **batches: Any) -> DataLoader[Any]:
    """A loader of the same data, by the same workers, in other batches.

    Args:
        loader: The loader.
        batches: What torch's ``DataLoader`` takes that says which samples make a batch.
    """
    workers: dict[str, Any] = {}
    if loader.num_workers:
        workers = {
            "prefetch_factor": loader.prefetch_factor,
            "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": loader.multiprocessing_context,
        }
    made: DataLoader[Any] = DataLoader(
        loader.dataset,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        **batches,
        **workers,
    )
    return shielded(made)


def describe_loader(loader: Any) -> str:
    """What a loader is, for an error."""
    if not isinstance(loader, DataLoader):
        return f"a {type(loader).__name__}"
    if isinstance(loader.dataset, IterableDataset):
        return f"an iterable dataset, {type(loader.dataset).__name__}"
    return f"a DataLoader with {type(loader.batch_sampler).__name__ if loader.batch_sampler else 'no batch size'}"
