"""What a training step costs: beside bare Lightning's and plain PyTorch's; optimizers beside AdamW; transforms."""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from statistics import mean, median
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F

from lightrail.bench.table import Table
from lightrail.catalogue import available, load
from lightrail.errors import UserError
from lightrail.step import Closure, TransformedOptimizer
from lightrail.testing.problems import Classifier
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
        "each transform, 1.3 M parameters, batch 128",
        "us",
        f"medians of {rounds} rounds; each round times {_STEPS - _WARM} steps after {_WARM} of warm-up",
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
            _measure_loops(table, rounds)
            _measure_optimizers(table, rounds)
            _measure_transforms(table, rounds)
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
    traits = traits_of(cls)
    return not (traits.needs_parameter_names or traits.needs_second_derivatives or traits.needs_closure)


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


class _Wide(Classifier):
    """Three classes in a network large enough that a step is its evaluation."""

    def __init__(self) -> None:
        super().__init__(widths=(1024, 1024))

    def batch(self, step: int) -> Any:
        generator = torch.Generator().manual_seed(step % 4)
        targets = torch.randint(3, (128,), generator=generator)
        return torch.randn(128, 6, generator=generator) + F.one_hot(targets, 6), targets

    def sample_losses(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.module(batch[0]), batch[1], reduction="none")


def _measure_transforms(table: Table, rounds: int) -> None:
    """A step behind each transform beside the plain step; and beside what its evaluations account for."""
    plain = "plain step, AdamW, 1.3 M parameters"
    names = [name for name in available("transform") if _is_measurable(name)]
    samples: dict[str, list[float]] = {name: [] for name in names}
    accounted: dict[str, list[float]] = {name: [] for name in names}
    plains: list[float] = []
    for _ in range(rounds):
        step, _, _ = _time_steps(None)
        plains.append(step)
        for name in names:
            # Measured again beside each, since a busy machine does not stand still for a round.
            step, evaluation, _ = _time_steps(None)
            mine, _, extra = _time_steps(name)
            samples[name].append(mine)
            accounted[name].append(step + extra * evaluation)
    table.add(plain, plains)
    for name in names:
        table.add(f"{name}, a step", samples[name], plain)
        table.add(f"{name}, beside its evaluations", samples[name], "step and evaluations", 1.05, accounted[name])


def _is_measurable(name: str) -> bool:
    """Whether it can be built with its example on this problem."""
    try:
        _transformed(_Wide(), name)
    except UserError:
        return False
    return True


def _transformed(problem: _Wide, name: str | None) -> TransformedOptimizer:
    transforms = []
    if name is not None:
        cls = load("transform", name)
        transforms = [cls(**traits_of(cls).example)]
        transforms[0].attach(problem.module)
    return TransformedOptimizer(torch.optim.AdamW(problem.params, lr=1e-3), transforms)


def _time_steps(name: str | None) -> tuple[float, float, float]:
    """Microseconds a step, microseconds an evaluation that is not the first, and how many of those a step makes."""
    problem = _Wide()
    optimizer = _transformed(problem, name)
    batches = [problem.batch(step) for step in range(4)]
    times, evaluations, extra = [], [], []
    for step in range(8):
        closure = problem.closure(batches[step % 4])
        began = time.perf_counter()
        optimizer.step(closure)  # type: ignore[arg-type]
        times.append(time.perf_counter() - began)
        extra.append(closure.evaluations - 1)
        if name is None:
            began = time.perf_counter()
            closure()
            evaluations.append(time.perf_counter() - began)
    return 1e6 * median(times[2:]), 1e6 * median(evaluations[2:] or [0.0]), mean(extra[2:])
