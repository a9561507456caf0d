"""Checkpoints whose sharded tensors every rank writes itself, with ``torch.distributed.checkpoint``.

``last.ckpt`` stays one file, written last and renamed: it holds all that is not sharded, and names the folder beside it
where the shards lie. Whoever reads it finds a complete state, whenever the run was killed, and any number of ranks can
resume from it.
"""

from __future__ import annotations

import os
import pickle
import shutil
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp

from lightrail.errors import CheckpointError
from lightrail.files import tells_unwritable
from lightrail.run.sharded_state import map_shards

__all__ = ["read_shards", "remove_unnamed", "write_shards"]

_MARK = "lightrail_shard"
_FOLDERS = "*.shards-*"


def write_shards(checkpoint: Mapping[str, Any], path: Path, strategy: Any) -> dict[str, Any]:
    """Writes the sharded tensors of a checkpoint into a new folder; all ranks take part.

    Args:
        checkpoint: What is to be saved.
        path: The file that will name the folder.
        strategy: Of Lightning, for what ranks agree on.

    Returns:
        The checkpoint with the names of the tensors in their place, for the file.

    Raises:
        RunFolderError: The folder cannot be written.
    """
    token = strategy.broadcast(uuid.uuid4().hex[:8])
    folder = path.with_name(f"{path.stem}.shards-{checkpoint['global_step']}-{token}")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shards: dict[str, Tensor] = {}

    def put_aside(name: str, shard: Tensor) -> dict[str, str]:
        shards[name] = shard.detach()
        return {_MARK: name}

    rest: dict[str, Any] = map_shards(checkpoint, put_aside)
    with tells_unwritable(folder):
        dcp.save(shards, storage_writer=dcp.FileSystemWriter(temporary, sync_files=True))
        strategy.barrier()
        if strategy.is_global_zero:
            os.replace(temporary, folder)
    rest["lightrail"] = {**rest["lightrail"], "shards": folder.name}
    return rest


def remove_unnamed(folder: Path) -> None:
    """Removes the folders of shards that no checkpoint beside them names any more.

    Args:
        folder: Where checkpoints lie.
    """
    from lightrail.run.checkpoint import load_checkpoint

    found = [*folder.glob(_FOLDERS), *folder.glob(f".{_FOLDERS}.tmp")]
    if not found:
        return
    named = {load_checkpoint(each, with_shards=False)["lightrail"].get("shards") for each in folder.glob("*.ckpt")}
    for each in found:
        if each.name not in named:
            shutil.rmtree(each, ignore_errors=True)


def read_shards(checkpoint: Mapping[str, Any], path: Path, mesh: Any = None) -> dict[str, Any]:
    """Puts the tensors back whose names :func:`write_shards` left.

    Args:
        checkpoint: What the file holds.
        path: Of the file.
        mesh: The device mesh over whose ranks the tensors are divided along their first axis, all of which then take
            part; ``None`` for whole tensors on the processor.

    Raises:
        CheckpointError: The folder is missing or unreadable.
    """
    folder = path.with_name(checkpoint["lightrail"]["shards"])
    reader = _Reader(folder)
    tensors: dict[str, Any] = {}
    try:
        kept = reader.read_metadata().state_dict_metadata
        for name in _names(checkpoint):
            tensors[name] = _empty(kept[name], mesh)
        with warnings.catch_warnings():
            # One process reads them all.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(tensors, storage_reader=reader, no_dist=mesh is None)
    except (OSError, KeyError, pickle.UnpicklingError, dcp.CheckpointException) as error:
        raise CheckpointError(
            f"the shards of {path} cannot be read",
            found=f"{folder}: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}",
            allowed="the folder that `train` wrote beside the file, complete",
            remedy="Move a distributed checkpoint together with its folder of shards, or resume from another one.",
        ) from error
    return _filled(checkpoint, tensors)


def _names(tree: Any) -> list[str]:
    if isinstance(tree, Mapping):
        return [tree[_MARK]] if _MARK in tree else [name for value in tree.values() for name in _names(value)]
    return [name for value in tree for name in _names(value)] if type(tree) in (list, tuple) else []


def _filled(tree: Any, tensors: Mapping[str, Any]) -> Any:
    if isinstance(tree, Mapping):
        if _MARK in tree:
            return tensors[tree[_MARK]]
        return {key: _filled(value, tensors) for key, value in tree.items()}
    return type(tree)(_filled(value, tensors) for value in tree) if type(tree) in (list, tuple) else tree


def _empty(kept: Any, mesh: Any) -> Any:
    if mesh is None:
        return torch.empty(kept.size, dtype=kept.properties.dtype)
    from torch.distributed import tensor as distributed_tensor

    shard = [distributed_tensor.Shard(0)] * mesh.ndim
    return distributed_tensor.empty(*kept.size, dtype=kept.properties.dtype, device_mesh=mesh, placements=shard)


class _Reader(dcp.FileSystemReader):
    """torch's reader, which unpickles descriptions of tensors and nothing else."""

    def read_metadata(self, *_args: Any, **_options: Any) -> Any:
        with open(Path(self.path) / ".metadata", "rb") as file:
            return _Descriptions(file).load()


class _Descriptions(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_known = module.partition(".")[0] in ("torch", "pathlib") and "." not in name
        found = super().find_class(module, name) if is_known else None
        is_description = isinstance(found, type) and module.startswith(("torch.distributed.checkpoint.", "pathlib"))
        if is_description or found is torch.Size or isinstance(found, torch.dtype) or name == "_get_layout":
            return found
        raise pickle.UnpicklingError(f"the description of the shards names {module}.{name}")
