"""Trains in private on as many processes as asked: ``privacy_ddp_program.py FOLDER DEVICES``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from privacy_runs import Watch, flat, private, told
from torch import Tensor

from lightrail.privacy.engine import PrivacyEngine
from lightrail.privacy.noise import SystemNoise

RECORDS = 64
STEPS = 8


def masks() -> Tensor:
    """Which records each step has: in the third only those of the first of two ranks, in the fifth none."""
    drawn = torch.rand(STEPS, RECORDS, generator=torch.Generator().manual_seed(5)) < 1 / 8
    drawn[2, 1::2] = False
    drawn[2, 0::2] |= torch.arange(RECORDS // 2) < 7
    drawn[4] = False
    return drawn


def given(self: Any, count: int, step: int) -> Tensor:
    trainer = self._trainer
    return masks()[step, trainer.global_rank :: trainer.world_size]


class Spy(Watch):
    """What is exchanged: by DDP itself, and by the step."""

    def __init__(self) -> None:
        super().__init__()
        self.by_ddp = 0
        self.exchanged: list[Tensor] = []
        self._is_in_step = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.world_size > 1:
            trainer.strategy.model.register_comm_hook(None, self._count)

    def _count(self, state, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations
        self.by_ddp += 1
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    def on_train_batch_start(self, *args: Any, **options: Any) -> None:
        super().on_train_batch_start(*args, **options)
        self._is_in_step = True

    def on_train_batch_end(self, *args: Any, **options: Any) -> None:
        self._is_in_step = False

    def all_reduce(self, tensor: Tensor, *args: Any, **options: Any) -> Any:
        if tensor.is_floating_point() and self._is_in_step:
            self.exchanged.append(tensor.detach().clone())
        return REDUCE(tensor, *args, **options)


REDUCE = torch.distributed.all_reduce


def main() -> None:
    folder, devices, rank = Path(sys.argv[1]), int(sys.argv[2]), os.environ.get("LOCAL_RANK", "0")
    found: dict[str, Any] = {}
    added = SystemNoise.add_to

    def noted(self: Any, tensors: Any, std: float) -> None:
        found.setdefault("stds", []).append(std)
        added(self, tensors, std)

    SystemNoise.add_to = noted  # type: ignore[method-assign]
    drawn = PrivacyEngine.drawn
    for name, noise, lr in (("exact", 0.0, 0.5), ("noisy", 3e9, 0.0)):
        PrivacyEngine.drawn = given if name == "exact" else drawn  # type: ignore[method-assign]
        clip = "privacy.clip_norm=1" if name == "exact" else "privacy.clip_norm=1e-9"
        run = private(
            folder / f"{name}-{devices}",
            clip,
            f"optimizer.lr={lr}",
            f"data.batch_size={8 // devices}",
            "privacy.max_physical_batch=2",
            f"trainer.devices={devices}",
            f"trainer.strategy={'ddp' if devices > 1 else 'auto'}",
            "trainer.max_epochs=" + ("1" if name == "exact" else "4"),
            "run.name=run",
            "logger=[]",
            noise=noise,
        )
        spy = Spy()
        run.callbacks = [*run.callbacks, spy]
        torch.distributed.all_reduce = spy.all_reduce
        run.execute(show_progress=False)
        torch.distributed.all_reduce = REDUCE
        found[name] = {
            "weights": flat(run.task),
            "gradients": spy.gradients,
            "records": spy.records,
            "sizes": spy.sizes,
            "by_ddp": spy.by_ddp,
            "exchanged": spy.exchanged,
            "early": any(spy.early),
        }
        if rank == "0":
            found[name]["ledger"] = told(folder / f"{name}-{devices}" / "run")
    torch.save(found, folder / f"{devices}-{rank}.pt")


if __name__ == "__main__":
    main()
