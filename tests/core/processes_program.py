"""One rank of several runs in a row, as somebody else starts it: ``processes_program.py ROOT``."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from run_plugins import OwnOptimizer, Points
from torch.utils.data import DataLoader

from lightrail.train import main

RUN = (
    "task=processes_program.Plain",
    "data=processes_program.Share",
    "model=null",
    "logger=[csv]",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=2",
    "+trainer.use_distributed_sampler=false",
)


class Plain(OwnOptimizer):
    """Its path is this program's."""


class Share(Points):
    """Of each 16 samples in a row, those of this rank: together the ranks see the batches that one would see alone."""

    def __init__(self, processes: int = 1) -> None:
        super().__init__(16 // processes)
        self.processes = processes

    def train_dataloader(self) -> DataLoader:
        rank = int(os.environ.get("RANK", "0")) if self.processes > 1 else 0
        return DataLoader(self.dataset, self.batch_size, sampler=range(rank, 64, self.processes))


class Fault(pl.Callback):
    """Sends one rank a signal when it is at a step; where a file is named, the first time only."""

    def __init__(self, rank: int = 1, step: int = 3, number: int = int(signal.SIGKILL), once: str = "") -> None:
        self.rank = rank
        self.step = step
        self.number = number
        self.once = once

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            if self.once and Path(self.once).exists():
                return
            if self.once:
                Path(self.once).touch()
            time.sleep(2.5)  # the others hear of this step first
            os.kill(os.getpid(), self.number)


if __name__ == "__main__":
    root = f"run.root={sys.argv[1]}"
    assert main([*RUN, root, "run.name=two", "data.processes=2"]) == 0
    fault = ["callback=[processes_program.Fault]", f"callback.Fault.number={int(signal.SIGSTOP)}"]
    sys.exit(main([*RUN, root, "run.name=stopped", "data.processes=2", "run.rank_timeout=5", *fault]))
