"""Parameters that are sharded over ranks (FSDP2): whole where samples meet them, in shards where they are updated."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightrail.errors import CompositionError

__all__ = [
    "are_sharded",
    "copy_tensors",
    "gathered",
    "gradients_left_alone",
    "is_shard",
    "local_of",
    "shard_of",
    "whole_of",
    "whole_parameters",
]


def is_shard(tensor: object) -> bool:
    """Whether a tensor is one rank's part of a whole one."""
    # Without torch's sharded tensors imported there can be none, and importing them only to find none is slow.
    sharded = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    return isinstance(tensor, sharded)


def are_sharded(params: Sequence[Tensor]) -> bool:
    """Whether parameters are shards of whole ones.

    Args:
        params: Those of an optimizer.
    """
    return any(map(is_shard, params))


def local_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this rank holds of each, sharing its memory: for what treats every element by itself."""
    return [each.to_local() if is_shard(each) else each for each in tensors]  # type: ignore[attr-defined]


def copy_tensors(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies one list of tensors into another in place; shards into shards of the same kind.

    Args:
        targets: What is written.
        sources: In the same shapes.
    """
    if are_sharded(targets):
        targets = local_of(targets)
        sources = local_of(sources)
    torch._foreach_copy_(list(targets), list(sources))


def whole_of(tensor: Any) -> Tensor:
    """A tensor as it is over all ranks, which all must ask for it; one that is not sharded stands for itself."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def shard_of(whole: Tensor, shard: Tensor) -> Tensor:
    """This rank's part of a tensor that is whole, and equal, on every rank; no communication.

    Args:
        whole: Anything in the whole shape.
        shard: The parameter whose placement it takes; one that is not sharded leaves it whole.
    """
    if not is_shard(shard) or is_shard(whole):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(shard, DTensor)
    replicas = [Replicate()] * shard.device_mesh.ndim
    with torch.no_grad():
        everywhere = DTensor.from_local(whole.view(shard.shape), shard.device_mesh, replicas, run_check=False)
        return everywhere.redistribute(shard.device_mesh, shard.placements)


def whole_parameters(module: nn.Module, params: Sequence[Tensor]) -> list[Tensor]:
    """The parameters that operations see: gathered for the forward and the backward pass of their module.

    Their memory is there only while it is needed; their shapes always are.

    Args:
        module: Sharded by ``torch.distributed.fsdp.fully_shard``.
        params: Shards, as an optimizer has them; others stand for themselves.

    Raises:
        CompositionError: A shard is not one of ``fully_shard``'s.
    """
    if not are_sharded(params):
        return list(params)
    for each in _parts(module):
        each.unshard()  # whole parameters come into being with the first gathering
        each.reshard()
    known = {id(shard): whole for shard, whole in _pairs(module)}
    lost: list[Any] = [p for p in params if is_shard(p) and id(p) not in known]
    if lost:
        raise CompositionError(
            "parameters are sharded in a way that this method does not know",
            found=f"a shard of shape {tuple(lost[0].shape)}, placed {lost[0].placements}",
            allowed="torch.distributed.fsdp.fully_shard over the ranks that share the data",
            remedy="Leave tensor parallelism out, or use trainer=ddp.",
        )
    return [known.get(id(p), p) for p in params]


def _parts(module: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [each for each in module.modules() if isinstance(each, FSDPModule)]


def _groups(module: nn.Module) -> list[Any]:
    states = [each._get_fsdp_state() for each in _parts(module)]
    return [group for state in states for group in state._fsdp_param_groups]


def _pairs(module: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Each shard with its whole parameter."""
    for group in _groups(module):
        for param in group.fsdp_params:
            yield param.sharded_param, param._unsharded_param


@contextmanager
def gradients_left_alone(module: nn.Module) -> Iterator[None]:
    """Inside, a gradient that does reach a whole parameter stays there, where it is seen, and is not exchanged."""
    parts = _parts(module)
    for each in parts:
        each.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for each in parts:
            each.set_requires_gradient_sync(True, recurse=False)


@contextmanager
def gathered(module: nn.Module, params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Inside, all parameters stay whole, and a graph over them can be differentiated as often as is asked.

    Args:
        module: Sharded by ``torch.distributed.fsdp.fully_shard``.
        params: Shards, as an optimizer has them.

    Yields:
        The whole parameters, in the order of ``params``.
    """
    whole = whole_parameters(module, params)
    parts, groups = _parts(module), _groups(module)
    kept = [group.post_forward_mesh_info for group in groups]
    for group in groups:
        group.post_forward_mesh_info = None  # not cut again after the forward pass
    for each in parts:
        each.set_reshard_after_backward(False, recurse=False)
        each.unshard()
    try:
        with gradients_left_alone(module):
            yield whole
    finally:
        for group, info in zip(groups, kept, strict=True):
            group.post_forward_mesh_info = info
        for each in parts:
            each.set_reshard_after_backward(True, recurse=False)
            each.reshard()
