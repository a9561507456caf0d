"""Checkpoints: written to a temporary name and renamed, read with ``weights_only=True``, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from lightrail.errors import CheckpointError
from lightrail.files import replacing

__all__ = ["AtomicCheckpointIO", "load_checkpoint"]

_OURS = "lightrail"
_PLAIN = (bool, int, float, str, bytes, type(None), torch.Tensor)


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's way to its checkpoint files, atomic and free of pickled code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes the checkpoint; what would need pickled code to load is left out of its hyperparameters."""
        hyper_parameters = checkpoint.get("hyper_parameters")
        if hyper_parameters is not None:
            checkpoint["hyper_parameters"] = {k: v for k, v in dict(hyper_parameters).items() if _is_plain(v)}
            checkpoint.pop("hparams_type", None)
        with replacing(Path(path)) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None, *, mesh: Any = None
    ) -> dict[str, Any]:
        """Reads a checkpoint; see :func:`load_checkpoint`."""
        return load_checkpoint(Path(path), mesh=mesh)

    def remove_checkpoint(self, path: Any) -> None:
        """Deletes a checkpoint."""
        Path(path).unlink(missing_ok=True)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return type(value) is dict and all(_is_plain(k) and _is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return type(value) in (list, tuple) and all(map(_is_plain, value))
    return type(value) in _PLAIN


def load_checkpoint(path: Path, *, with_shards: bool = True, mesh: Any = None) -> dict[str, Any]:
    """Reads a checkpoint that lightrail wrote, without running any code that it might hold.

    Args:
        path: The file.
        with_shards: Whether tensors that ranks wrote beside the file are read too.
        mesh: The device mesh over whose ranks these are divided again; ``None`` for whole tensors.

    Returns:
        Its contents, on the CPU; what is divided, on the devices of the mesh.

    Raises:
        CheckpointError: The file is missing, truncated, foreign, or holds pickled code.
    """
    if not path.is_file():
        raise CheckpointError(
            f"there is no checkpoint at {path}",
            found="a folder" if path.is_dir() else "nothing",
            allowed="a file that `train` wrote, such as checkpoints/last.ckpt in a run folder",
            remedy="Name an existing checkpoint or run folder with run.resume=PATH, or run.resume=latest.",
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"the checkpoint {path} cannot be read",
            found=f"{size} bytes; {str(error).splitlines()[0][:200]}",
            allowed="an intact file that `train` wrote, loadable without running code",
            remedy="It may be truncated or from another program: resume from another checkpoint of the run folder.",
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(_OURS), Mapping) or "loops" not in checkpoint:
        raise CheckpointError(
            f"{path} is not a checkpoint of lightrail",
            found=f"a {type(checkpoint).__name__} with {', '.join(list(map(str, checkpoint))[:6]) or 'nothing'}"
            if isinstance(checkpoint, Mapping)
            else f"a {type(checkpoint).__name__}",
            allowed="a checkpoint that `train` wrote",
            remedy="To start from foreign weights, load them in your model's constructor; run.resume continues runs.",
        )
    if not with_shards or checkpoint[_OURS].get("shards") is None:
        return checkpoint
    from lightrail.run.distributed_checkpoint import read_shards

    return read_shards(checkpoint, path, mesh)
