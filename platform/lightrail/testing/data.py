"""Conformance of data: LightningDataModules that say their dimensions before they load."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightrail.testing.building import accepts, check_is_documented, missing_options, refuses_unknown_options
from lightrail.testing.suite import Check, NotApplicable, Suite, known_exceptions, name_of, require

__all__ = ["DataSuite", "build_data", "ready_data"]

Options = Mapping[str, Any]
FEW = 4


def build_data(plugin: Any, options: Options) -> Any:
    """The data module; not applicable where it reads something that the example cannot bring along."""
    missing = missing_options(plugin, options, given=0)
    if missing:
        raise NotApplicable(
            f"it reads the user's own data: {', '.join(missing)} has no default and traits.example gives none"
        )
    return plugin(**options)


def ready_data(plugin: Any, options: Options) -> Any:
    """The data module, loaded for training and for test."""
    torch.manual_seed(3)
    data = build_data(plugin, options)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    return data


def _leaves(batch: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]


def _few(loader: Any) -> list[list[Tensor]]:
    return [_leaves(batch) for batch in itertools.islice(loader, FEW)]


def _same(first: list[list[Tensor]], second: list[list[Tensor]]) -> bool:
    return len(first) == len(second) and all(
        len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        for a, b in zip(first, second, strict=True)
    )


def check_builds_from_options(plugin: Any, options: Options) -> None:
    """``plugin(**options)`` is a LightningDataModule with the option ``batch_size``."""
    from lightning.pytorch import LightningDataModule

    require(issubclass(plugin, LightningDataModule), "it is no LightningDataModule")
    require(accepts(plugin, "batch_size"), "its signature has no 'batch_size'")
    build_data(plugin, options)


def check_rejects_unknown_options(plugin: Any, options: Options) -> None:
    """An option that the signature lacks is an error."""
    build_data(plugin, options)
    refuses_unknown_options(plugin, options)


def check_gives_its_dimensions(plugin: Any, options: Options) -> None:
    """``dimensions()`` answers before ``setup`` with named whole numbers of at least one."""
    dimensions = build_data(plugin, options).dimensions()
    require(isinstance(dimensions, Mapping) and dimensions, f"dimensions() gives {dimensions!r}")
    for name, size in dimensions.items():
        require(isinstance(name, str) and name.isidentifier(), f"dimensions() has the name {name!r}")
        require(type(size) is int and size >= 1, f"dimensions() gives {name}={size!r}")


def check_has_the_dimensions_that_it_gives(plugin: Any, options: Options) -> None:
    """The batches have the sizes that ``dimensions()`` names."""
    data = ready_data(plugin, options)
    sizes = data.dimensions()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for leaves in _few(loader):
            _require_sizes(sizes, leaves[0], leaves[-1])


def _require_sizes(sizes: Mapping[str, int], inputs: Tensor, targets: Tensor) -> None:
    found: dict[str, int] = {}
    if inputs.dim() == 4:
        found |= {"in_channels": inputs.shape[1], "image_size": inputs.shape[-1]}
    if inputs.is_floating_point():
        found["in_features"] = inputs[0].numel()
    else:
        found["context"] = inputs.shape[1]
        require(_within(inputs, sizes.get("vocab_size")), "an input token is not below vocab_size")
    if targets.is_floating_point():
        found["out_features"] = targets.shape[1] if targets.dim() > 1 else 1
    else:
        require(_within(targets, sizes.get("vocab_size", sizes.get("num_classes"))), "a target is not below its size")
    for name, size in found.items():
        require(sizes.get(name, size) == size, f"dimensions() gives {name}={sizes.get(name)}, the batches have {size}")


def _within(values: Tensor, size: int | None) -> bool:
    return size is None or (int(values.min()) >= 0 and int(values.max()) < size)


def check_yields_batches(plugin: Any, options: Options) -> None:
    """Training, validation and test have batches, the first of at most ``batch_size`` samples, all as long."""
    data = ready_data(plugin, options)
    for name in ("train", "val", "test"):
        batches = _few(getattr(data, f"{name}_dataloader")())
        require(batches and batches[0], f"{name}_dataloader() yields no batch of tensors")
        for leaves in batches:
            require(len({len(leaf) for leaf in leaves}) == 1, f"tensors of one {name} batch differ in length")
            require(len(leaves[0]) <= data.batch_size, f"a {name} batch has more samples than batch_size")
        values = [leaf for leaves in batches for leaf in leaves if leaf.is_floating_point()]
        require(all(bool(value.isfinite().all()) for value in values), f"a {name} batch is not finite")


def check_honours_batch_size(plugin: Any, options: Options) -> None:
    """``batch_size=3`` gives training batches of three."""
    data = ready_data(plugin, {**options, "batch_size": 3})
    found = len(_few(data.train_dataloader())[0][0])
    require(found == 3, f"batch_size=3 gives a batch of {found}")


def check_keeps_the_order_of_validation(plugin: Any, options: Options) -> None:
    """Validation and test come in the same order every time, from every instance, whatever the seed."""
    first = ready_data(plugin, options)
    second = ready_data(plugin, options)
    for name in ("val_dataloader", "test_dataloader"):
        passes = []
        for seed, data in enumerate((first, first, second)):
            torch.manual_seed(seed)
            passes.append(_few(getattr(data, name)()))
        require(_same(passes[0], passes[1]), f"two passes over {name}() differ")
        require(_same(passes[0], passes[2]), f"{name}() of two instances differ")


def check_shuffles_training(plugin: Any, options: Options) -> None:
    """Two epochs of training come in different orders; the same seed gives the same first epoch."""
    data = ready_data(plugin, options)
    loader = data.train_dataloader()
    if len(loader) * data.batch_size < 8:
        raise NotApplicable("there are too few samples to tell an order")
    torch.manual_seed(1)
    epochs = [_few(loader), _few(loader)]
    require(not _same(*epochs), "two epochs begin with the same batches in the same order")
    torch.manual_seed(1)
    again = _few(ready_data(plugin, options).train_dataloader())
    torch.manual_seed(1)
    require(_same(again, _few(ready_data(plugin, options).train_dataloader())), "one seed gives two orders of training")


CHECKS: tuple[Check, ...] = (
    check_is_documented,
    check_builds_from_options,
    check_rejects_unknown_options,
    check_gives_its_dimensions,
    check_has_the_dimensions_that_it_gives,
    check_yields_batches,
    check_honours_batch_size,
    check_keeps_the_order_of_validation,
    check_shuffles_training,
)


class DataSuite(Suite):
    """Every check of data.

    Data that read the user's files are checked by a subclass that writes such files and gives their path in
    ``options``.
    """

    kind: ClassVar[str] = "data"
    checks: ClassVar[tuple[Check, ...]] = (*CHECKS, known_exceptions(frozenset(map(name_of, CHECKS))))
