"""What a training step costs: beside bare Lightning's and plain PyTorch's; optimizers beside AdamW; transforms."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F

from lightrail.bench.table import Table
from lightrail.bench.transforms import measure_transforms
from lightrail.catalogue import available, load
from lightrail.step import Closure
from lightrail.traits import traits_of

__all__ = ["measure"]

_STEPS = 2000
_WARM = 300
_BATCH = 32


def measure(options: argparse.Namespace) -> Table:
    """Measures each variant in turn, round by round, so that a busy machine slows all of them alike.

    Args:
        options: ``rounds``, how often.
    """
    rounds = options.rounds
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    table = Table(
        "time a step, 64-64-10 MLP, batch 32, one thread; an optimizer's update on the same parameters; a step behind "
        "each transform in a 6-512-512-3 MLP, batch 512 (64 where every sample has a gradient)",
        "us",
        f"medians of {rounds} rounds; each round times {_STEPS - _WARM} steps after {_WARM} of warm-up",
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
            _measure_loops(table, rounds)
            _measure_optimizers(table, rounds)
            measure_transforms(table, rounds)
    finally:
        torch.set_num_threads(threads)
    return table


class _Loader:
    """The same batch again and again: data costs nothing, in any of the loops."""

    def __init__(self) -> None:
        self.batch = (torch.randn(_BATCH, 64), torch.randint(10, (_BATCH,)))

    def __iter__(self) -> Any:
        return iter([self.batch] * _STEPS)

    def __len__(self) -> int:
        return _STEPS


class _Data(pl.LightningDataModule):
    def train_dataloader(self) -> _Loader:
        return _Loader()


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


class _Bare(pl.LightningModule):
    """Returns its loss and logs nothing; notes when each step begins."""

    def __init__(self) -> None:
        super().__init__()
        self.model = _mlp()
        self.times: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.times.append(time.perf_counter())
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class _Logging(_Bare):
    """What most people write: one ``self.log`` a step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


class Tracked(_Bare):
    """Returns its accuracy beside its loss, as our tasks do."""

    configure_optimizers = pl.LightningModule.configure_optimizers  # the platform attaches the optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.times.append(time.perf_counter())
        x, y = batch
        logits = self.model(x)
        loss = F.cross_entropy(logits, y)
        return {"loss": loss, "accuracy": logits.argmax(-1).eq(y).mean(dtype=torch.float32)}


def _measure_loops(table: Table, rounds: int) -> None:
    variants: dict[str, Callable[[], list[float]]] = {
        "plain PyTorch loop": _plain,
        "bare Lightning": lambda: _lightning(_Bare()),
        "bare Lightning, one self.log": lambda: _lightning(_Logging(), logger=True),
        "lightrail, tracked and logged": _ours,
        "lightrail, through the window": lambda: _ours("+transform=[clip_norm]"),
    }
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            times = run()
            samples[name].append(1e6 * (times[-1] - times[_WARM]) / (len(times) - 1 - _WARM))
    peers = {"bare Lightning": "plain PyTorch loop"}
    for name in variants:
        peer = peers.get(name, "bare Lightning") if name != "plain PyTorch loop" else None
        table.add(name, samples[name], peer, 1.15 if name == "lightrail, tracked and logged" else None)


def _plain() -> list[float]:
    model = _mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    times = []
    for x, y in _Loader():
        times.append(time.perf_counter())
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return times


def _lightning(module: _Bare, logger: bool = False) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            logger=CSVLogger(folder) if logger else False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=folder,
        )
        trainer.fit(module, _Data())
    return module.times


def _ours(*overrides: str) -> list[float]:
    from lightrail.run import compose

    with tempfile.TemporaryDirectory() as folder:
        run = compose(
            [
                f"task={__name__}.Tracked",
                f"data={__name__}._Data",
                "optimizer=adamw",
                "optimizer.lr=1e-3",
                "schedule=null",
                "logger=[csv]",
                "trainer.max_epochs=1",
                "trainer.accelerator=cpu",
                f"run.root={folder}",
                *overrides,
            ]
        )
        run.execute()
        return run.task.times  # type: ignore[return-value]


def _measure_optimizers(table: Table, rounds: int) -> None:
    """The update alone: gradients stand still, and methods that look further look every thousandth step."""
    shapes = {
        "MLP 64-64-10": [(64, 64), (64,), (10, 64), (10,)],
        "10M parameters": [(512, 512)] * 24 + [(2048, 512)] * 4 + [(512,)] * 48,
    }
    for label, sizes in shapes.items():
        makers: dict[str, Callable[[list[Tensor]], Any]] = {
            f"AdamW(foreach), {label}": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True)
        }
        for name in available("optimizer"):
            cls = load("optimizer", name)
            if _is_elementwise(cls) and not cls.__module__.startswith("torch."):
                options = {"update_every": 10**9, "batch_size": 1} if traits_of(cls).needs_sampled_loss else {}
                makers[f"{name}, {label}"] = lambda p, cls=cls, options=options: cls(p, lr=1e-3, **options)
        samples = _time_updates(makers, sizes, rounds)
        peer = f"AdamW(foreach), {label}"
        for name, values in samples.items():
            bound = 1.2 if name.startswith("sophia_g,") else None
            table.add(name, values, None if name == peer else peer, bound)


def _is_elementwise(cls: Any) -> bool:
    """Whether its update can be timed by itself: one gradient a step, sampled labels apart."""
    traits = dataclasses.replace(traits_of(cls), needs_sampled_loss=False)
    return not (traits.needs_parameter_names or traits.needs_whole_tensors or traits.evaluates_again)


def _quadratic(params: list[Tensor]) -> Closure:
    def loss(*_: Any) -> Tensor:
        return torch.stack([p.square().sum() for p in params]).sum()

    return Closure(loss, params, sampled_loss_fn=loss)


def _time_updates(
    makers: dict[str, Callable[[list[Tensor]], Any]], sizes: Sequence[tuple[int, ...]], rounds: int
) -> dict[str, list[float]]:
    optimizers = {}
    for name, make in makers.items():
        params: list[Tensor] = [nn.Parameter(torch.randn(size)) for size in sizes]
        optimizer = make(params)
        optimizer.step(_quadratic(params))  # the first step makes the state, and looks at the curvature where it does
        for p in params:
            p.grad = torch.randn_like(p)
        optimizers[name] = optimizer
    repeats = 200 if sum(torch.Size(size).numel() for size in sizes) < 10**5 else 10
    samples: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(rounds):
        for name, optimizer in optimizers.items():
            for _ in range(2):
                optimizer.step()
            began = time.perf_counter()
            for _ in range(repeats):
                optimizer.step()
            samples[name].append(1e6 * (time.perf_counter() - began) / repeats)
    return samples
