"""Private methods in small runs of their own, and what they are asked without one."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightrail.privacy.engine import PrivacyEngine
from lightrail.privacy.events import merged
from lightrail.privacy.ledger import Ledger
from lightrail.privacy.method import PrivacyMethod, PrivateHorizon
from lightrail.privacy.private_window import PrivateWindow
from lightrail.privacy.sampling import PrivateWindows
from lightrail.run.loops import EpochLoop, install_loops
from lightrail.sample_gradients import SampleGradients
from lightrail.sample_gradients.pieces import Piece
from lightrail.step.transform import TransformedOptimizer
from lightrail.testing.quiet_trainer import quiet_trainer

__all__ = ["NoisyStep", "PrivateEnd", "clusters", "gradients_of", "private_run", "solved"]

CLASSES = 8


def clusters(records: int = 96) -> tuple[Tensor, Tensor]:
    """Points around eight centres, and which centre it is."""
    generator = torch.Generator().manual_seed(11)
    labels = torch.arange(records) % CLASSES
    return 2 * torch.eye(CLASSES)[labels] + 0.2 * torch.randn(records, CLASSES, generator=generator), labels


def _network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(CLASSES, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def solved() -> nn.Module:
    """A network that has nothing to learn any more: it tells every point right."""
    network = nn.Linear(CLASSES, CLASSES)
    with torch.no_grad():
        network.weight.copy_(2 * torch.eye(CLASSES))
        network.bias.zero_()
    return network


@dataclass
class PrivateEnd:
    """Where a private run ended.

    Args:
        method: As the run left it.
        network: Trained.
        ledger: Of the run.
        sizes: Records of each micro-batch that was evaluated.
        gradients: The private gradient of each step, if they were kept.
        checkpoint: What a save in mid-run held; ``None`` without one.
    """

    method: PrivacyMethod
    network: nn.Module
    ledger: Ledger
    sizes: list[int] = field(default_factory=list)
    gradients: list[list[Tensor]] = field(default_factory=list)
    checkpoint: bytes | None = None

    @property
    def params(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.network.parameters()]

    def accuracy(self, data: tuple[Tensor, Tensor]) -> float:
        """The share of points that are told right."""
        with torch.no_grad():
            return float((self.network(data[0]).argmax(1) == data[1]).float().mean())


class _Task(LightningModule):
    """A classifier under a private engine, which saves and resumes with it."""

    def __init__(self, engine: PrivacyEngine, network: nn.Module, lr: float, save_after: int | None) -> None:
        super().__init__()
        self.network, self.lr, self.save_after = network, lr, save_after
        self._engine = engine
        self.end = PrivateEnd(engine.method, network, None)  # type: ignore[arg-type]

    @property
    def _loop(self) -> EpochLoop:
        loop = self.trainer.fit_loop.epoch_loop
        assert isinstance(loop, EpochLoop)
        return loop

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> Optimizer:
        loop: Any = self.trainer.fit_loop
        loop.horizon(True)
        return TransformedOptimizer(SGD(self.network.parameters(), lr=self.lr))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.end.gradients.append([p.grad.clone() for p in self.network.parameters() if p.grad is not None])

    def at_boundary(self) -> None:
        loop = self._loop
        if self.save_after is not None and loop.global_step == self.save_after and loop.window_is_closed:
            self.save_after = None
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "middle.ckpt"
                self.trainer.save_checkpoint(path)
                self.end.checkpoint = path.read_bytes()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["privacy"] = self._engine.state_dict()
        checkpoint["position"] = self._loop.position(epoch_is_open=True)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._loop.set_position([checkpoint["position"]])
        self._engine.load_state_dict(checkpoint["privacy"])


def private_run(
    method: PrivacyMethod,
    data: tuple[Tensor, Tensor] | None = None,
    *,
    batch_size: int = 16,
    epochs: int = 2,
    lr: float = 0.2,
    network: nn.Module | None = None,
    seed: int = 3,
    save_after: int | None = None,
    checkpoint: bytes | None = None,
) -> PrivateEnd:
    """Trains a small network by a private method, under the engine and the loops of every run.

    Args:
        method: The method; it belongs to one run.
        data: Inputs and labels; :func:`clusters` where none are given.
        batch_size: Expected records a step.
        epochs: Passes over the data, in expectation.
        lr: Of SGD.
        network: What is trained; a small one with one hidden layer by default.
        seed: Of the run, which noise that is not secret follows.
        save_after: After how many steps a checkpoint is taken; the run goes on.
        checkpoint: Of an earlier run, from which this one goes on.

    Returns:
        Where it ended.
    """
    network = _network() if network is None else network
    config = SimpleNamespace(seed=seed)
    run: Any = SimpleNamespace(task=network, callbacks=(), resumed=None, composition=SimpleNamespace(config=config))
    engine = PrivacyEngine(method, run)
    task = _Task(engine, network, lr, save_after)
    loader = DataLoader(TensorDataset(*(clusters() if data is None else data)), batch_size, shuffle=True)
    windows = _Counted(engine)
    with quiet_trainer(max_epochs=epochs) as trainer, tempfile.TemporaryDirectory() as folder:
        loop = install_loops(
            trainer,
            window=True,
            skips_non_finite=False,
            windows=windows,
            make_window=partial(PrivateWindow, engine=engine),
        )
        loop.at_boundary = task.at_boundary
        engine.attach(trainer)
        path = None
        if checkpoint is not None:
            path = Path(folder) / "resumed.ckpt"
            path.write_bytes(checkpoint)
        with contextlib.redirect_stderr(io.StringIO()):
            trainer.fit(task, loader, ckpt_path=path)
    assert engine.ledger is not None
    task.end.ledger, task.end.sizes = engine.ledger, windows.sizes
    return task.end


class _Counted(PrivateWindows):
    """Keeps how many records each micro-batch really had, for checks: the run itself never tells."""

    def __init__(self, engine: PrivacyEngine) -> None:
        super().__init__(engine)
        self.sizes: list[int] = []

    def _counted(self, batches: Any) -> Any:
        for batch in super()._counted(batches):
            assert self._current is not None
            self.sizes.append(self._current.size)
            yield batch


@dataclass
class NoisyStep:
    """A release without an engine, which notes down what it is asked, and adds no noise.

    Args:
        horizon: Of the run.
        noise: The noise multiplier of the run.
        step: The step under way.
        batch: Expected records of the step.
        fixed: What is released in place of each sum; the sum itself, without noise, by default.
    """

    horizon: PrivateHorizon
    noise: float
    step: int = 0
    batch: int = 1
    fixed: Callable[[Tensor], Tensor] | None = None
    released: list[tuple[list[Tensor], float, float]] = field(default_factory=list)

    def __call__(self, sums: Sequence[Tensor], *, sensitivity: float, noise: float) -> list[Tensor]:
        self.released.append(([each.clone() for each in sums], sensitivity, noise))
        return [each.clone() if self.fixed is None else self.fixed(each) for each in sums]

    def summed(self, sums: Sequence[Tensor]) -> list[Tensor]:
        return list(sums)

    @property
    def cost(self) -> float:
        """The noise multiplier of everything that was released, taken as one."""
        return merged(*(noise for _, _, noise in self.released))


def gradients_of(params: Sequence[Tensor], per_sample: Sequence[Tensor]) -> SampleGradients:
    """Gradients that are given one by one, ``[B, *shape]`` for each parameter, as a method sees them."""
    return SampleGradients(list(params), [[Piece(p, each)] for p, each in zip(params, per_sample, strict=True)])
