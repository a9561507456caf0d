"""What `lightrail bench launch` has carried out: a run that notes when it steps."""

from __future__ import annotations

import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightrail.launch.choice import chosen_launch

__all__ = ["MARKS", "Convolutions", "Marks", "Pictures", "hand_over"]

MARKS = "marks.txt"


class Marks(Callback):
    """Writes the time of each step, and the process that made it, into the run folder."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """One line a step, from the first process."""
        if trainer.is_global_zero:
            with open(Path(trainer.default_root_dir) / MARKS, "a") as marks:
                marks.write(f"{time.time()} {os.getpid()}\n")


class Pictures(LightningDataModule):
    """Noise of 32 by 32 pixels in ten classes.

    Args:
        batch_size: Pictures a process and step, at least 1.
        count: Pictures in an epoch, at least 1.
    """

    def __init__(self, batch_size: int = 64, count: int = 1024) -> None:
        super().__init__()
        self.batch_size = batch_size
        generator = torch.Generator().manual_seed(0)
        pictures = torch.randn(count, 3, 32, 32, generator=generator)
        self.pictures = TensorDataset(pictures, torch.arange(count) % 10)

    def train_dataloader(self) -> DataLoader[Any]:
        """All of them, in an order of their own each epoch."""
        return DataLoader(self.pictures, self.batch_size, shuffle=True, drop_last=True)


class Convolutions(LightningModule):
    """Three convolutions and a linear layer, which cost far more than their few weights cost to average.

    Args:
        channels: Of each convolution, at least 1.
        pause: Seconds that a step sleeps, at least 0.
    """

    def __init__(self, channels: int = 32, pause: float = 0.0) -> None:
        super().__init__()
        widths = (3, channels, channels, channels)
        layers = [(nn.Conv2d(a, b, 3, padding=1), nn.ReLU()) for a, b in pairwise(widths)]
        self.layers = nn.Sequential(*(each for pair in layers for each in pair))
        self.head = nn.Linear(channels, 10)
        self.pause = pause

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The cross entropy of the classes."""
        time.sleep(self.pause)
        pictures, classes = batch
        return nn.functional.cross_entropy(self.head(self.layers(pictures).mean((2, 3))), classes)


def hand_over(words: list[str]) -> None:
    """Writes the order of a run and has its launch start it, as `train -m` does with each of its jobs.

    Args:
        words: As typed after ``train``.

    Raises:
        UserError: It cannot be carried out there.
    """
    from omegaconf import OmegaConf

    from lightrail.configuration import compose
    from lightrail.launch.submission import ordered

    composition = compose(words)
    launch = chosen_launch(composition)
    assert launch is not None
    trainer: Any = OmegaConf.to_container(composition.config.trainer, resolve=True)
    launch.check(trainer)
    launch.start(ordered(composition)).keep()


if __name__ == "__main__":
    import sys

    from lightrail.command import reporting_errors

    with reporting_errors() as outcome:
        hand_over(sys.argv[1:])
        outcome.status = 0
    sys.exit(outcome.status)
