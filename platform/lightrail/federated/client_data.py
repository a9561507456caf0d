"""The training data of a federated run, divided among its clients."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, Subset

from lightrail.errors import CompositionError, DataError
from lightrail.federated.method import FederatedMethod
from lightrail.federated.partition import Samples
from lightrail.federated.randomness import generator_for
from lightrail.run.windows import describe_loader
from lightrail.run.worker_signals import shielded

__all__ = ["ClientData"]


class ClientData:
    """The training data, divided.

    Args:
        loader: The run's own training loader.
        method: Says how the data is divided.
        seed: Of the run.
        rebuild: Makes the training dataset with other options of the data plugin.

    Raises:
        CompositionError: The data cannot be divided so.
    """

    def __init__(self, loader: Any, method: FederatedMethod, seed: int, rebuild: Any = None) -> None:
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or not loader.batch_size:
            raise CompositionError(
                "the training data cannot be divided among clients, since its samples cannot be chosen one by one",
                found=describe_loader(loader),
                allowed="a torch DataLoader over a map-style dataset, with batch_size",
                remedy="Return such a DataLoader from train_dataloader, or use federated.partition=sources.",
            )
        self._loader = loader
        self._method, self._seed = method, seed
        self.samples = Samples(loader.dataset, rebuild)

    @cached_property
    def datasets(self) -> list[Dataset[Any]]:
        """The samples of each client."""
        partition, clients = self._method.partition, self._method.clients
        assert partition is not None
        found = partition.datasets(self.samples, clients, generator_for(self._seed, "partition"))
        datasets = [Subset(self.samples.dataset, each.tolist()) for each in self.indices] if found is None else found
        for number, each in enumerate(datasets):
            if len(each) == 0:  # type: ignore[arg-type]
                raise _empty(number)
        return list(datasets)

    @cached_property
    def indices(self) -> list[Tensor]:
        """Which samples each client has."""
        count, clients = len(self.samples), self._method.clients
        if count < clients:
            raise CompositionError(
                "there are more clients than samples",
                found=f"{clients} clients, {count} samples",
                allowed=f"at most {count} clients",
                remedy="Set federated.clients (or federated.nodes) to fewer.",
            )
        assert self._method.partition is not None
        indices = self._method.partition.divide(self.samples, clients, generator_for(self._seed, "partition"))
        joined = torch.cat(indices) if indices else torch.zeros(0, dtype=torch.int64)
        if len(indices) != clients or len(joined.unique()) != len(joined):
            raise DataError(
                "the partition gives a sample to two clients, or has another number of clients",
                found=f"{len(indices)} clients, {len(joined) - len(joined.unique())} samples given twice",
                allowed=f"{clients} disjoint parts",
                remedy="Choose another partition, or mend its divide().",
            )
        empty = next((number for number, each in enumerate(indices) if len(each) == 0), None)
        if empty is not None:
            raise _empty(empty)
        return indices

    @property
    def sizes(self) -> list[int]:
        """How many samples each client has."""
        return [len(each) for each in self.datasets]  # type: ignore[arg-type]

    def counts(self) -> list[dict[str, int]]:
        """How many samples each client has, by label where labels are known without a look at every sample."""
        labels = self.samples.known_labels
        if labels is None or not all(isinstance(each, Subset) for each in self.datasets):
            return [{"samples": size} for size in self.sizes]
        found = []
        for each in self.indices:
            values, counts = labels[each].unique(return_counts=True)
            found.append({str(v): n for v, n in zip(values.tolist(), counts.tolist(), strict=True)})
        return found

    def loader(self, client: int, *, shuffled: bool) -> DataLoader[Any]:
        """The samples of one client, as the run's own loader would give them.

        Args:
            client: Its number.
            shuffled: As the run's training does, or all of them in order.
        """
        own = self._loader
        has_order = shuffled and not isinstance(own.sampler, SequentialSampler)
        dataset = self.datasets[client]
        made: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=own.batch_size,
            sampler=RandomSampler(dataset) if has_order else None,  # type: ignore[arg-type]
            collate_fn=own.collate_fn,
            # A client with less than a batch would have nothing.
            drop_last=shuffled and own.drop_last and len(dataset) >= (own.batch_size or 1),  # type: ignore[arg-type]
            pin_memory=own.pin_memory,
            num_workers=own.num_workers,
            worker_init_fn=own.worker_init_fn,
            multiprocessing_context=own.multiprocessing_context,
        )
        return shielded(made)

    def batch(self, client: int, index: int) -> Any:
        """One of a client's batches without end; each pass over its samples has an order of its own.

        Args:
            client: Its number.
            index: From 0.
        """
        own, dataset = self._loader, self.datasets[client]
        size, count = int(own.batch_size or 1), len(dataset)  # type: ignore[arg-type]
        passed, place = divmod(index, max(1, count // size))
        order = torch.arange(count)
        if not isinstance(own.sampler, SequentialSampler):
            order = torch.randperm(count, generator=generator_for(self._seed, "pass", client, passed))
        # Every batch of a node is whole; what is left of a pass has its chance in the next.
        chosen = order[place * size : (place + 1) * size].tolist()
        fetch: Any = getattr(dataset, "__getitems__", None)
        samples: Any = fetch(chosen) if callable(fetch) else [dataset[i] for i in chosen]
        return own.collate_fn(samples)


def _empty(number: int) -> CompositionError:
    return CompositionError(
        f"client {number} has no samples",
        found="an empty part",
        allowed="at least one sample a client",
        remedy="Ask for fewer clients, or a less uneven partition (a greater federated.partition.alpha).",
    )
