"""Small LightningModules and trainers with our loops, for tests that need no configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightrail.run.checkpoint import AtomicCheckpointIO
from lightrail.run.folder import RunFolder
from lightrail.run.interruption import Interruption
from lightrail.run.loops import install_loops
from lightrail.run.observation import Observation
from lightrail.step import Transform, TransformedOptimizer


class Net(nn.Sequential):
    """Dropout and BatchNorm: everything that an extra evaluation could move by mistake."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


class Task(LightningModule):
    """A classifier that logs in both ways: what it returns, and ``self.log``."""

    def __init__(self, make_optimizer: Callable[[list[Tensor]], Optimizer], horizon: int = 100) -> None:
        super().__init__()
        self.net = Net()
        self.make_optimizer = make_optimizer
        self.horizon = horizon
        self.calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        self.calls += 1
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("seen_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(x))
        return {"loss": loss, "double": 2 * loss.detach()}

    def sampled_loss(self, batch: Any, generator: torch.Generator) -> Tensor:
        logits = self.net(batch[0])
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(-1)
        return F.cross_entropy(logits, labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]), batch_size=len(batch[0]))

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / self.horizon)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def problem(samples: int = 72) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 6, generator=generator)
    return TensorDataset(x, (x @ torch.randn(6, 3, generator=generator)).argmax(-1))


class Noisy(TensorDataset):
    """Augments with the global generator, as image pipelines do."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        x, y = super().__getitem__(index)
        return x + 0.01 * torch.randn_like(x), y


def trainer_for(
    folder: Path,
    *,
    window: bool = False,
    every: int | None = None,
    on_nan: str = "stop",
    **arguments: Any,
) -> tuple[Trainer, Observation]:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    interruption = Interruption()
    observation = Observation(
        RunFolder(folder),
        {"plugins": []},
        interruption,
        every=every,
        skips_non_finite=on_nan == "skip",
        shows_progress=False,
    )
    arguments = {"logger": False, "callbacks": [], "accelerator": "cpu", "devices": 1, **arguments}
    callbacks = [*arguments.pop("callbacks"), observation]
    trainer = Trainer(
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=str(folder),
        log_every_n_steps=5,
        **arguments,
    )
    trainer._signal_connector.register_signal_handlers = lambda: None
    observation.attach(trainer, install_loops(trainer, window=window, skips_non_finite=on_nan == "skip"))
    return trainer, observation


def transformed(make: Callable[[list[Tensor]], Optimizer], *transforms: Transform) -> Callable[[Any], Optimizer]:
    return lambda params: TransformedOptimizer(make(params), transforms)


def fit(
    folder: Path,
    make_optimizer: Callable[[list[Tensor]], Optimizer],
    *,
    dataset: TensorDataset | None = None,
    shuffle: bool = True,
    batch_size: int = 8,
    num_workers: int = 0,
    persistent: bool = False,
    checkpoint: Path | None = None,
    seed: int = 0,
    callbacks: Sequence[pl.Callback] = (),
    sampler: Sequence[int] | None = None,
    **arguments: Any,
) -> tuple[Task, Trainer, Observation]:
    pl.seed_everything(seed, verbose=False)
    task = Task(make_optimizer)
    trainer, observation = trainer_for(folder, callbacks=list(callbacks), **arguments)
    loader = DataLoader(
        dataset or problem(),
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=num_workers,
        persistent_workers=persistent,
        sampler=sampler,
    )
    validation = DataLoader(problem(16), batch_size=8)
    trainer.fit(task, loader, validation, ckpt_path=None if checkpoint is None else str(checkpoint))
    return task, trainer, observation
