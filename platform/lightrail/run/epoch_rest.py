"""The rest of an epoch that another number of processes began: every sample that is left, and none twice.

Each process of a run has an order of its own, so the place of one in its order says nothing to a different number of
them. What was seen is found again from the orders in which the epoch began; the rest is shared anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lightrail.run.windows import loader_like
from lightrail.step.randomness import RandomState

__all__ = ["loader_of", "order_of", "rest_of"]


def order_of(loader: Any) -> dict[str, Any] | None:
    """What tells another process which samples each of a loader's batches has; ``None`` where nothing does.

    Args:
        loader: The training loader of this rank.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    sampler: Any = loader.sampler
    if type(loader.batch_sampler) is not BatchSampler:
        return None
    found = {"samples": len(loader.dataset), "batch_size": loader.batch_size}  # type: ignore[arg-type]
    if type(sampler) is DistributedSampler:
        options = {name: getattr(sampler, name) for name in ("seed", "shuffle", "drop_last")}
        return {**found, "kind": "distributed", "epoch": sampler.epoch, "options": options}
    if type(sampler) is SequentialSampler:
        return {**found, "kind": "sequential"}
    is_plain = type(sampler) is RandomSampler and sampler.generator is None and not sampler.replacement
    return {**found, "kind": "random"} if is_plain and len(sampler) == found["samples"] else None


def rest_of(positions: Sequence[Mapping[str, Any]], batches: int, rank: int, world_size: int) -> Tensor | None:
    """The samples that are left of an epoch, for one rank; ``None`` where nobody can tell.

    Args:
        positions: Of each rank of the run that was saved.
        batches: How many batches of the epoch each of them had trained on.
        rank: Of this process.
        world_size: How many share the rest; each gets as many, so that the last ones may be given twice.
    """
    left = _left(positions, batches)
    if left is None:
        return None
    if len(left) % world_size:
        left = torch.cat([left, left[: world_size - len(left) % world_size]])
    return left[rank::world_size]


def _left(positions: Sequence[Mapping[str, Any]], batches: int) -> Tensor | None:
    order = positions[0].get("order")
    if order is None:
        return None
    size = order["batch_size"]
    if positions[0].get("rest") is not None:
        rests = [each["rest"] for each in positions]
        # As they were shared: one of each rank in turn.
        kept = [rest["indices"][(batches - rest["first"]) * size :] for rest in rests]
        return torch.stack(kept, 1).flatten().unique()
    seen = _seen(order, positions, batches * size)
    if seen is None:
        return None
    is_left = torch.ones(order["samples"], dtype=torch.bool)
    is_left[seen] = False
    left = is_left.nonzero().flatten()
    is_shuffled = order["kind"] == "random" or order.get("options", {}).get("shuffle", False)
    # Every rank draws the same order, from what the checkpoint itself says.
    generator = torch.Generator().manual_seed(batches + order["samples"])
    return left[torch.randperm(len(left), generator=generator)] if is_shuffled else left


def _seen(order: Mapping[str, Any], positions: Sequence[Mapping[str, Any]], done: int) -> Tensor | None:
    """The samples of the first ``done`` places of every rank's order."""
    if order["kind"] == "distributed":
        found = []
        for rank in range(len(positions)):
            sampler = DistributedSampler(range(order["samples"]), len(positions), rank, **order["options"])  # type: ignore[arg-type]
            sampler.set_epoch(order["epoch"])
            found += list(sampler)[:done]
        return torch.tensor(found, dtype=torch.int64)
    if len(positions) > 1:
        return None  # each of them had all the data, in an order of its own
    if order["kind"] == "sequential":
        return torch.arange(min(done, order["samples"]))
    state = positions[0]["random_at_start"]
    if state is None:
        return None
    with RandomState.kept():
        RandomState.from_state_dict(state).restore()
        rows: Any = iter(DataLoader(range(order["samples"]), order["batch_size"], shuffle=True))  # type: ignore[arg-type]
        drawn = [index for _ in range(done // order["batch_size"]) for index in rows._next_index()]
    return torch.tensor(drawn, dtype=torch.int64)


def loader_of(loader: DataLoader[Any], indices: Tensor) -> DataLoader[Any]:
    """A loader like another, of some samples in a given order."""
    return loader_like(loader, batch_size=loader.batch_size, sampler=indices.tolist(), drop_last=loader.drop_last)
