"""Trains privately with parameters sharded over ranks, for comparison: ``privacy_fsdp_program.py FOLDER DEVICES``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from privacy_runs import Module, private
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

ROUNDS = {
    "flat": ("privacy.clip=flat", "privacy.clip_norm=0.05", "privacy.sampling=full", "trainer.max_epochs=4"),
    "per_layer": ("privacy.clip=per_layer", "privacy.clip_norm=0.05", "privacy.sampling=full", "trainer.max_epochs=4"),
    "small_batches": ("privacy.clip_norm=0.5", "data.batch_size=1", "trainer.max_steps=12", "optimizer=adamw"),
}


class OfWeights(ModelParallelStrategy):
    """Its checkpoints hold the weights alone."""

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {}


class Sharded(Module):
    """Each layer's parameters lie in parts on the ranks that share the data."""

    def configure_model(self) -> None:
        if self.device_mesh is None or any(isinstance(p, DTensor) for p in self.parameters()):
            return
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def main() -> None:
    folder, devices = Path(sys.argv[1]), int(sys.argv[2])
    sys.modules["privacy_fsdp_program"] = sys.modules["__main__"]
    for name, options in ROUNDS.items():
        noise = 0.0 if name != "small_batches" else 1.0
        run = private(folder / name, *options, task="privacy_fsdp_program.Sharded", noise=noise)
        if devices > 1:
            strategy = OfWeights(data_parallel_size=devices, tensor_parallel_size=1, save_distributed_checkpoint=False)
            run.trainer = {**run.trainer, "devices": devices, "strategy": strategy}
        run.execute(show_progress=False)
        weights = {key: p.full_tensor() if isinstance(p, DTensor) else p for key, p in run.task.named_parameters()}
        if os.environ.get("LOCAL_RANK", "0") == "0":
            torch.save({key: p.detach().clone() for key, p in weights.items()}, folder / f"{name}.pt")


if __name__ == "__main__":
    main()
