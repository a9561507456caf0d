"""State over shards: gathered into what one process would hold, and cut again when it is loaded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightrail.step.sharded import are_sharded, is_shard, shard_of, whole_of

__all__ = ["load_optimizer_state", "load_weights", "map_shards", "whole_tree"]


def map_shards(tree: Any, change: Callable[[str, Any], Any], name: str = "") -> Any:
    """A copy of nested dictionaries, lists and tuples in which every sharded tensor is changed.

    Args:
        tree: A checkpoint, or a part of one.
        change: Called with the name and the value of each of them, in the same order on all ranks.
        name: Of the tree, where it is a part.
    """
    if is_shard(tree):
        return change(name, tree)
    if isinstance(tree, Mapping):
        changed = {key: map_shards(value, change, f"{name}.{key}" if name else str(key)) for key, value in tree.items()}
        return _as(tree, changed)
    if type(tree) in (list, tuple):
        return type(tree)(map_shards(value, change, f"{name}.{index}") for index, value in enumerate(tree))
    return tree


def _as(mapping: Mapping[str, Any], changed: dict[str, Any]) -> Any:
    if type(mapping) is not OrderedDict:
        return changed
    ordered = OrderedDict(changed)
    if hasattr(mapping, "_metadata"):  # the versions of the modules, in what their `state_dict` gives
        ordered._metadata = mapping._metadata  # type: ignore[attr-defined]
    return ordered


def whole_tree(tree: Any, *, keep: bool) -> Any:
    """The same with its sharded tensors whole, on the processor; all ranks must ask.

    Args:
        tree: A checkpoint, or a part of one.
        keep: Whether this rank needs them; the others only take part.
    """

    def gather(_name: str, shard: Tensor) -> Any:
        whole = whole_of(shard.detach())
        return whole.cpu() if keep else None

    return map_shards(tree, gather)


def load_weights(module: nn.Module, state: Mapping[str, Any], *, strict: bool = True) -> None:
    """Loads whole weights into a module, sharded or not.

    Args:
        module: Any module.
        state: What its ``state_dict`` gave, in this process or in another, of any number of ranks.
        strict: As in ``load_state_dict``.
    """
    own = module.state_dict(keep_vars=True)
    if not any(map(is_shard, own.values())):
        module.load_state_dict(state, strict=strict)
        return
    shards = {key: _like(value, own.get(key)) for key, value in state.items()}
    module.load_state_dict(_as(state, shards), strict=strict)


def _like(value: Any, own: Any) -> Any:
    if not is_shard(own) or not isinstance(value, Tensor) or value.shape != own.shape:
        return value  # a shape that does not fit is load_state_dict's to refuse
    if is_shard(value):
        return value.redistribute(own.device_mesh, own.placements)  # type: ignore[attr-defined]
    return shard_of(value.to(own.device), own)


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Loads the state of one process into an optimizer, over shards or not.

    Args:
        optimizer: Any optimizer; where its parameters are shards, so is what it keeps in their shapes.
        state: What its ``state_dict`` gave, in this process or in another, of any number of ranks.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not are_sharded(params):
        optimizer.load_state_dict(dict(state))
        return
    optimizer.load_state_dict(_cut(state, params))


def _cut(tree: Any, params: Sequence[Tensor]) -> Any:
    """State by parameter: a dictionary by its number among ``params``, or a list that has one entry for each."""
    if isinstance(tree, Mapping):
        if tree and all(isinstance(key, int) and 0 <= key < len(params) for key in tree):
            return {key: _cut_of(value, params[key]) for key, value in tree.items()}
        return {key: _cut(value, params) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        fits = len(tree) == len(params) and all(
            isinstance(value, Tensor) and value.shape == p.shape for value, p in zip(tree, params, strict=True)
        )
        if fits:
            return type(tree)(_cut_of(value, p) for value, p in zip(tree, params, strict=True))
        return type(tree)(_cut(value, params) for value in tree)
    return tree


def _cut_of(value: Any, p: Tensor) -> Any:
    if isinstance(value, Tensor):
        return _like(value, p)
    if isinstance(value, Mapping):
        return {key: _cut_of(each, p) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_cut_of(each, p) for each in value)
    return value
