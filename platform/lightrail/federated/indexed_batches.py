"""A client's batches cut from tensors in memory: the loader's own, without a look at each sample by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

__all__ = ["batches_of"]


def batches_of(loader: DataLoader[Any]) -> Iterator[Any]:
    """One pass over a loader: the same batches, from the same random numbers.

    Args:
        loader: Any; one over tensors in memory, with torch's own samplers, is passed over faster.

    Example:
        >>> loader = DataLoader(TensorDataset(torch.arange(5.0)), batch_size=2)
        >>> [batch[0].tolist() for batch in batches_of(loader)]
        [[0.0, 1.0], [2.0, 3.0], [4.0]]
    """
    # The loader draws a number as a pass begins, and its sampler one as it is first asked: in this order.
    passed = iter(loader)
    tensors = _tensors(loader)
    if tensors is None:
        return passed
    return _cut(loader, *tensors)


def _cut(loader: DataLoader[Any], tensors: list[Tensor], chosen: Tensor | None) -> Iterator[list[Tensor]]:
    size = loader.batch_size
    assert size is not None
    order = _whole_numbers(list(loader.sampler))
    for indices in (order if chosen is None else chosen[order]).split(size):
        if len(indices) == size or not loader.drop_last:
            yield [tensor.index_select(0, indices) for tensor in tensors]


def _tensors(loader: DataLoader[Any]) -> tuple[list[Tensor], Tensor | None] | None:
    """The tensors that samples are rows of, and which rows; ``None`` where the loader does more than to stack rows."""
    is_plain = (
        type(loader) is DataLoader
        and loader.num_workers == 0
        and not loader.pin_memory
        and loader.collate_fn is default_collate
        and type(loader.batch_sampler) is BatchSampler
        and loader.batch_size is not None
    )
    dataset: Any = loader.dataset
    chosen = None
    if type(dataset) is Subset:
        dataset, chosen = dataset.dataset, _whole_numbers(dataset.indices)
    if not is_plain or not _is_plain_order(loader.sampler) or type(dataset) is not TensorDataset:
        return None
    if any(each.is_sparse or not each.is_contiguous() or each.device.type != "cpu" for each in dataset.tensors):
        return None
    return list(dataset.tensors), chosen


def _whole_numbers(found: Any) -> Tensor:
    # A list of Python's numbers becomes an array of NumPy's ten times faster than a tensor.
    return torch.from_numpy(np.asarray(found, dtype=np.int64))


def _is_plain_order(sampler: Any) -> bool:
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.generator is None
    return type(sampler) is SequentialSampler
