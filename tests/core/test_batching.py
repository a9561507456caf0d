# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false
"""How much data goes into a step over time: windows of changing size under Lightning, and what counts in samples."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

import lightrail
from lightrail import Batching, Closure, Extent, Portion, Run, Traits
from lightrail.errors import CompositionError


class Table(Dataset):
    """Draws random numbers when it is read, as augmentation does."""

    def __init__(self, size: int, noise: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(size, 4, generator=generator)
        self.y = (self.x.sum(1) > 0).long()
        self.noise = noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index] + self.noise * torch.randn(4), self.y[index]


class Points(LightningDataModule):
    def __init__(
        self, size: int = 100, batch_size: int = 8, shuffle: bool = False, noise: float = 0.0, workers: int = 0
    ):
        super().__init__()
        self.dataset = Table(size, noise)
        self.batch_size, self.shuffle, self.workers = batch_size, shuffle, workers

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset, self.batch_size, shuffle=self.shuffle, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Table(32, 0.0), 16)


class Stream(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        class Endless(IterableDataset):
            def __iter__(self) -> Any:
                while True:
                    yield torch.zeros(4), torch.zeros((), dtype=torch.long)

        return DataLoader(Endless(), 8)


class Module(LightningModule):
    """Notes the size of every batch that it sees, and the rate under which each step was made."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2))
        self.sizes: list[int] = []
        self.rates: list[float] = []
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        if torch.is_grad_enabled():
            self.sizes.append(len(batch[0]))
            self.seen += batch[0][:, 0].tolist()
        return {"loss": F.cross_entropy(self.net(batch[0]), batch[1])}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


