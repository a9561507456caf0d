# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false
"""Trains under a batching on as many processes as asked, for comparison: ``ddp_batching_program.py FOLDER DEVICES``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from test_batching import compose, weights


def main() -> None:
    folder, devices = Path(sys.argv[1]), int(sys.argv[2])
    run = compose(
        folder / str(devices),
        "batching=test_batching.Doubling",
        f"data.batch_size={8 // devices}",
        "data.size=96",
        "trainer.max_epochs=2",
        f"trainer.devices={devices}",
        f"trainer.strategy={'ddp' if devices > 1 else 'auto'}",
        "run.on_nan=skip",
    )
    run.task.net[2].p = 0.0  # masks are drawn rank by rank
    run.execute(show_progress=False)
    rank = os.environ.get("LOCAL_RANK", "0")
    shuffled = compose(
        folder / f"shuffled-{devices}",
        "batching=constant",
        "batching.batch_size=8",
        f"data.batch_size={8 // devices}",
        "data.size=32",
        "data.shuffle=true",
        "trainer.max_epochs=2",
        f"trainer.devices={devices}",
        f"trainer.strategy={'ddp' if devices > 1 else 'auto'}",
    )
    shuffled.execute(show_progress=False)
    found = {
        "seen": shuffled.task.seen,
        "sizes": run.task.sizes,
        "asked": run.batching.asked,
        "windows": run.batching.windows,
        "weights": weights(run),
    }
    torch.save(found, folder / f"{devices}-{rank}.pt")


if __name__ == "__main__":
    main()
