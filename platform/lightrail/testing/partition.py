"""Conformance of partitions: every client has samples, and no sample has two clients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch.utils.data import TensorDataset

from lightrail.errors import UserError
from lightrail.federated.partition import Partition, Samples
from lightrail.testing.building import built, check_is_documented, refuses_unknown_options
from lightrail.testing.suite import Check, NonConformance, NotApplicable, Suite, known_exceptions, name_of, require

__all__ = ["PartitionSuite"]

Options = Mapping[str, Any]
COUNTS = (1, 2, 3, 7)
SIZE = 120


def _rows(count: int) -> TensorDataset:
    """A tensor, one of five labels and one of eight places of origin."""
    return TensorDataset(torch.zeros(count, 2), torch.arange(count) % 5, torch.arange(count) * 8 // count)


def _samples(count: int = SIZE) -> Samples:
    return Samples(_rows(count), lambda **changes: _rows(10))


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _divided(plugin: Any, options: Options) -> Iterator[tuple[int, Any]]:
    """The numbers of clients that it does not refuse, and what it gives them."""
    if plugin.divide is Partition.divide:
        raise NotApplicable("its clients have sources of their own")
    made = 0
    for clients in COUNTS:
        try:
            found = built(plugin, options).divide(_samples(), clients, _generator())
        except UserError:
            continue
        made += 1
        yield clients, found
    require(made, f"it refuses to divide {SIZE} samples among {COUNTS} clients")


def check_builds_from_options(plugin: Any, options: Options) -> None:
    """``plugin(**options)`` is a partition that overrides divide or datasets."""
    partition = built(plugin, options)
    require(isinstance(partition, Partition), f"it is no Partition but {type(partition).__name__}")
    overrides = plugin.divide is not Partition.divide or plugin.datasets is not Partition.datasets
    require(overrides, "it overrides neither divide nor datasets")


def check_rejects_unknown_options(plugin: Any, options: Options) -> None:
    """An option that the signature lacks is an error."""
    built(plugin, options)
    refuses_unknown_options(plugin, options)


def check_gives_each_sample_to_one_client(plugin: Any, options: Options) -> None:
    """As many parts as clients, of indices in int64; none is empty, and no sample is in two."""
    for clients, found in _divided(plugin, options):
        require(len(found) == clients, f"{clients} clients get {len(found)} parts")
        for part in found:
            require(part.dtype == torch.int64 and part.ndim == 1, f"a part is {part.dtype} {list(part.shape)}")
            require(len(part), f"of {clients} clients one has no samples")
        joined = torch.cat(list(found))
        require(int(joined.min()) >= 0 and int(joined.max()) < SIZE, "an index is beyond the samples")
        require(len(joined.unique()) == len(joined), "a sample is given to two clients, or twice to one")


def check_builds_sources(plugin: Any, options: Options) -> None:
    """Where clients have sources of their own, each has a dataset that is not empty."""
    if plugin.datasets is Partition.datasets:
        raise NotApplicable("its clients share one dataset")
    made = 0
    for clients in COUNTS:
        try:
            found = built(plugin, options).datasets(_samples(), clients, _generator())
        except UserError:
            continue
        made += 1
        require(found is None or len(found) == clients, f"{clients} clients get other than {clients} datasets")
        require(all(len(each) for each in found or ()), "a client has no samples")
    require(made, f"it refuses to build sources for {COUNTS} clients")


def check_draws_from_its_generator(plugin: Any, options: Options) -> None:
    """The same generator divides alike, and torch's own is left alone."""
    state = torch.get_rng_state()
    for (_, first), (_, second) in zip(_divided(plugin, options), _divided(plugin, options), strict=True):
        require(all(map(torch.equal, first, second)), "the same generator divides otherwise")
    require(torch.equal(torch.get_rng_state(), state), "it draws from torch's own generator")


def check_refuses_more_clients_than_samples(plugin: Any, options: Options) -> None:
    """Three samples for four clients are refused by an error for the user."""
    if plugin.divide is Partition.divide:
        raise NotApplicable("its clients have sources of their own")
    try:
        built(plugin, options).divide(_samples(3), 4, _generator())
    except UserError:
        return
    raise NonConformance("it divides three samples among four clients")


CHECKS: tuple[Check, ...] = (
    check_is_documented,
    check_builds_from_options,
    check_rejects_unknown_options,
    check_gives_each_sample_to_one_client,
    check_builds_sources,
    check_draws_from_its_generator,
    check_refuses_more_clients_than_samples,
)


class PartitionSuite(Suite):
    """Every check of a partition."""

    kind: ClassVar[str] = "partition"
    checks: ClassVar[tuple[Check, ...]] = (*CHECKS, known_exceptions(frozenset(map(name_of, CHECKS))))