class Doubling(Batching):
    """Twice as many samples every second step, and twice the rate; remembers what it saw."""

    traits = Traits(watches_gradient=True)

    def __init__(
        self,
        first: int = 8,
        most: int = 64,
        micro_batch: int | None = None,
        scales: bool = False,
        reacts: bool = False,
    ) -> None:
        super().__init__(micro_batch)
        self.first, self.most, self.scales, self.reacts = first, most, scales, reacts
        self.norms: list[float] = []
        self.windows: list[int] = []
        self.extent: Extent | None = None
        self.asked: list[tuple[int, int]] = []

    def begin(self, extent: Extent) -> None:
        self.extent = extent

    def next(self, samples: int, step: int) -> Portion:
        self.asked.append((samples, step))
        size = min(self.most, self.first * 2 ** (step // 2))
        if self.reacts:  # to what it has seen by now, which is less where workers draw ahead
            size = self.first + len(self.norms)
        return Portion(size, lr_factor=size / self.first if self.scales else 1.0)

    def observe(self, params: list[Tensor], closure: Closure) -> None:
        self.norms.append(float(sum(p.grad.square().sum() for p in params if p.grad is not None)))
        self.windows.append(closure.window_size())

    def logged(self) -> dict[str, float]:
        return {"norm": self.norms[-1]}

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self.norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.norms = list(state["norms"])


def compose(root: Path, *overrides: str, data: str = "Points") -> Run:
    return lightrail.compose(
        [
            f"task={__name__}.Module",
            f"data={__name__}.{data}",
            "optimizer=sgd",
            "optimizer.lr=0.1",
            "schedule=null",
            "logger=[csv]",
            "trainer.accelerator=cpu",
            "trainer.log_every_n_steps=1",
            f"run.root={root}",
            *overrides,
        ]
    )


def weights(run: Run) -> list[Tensor]:
    return [p.detach().clone() for p in run.task.parameters()]


def rows(result: Any) -> list[dict[str, str]]:
    with open(result.folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_steps_have_the_sizes_that_are_asked_for_and_an_epoch_sees_every_sample_once(tmp_path: Path) -> None:
    run = compose(tmp_path, f"batching={__name__}.Doubling", "trainer.max_epochs=1")
    result = run.execute()
    assert run.task.sizes == [8, 8, 16, 16, 32, 20]  # the rest of a hundred
    assert run.batching.windows == run.task.sizes
    assert run.batching.asked == [(0, 0), (8, 1), (16, 2), (32, 3), (48, 4), (80, 5)]
    assert run.batching.extent == Extent(100, 8, 100, scales_with_gradient=True)
    logged = [row for row in rows(result) if row["batch_size"]]
    assert [float(row["batch_size"]) for row in logged] == [8, 8, 16, 16, 32, 20]
    assert [float(row["samples"]) for row in logged] == [8, 16, 32, 48, 80, 100]
    assert all(row[f"{Doubling.__name__}/norm"] for row in logged)
    assert "val_loss" in result.metrics


def test_steps_of_changing_numbers_of_micro_batches_end_where_they_should(tmp_path: Path) -> None:
    run = compose(tmp_path, f"batching={__name__}.Doubling", "batching.micro_batch=8", "trainer.max_epochs=1")
    run.execute()
    assert run.batching.windows == [8, 8, 16, 16, 32, 20]
    assert run.task.sizes == [8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 7, 7, 6]


def test_a_small_rest_joins_the_last_step(tmp_path: Path) -> None:
    run = compose(tmp_path, "batching=constant", "batching.batch_size=32", "data.size=70", "trainer.max_epochs=1")
    run.execute()
    assert run.task.sizes == [32, 38]


def test_a_step_that_does_not_fit_is_accumulated_and_is_the_same_step(tmp_path: Path) -> None:
    ends = []
    for micro_batch in (64, 20, 5):
        run = compose(
            tmp_path,
            f"batching={__name__}.Doubling",
            f"batching.micro_batch={micro_batch}",
            "batching.first=40",
            "batching.most=40",
            "data.size=80",
            "trainer.max_epochs=1",
        )
        run.task.net[2].p = 0.0  # masks are drawn micro-batch by micro-batch
        result = run.execute()
        assert max(run.task.sizes) <= micro_batch
        assert sum(run.task.sizes) == 80
        assert run.batching.windows[0] >= 40
        ends.append((weights(run), result.metrics["train_loss"]))
    for found, loss in ends[1:]:
        assert loss == pytest.approx(ends[0][1], rel=1e-5)
        for a, b in zip(found, ends[0][0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_accumulation_by_a_batching_equals_the_trainers(tmp_path: Path) -> None:
    ends = []
    for options in (
        ["batching=constant", "batching.batch_size=16", "batching.micro_batch=8"],
        ["trainer.accumulate=2"],
    ):
        run = compose(tmp_path, *options, "data.size=96", "trainer.max_epochs=2", "run.on_nan=skip")
        run.execute()
        ends.append(weights(run))
    for ours, theirs in zip(*ends, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("workers", "stop"), [(0, 4), (0, 8), (2, 4)])
def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path: Path, workers: int, stop: int) -> None:
    class Stop(Exception):
        pass

    class StopAt(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == stop:
                raise Stop

    options = (
        f"batching={__name__}.Doubling",
        "batching.micro_batch=16",
        "data.shuffle=true",
        "data.noise=0.1",
        f"data.workers={workers}",
        "schedule=cosine",
        "trainer.max_epochs=3",
        "trainer.checkpoint_every=1",
    )
    if workers:  # those that are started again would draw other noise
        options = (*options[:3], "data.noise=0", *options[4:], "batching.reacts=true")
    whole = compose(tmp_path / "whole", *options)
    expected = whole.execute()
    stopped = compose(tmp_path / "stopped", *options)
    stopped.callbacks = [StopAt()]
    with pytest.raises(Stop):
        stopped.execute()
    folder = next((tmp_path / "stopped").iterdir())
    resumed = lightrail.compose([f"run.resume={folder}"])
    found = resumed.execute()
    for a, b in zip(weights(resumed), weights(whole), strict=True):
        assert torch.equal(a, b)
    assert resumed.batching.norms == whole.batching.norms
    assert found.summary["steps"] == expected.summary["steps"]
    assert [row["train_loss"] for row in rows(found)] == [row["train_loss"] for row in rows(expected)]


def test_the_schedule_moves_with_the_samples(tmp_path: Path) -> None:
    run = compose(
        tmp_path, f"batching={__name__}.Doubling", "schedule=linear_decay", "data.size=96", "trainer.max_epochs=1"
    )
    run.execute()
    sizes = run.task.sizes
    assert sizes == [8, 8, 16, 16, 32, 16]
    before = [sum(sizes[:step]) for step in range(len(sizes))]
    assert run.task.rates == pytest.approx([0.1 * (1 - samples / 96) for samples in before])


def test_the_rate_answers_the_batch(tmp_path: Path) -> None:
    run = compose(
        tmp_path, f"batching={__name__}.Doubling", "batching.scales=true", "data.size=112", "trainer.max_epochs=1"
    )
    run.execute()
    assert run.task.rates == pytest.approx([0.1 * size / 8 for size in (8, 8, 16, 16, 32, 32)])


def test_a_horizon_in_samples(tmp_path: Path) -> None:
    plain = compose(tmp_path, "trainer.max_samples=84", "trainer.max_epochs=50")
    assert plain.execute().summary["steps"] == 11
    run = compose(tmp_path, f"batching={__name__}.Doubling", "trainer.max_samples=130", "trainer.max_epochs=50")
    run.execute()
    assert sum(run.task.sizes) == 130
    assert run.batching.extent == Extent(100, 8, 130, scales_with_gradient=True)


def test_a_horizon_in_steps_is_kept_in_steps(tmp_path: Path) -> None:
    run = compose(
        tmp_path,
        f"batching={__name__}.Doubling",
        "schedule=linear_decay",
        "trainer.max_steps=4",
        "trainer.max_epochs=9",
    )
    assert run.execute().summary["steps"] == 4
    assert run.batching.extent == Extent(100, 8, None, scales_with_gradient=True)
    assert run.task.rates == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_data_whose_samples_cannot_be_chosen_is_refused(tmp_path: Path) -> None:
    run = compose(tmp_path, "batching=constant", "batching.batch_size=8", "trainer.max_steps=3", data="Stream")
    with pytest.raises(CompositionError, match="iterable dataset, Endless"):
        run.execute()


def test_a_batch_that_the_data_cannot_fill_is_named(tmp_path: Path) -> None:
    run = compose(tmp_path, "batching=constant", "batching.batch_size=500")
    with pytest.raises(CompositionError, match=r"batching\.batch_size=500, of 100 training samples"):
        run.execute()


def test_a_part_of_the_batches_is_refused_where_their_number_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(CompositionError, match=r"trainer\.max_samples"):
        compose(tmp_path, "batching=constant", "batching.batch_size=8", "+trainer.limit_train_batches=0.5").execute()


@pytest.mark.parametrize("schedule", ["cosine", f"{__name__}.recursive"])
def test_a_changed_horizon_is_accepted_and_said(tmp_path: Path, schedule: str) -> None:
    short = compose(tmp_path, f"schedule={schedule}", "data.size=64", "trainer.max_epochs=2")
    first = short.execute()
    long = lightrail.compose([f"run.resume={first.folder}", "trainer.max_epochs=4"])
    second = long.execute()
    (note,) = [each for each in second.summary["notes"] if "horizon" in each]
    assert "16 steps (128 samples)" in note
    assert "32 steps (256 samples)" in note
    straight = compose(tmp_path, f"schedule={schedule}", "data.size=64", "trainer.max_epochs=4")
    straight.execute()
    assert long.task.rates == pytest.approx(straight.task.rates[16:], rel=1e-6)


def test_another_batch_size_on_resume_goes_on_after_as_many_samples(tmp_path: Path) -> None:
    first = compose(tmp_path, "schedule=linear_decay", "data.size=64", "trainer.max_epochs=2").execute()
    resumed = lightrail.compose([f"run.resume={first.folder}", "trainer.max_epochs=4", "data.batch_size=16"])
    resumed.execute()
    # 128 of 256 samples are over; steps of 16 remain.
    assert resumed.task.rates == pytest.approx([0.1 * (1 - (128 + 16 * step) / 256) for step in range(8)], rel=1e-6)


def recursive(optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    """A scheduler of torch's whose state holds its own horizon."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)


def test_two_processes_share_a_step(tmp_path: Path) -> None:
    """The same samples make the same step, on one process or on two, which agree on every size."""
    program = Path(__file__).with_name("ddp_batching_program.py")
    for devices in (1, 2):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(program.parent)}
        subprocess.run(
            [sys.executable, str(program), str(tmp_path), str(devices)],
            env=environment,
            check=True,
            capture_output=True,
            timeout=300,
        )
    alone, *ranks = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert [len(rank["sizes"]) for rank in ranks] == [len(alone["sizes"])] * 2
    for rank in ranks:
        assert rank["asked"] == alone["asked"]
        assert rank["windows"] == alone["windows"]
        for a, b in zip(rank["weights"], alone["weights"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    # Shuffled: the ranks share the samples of an epoch, and no epoch has the order of another.
    halves = [rank["seen"] for rank in ranks]
    for first, last in ((0, 16), (16, 32)):
        assert sorted(halves[0][first:last] + halves[1][first:last]) == sorted(Table(32, 0.0).x[:, 0].tolist())
    assert halves[0][:16] != halves[0][16:]
