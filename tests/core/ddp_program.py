"""Trains with every method on as many processes as asked, for comparison: ``ddp_program.py FOLDER DEVICES``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lightning_runs
import torch
from lightning_runs import fit, problem, transformed
from test_step import Climb, adamw, curious
from torch import nn

from lightrail.errors import NonFiniteLoss


class Net(nn.Sequential):
    """Nothing that mixes samples or draws: ranks see halves of each batch."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


METHODS = {"adamw": adamw, "window": transformed(adamw), "climb": transformed(adamw, Climb())}


def main() -> None:
    folder, devices = Path(sys.argv[1]), int(sys.argv[2])
    lightning_runs.Net = Net
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    for name, make in METHODS.items():
        for accumulate in (1, 2):
            task, trainer, _ = fit(
                folder / f"{name}-{accumulate}",
                make,
                window=name != "adamw",
                shuffle=False,
                sampler=range(rank, 72, devices),
                batch_size=8 // devices,
                accumulate_grad_batches=accumulate,
                max_epochs=1,
                devices=devices,
                strategy="ddp" if devices > 1 else "auto",
                use_distributed_sampler=False,
            )
            if trainer.is_global_zero:
                torch.save(task.state_dict(), folder / f"{name}-{accumulate}.pt")
    fit(
        folder / "curious",
        transformed(curious),
        window=True,
        max_epochs=1,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
    )

    poison(folder, devices, rank)


def poison(folder: Path, devices: int, rank: int) -> None:
    """One rank alone meets a loss that is not finite; all of them must stop."""
    data = problem()
    data.tensors[0][17] = float("nan")
    try:
        fit(
            folder / "poisoned",
            adamw,
            dataset=data,
            shuffle=False,
            sampler=range(rank, 72, devices),
            batch_size=8 // devices,
            max_epochs=1,
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            use_distributed_sampler=False,
        )
    except NonFiniteLoss as error:
        (folder / f"refused-{rank}.txt").write_text(str(error))


if __name__ == "__main__":
    main()
