"""Callbacks of runs that are to be disturbed."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


class SlowBatches(pl.Callback):
    """Takes its time with every batch after the twelfth until it is released, and keeps a diary of them."""

    def __init__(self, diary: str, seconds: float = 0.5) -> None:
        self.diary = Path(diary)
        self.seconds = seconds

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        with open(self.diary, "a") as diary:
            diary.write(json.dumps({"step": step, "process": os.getpid(), "rank": trainer.global_rank}) + "\n")
        if step >= 12 and not self.diary.with_suffix(".released").exists():
            time.sleep(self.seconds)


class Dies(pl.Callback):
    """Is killed at a step, every time."""

    def __init__(self, step: int = 3) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
