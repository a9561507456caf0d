"""Parameters that are sharded over ranks (FSDP2): whole where samples meet them, in shards where they are updated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightrail.errors import CompositionError

__all__ = ["are_sharded", "gradients_left_alone", "shard_of", "whole_parameters"]


def are_sharded(params: Sequence[Tensor]) -> bool:
    """Whether parameters are shards of whole ones.

    Args:
        params: Those of an optimizer.
    """
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) for p in params)


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
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.unshard()  # whole parameters come into being with the first gathering
            each.reshard()
    known = {id(shard): whole for shard, whole in _pairs(module)}
    lost = [p for p in params if isinstance(p, DTensor) and id(p) not in known]
    if lost:
        raise CompositionError(
            "parameters are sharded in a way that private training does not know",
            found=f"a shard of shape {tuple(lost[0].shape)}, placed {lost[0].placements}",
            allowed="torch.distributed.fsdp.fully_shard over the ranks that share the data",
            remedy="Leave tensor parallelism out, or use trainer.strategy=ddp.",
        )
    return [known.get(id(p), p) for p in params]


def _pairs(module: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Each shard with its whole parameter."""
    from torch.distributed.fsdp import FSDPModule

    for each in module.modules():
        if isinstance(each, FSDPModule):
            state = each._get_fsdp_state()
            group = state._fsdp_param_group
            for param in group.fsdp_params if group is not None else ():
                yield param.sharded_param, param._unsharded_param


@contextmanager
def gradients_left_alone(module: nn.Module) -> Iterator[None]:
    """Inside, a gradient that does reach a whole parameter stays there, where it is seen, and is not exchanged."""
    from torch.distributed.fsdp import FSDPModule

    parts = [each for each in module.modules() if isinstance(each, FSDPModule)]
    for each in parts:
        each.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for each in parts:
            each.set_requires_gradient_sync(True, recurse=False)


def shard_of(whole: Tensor, shard: Tensor) -> Tensor:
    """This rank's part of a tensor that is whole, and equal, on every rank; no communication.

    Args:
        whole: Anything in the whole shape.
        shard: The parameter whose placement it takes; one that is not sharded leaves it whole.
    """
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(shard, DTensor):
        return whole
    replicas = [Replicate()] * shard.device_mesh.ndim
    with torch.no_grad():
        everywhere = DTensor.from_local(whole.view(shard.shape), shard.device_mesh, replicas, run_check=False)
        return everywhere.redistribute(shard.device_mesh, shard.placements)
