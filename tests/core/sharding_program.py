"""Trains on two processes, in copies and in shards, for comparison with one: ``sharding_program.py FOLDER``."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

import lightrail.report
from lightrail.errors import UserError
from lightrail.run import compose
from lightrail.run.run import Run
from lightrail.run.sharded_state import whole_tree

METHODS: dict[str, tuple[str, ...]] = {
    "adamw": ("optimizer=adamw", "optimizer.lr=0.02"),
    "sophia": ("optimizer=sophia", "optimizer.lr=0.01", "optimizer.update_every=2"),
    "sam": ("optimizer=adamw", "optimizer.lr=0.02", "transform=sam", "transform.sam.rho=0.1"),
    "clipped": ("optimizer=sgd", "optimizer.lr=0.5", "transform=clip_norm", "transform.clip_norm.max_norm=0.1"),
    "sophia_h": ("optimizer=sophia_h", "optimizer.lr=0.01", "optimizer.update_every=2"),
    "lookahead": ("optimizer=adamw", "optimizer.lr=0.02", "transform=lookahead", "transform.lookahead.k=3"),
}
# Methods that work on whole matrices: in copies alone.
OF_WHOLE: dict[str, tuple[str, ...]] = {
    "mars": ("optimizer=mars", "optimizer.lr=0.02"),
    "psgd": ("optimizer=psgd_xmat", "optimizer.lr=0.02"),
}
WINDOWED = ("adamw", "sophia", "sam", "sophia_h")
HALF = "trainer.max_epochs=1"
WHOLE = "trainer.max_epochs=2"
RESUMED = ("optimizer=adamw", "optimizer.lr=0.02", "transform=[lookahead]", "transform.lookahead.k=3")


def made(root: Path, devices: int, trainer: str, *overrides: str, task: str = "Module", data: str = "Points") -> Run:
    """A run whose steps see the same 16 rows on any number of processes."""
    return compose(
        [
            f"run.root={root}",
            f"task=sharding_models.{task}",
            f"data=sharding_models.{data}",
            f"data.batch_size={16 // devices}",
            f"trainer={trainer}",
            f"trainer.devices={devices}",
            "trainer.accelerator=cpu",
            "+trainer.use_distributed_sampler=false",
            "schedule=null",
            "logger=csv",
            *overrides,
        ]
    )


def trained(run: Run, target: Path | None = None) -> dict[str, Any]:
    """What it ends with, whole; written by the first rank where a target is given."""
    # Lightning seeds anew where it starts processes, with the model made: a single one has to do the same.
    pl.seed_everything(run.composition.config.seed, workers=True, verbose=False)
    result = run.execute(show_progress=False)
    weights = whole_tree(dict(run.task.named_parameters()), keep=True)
    found = {key: p.detach().clone() for key, p in weights.items()}
    if target is not None and os.environ.get("LOCAL_RANK", "0") == "0":
        torch.save({"weights": found, "metrics": dict(result.metrics), "notes": list(result.summary["notes"])}, target)
    return found


def matrix(trainer: str, accumulate: int) -> Sequence[str]:
    """The methods that are compared: under accumulation the plainest, and those that ask for more than a gradient."""
    if accumulate > 1:
        return WINDOWED
    return [*METHODS, *OF_WHOLE] if trainer == "ddp" else list(METHODS)


def method(root: Path, devices: int, trainer: str, name: str, accumulate: int) -> Run:
    options = {**METHODS, **OF_WHOLE}[name]
    return made(root, devices, trainer, WHOLE, f"trainer.accumulate={accumulate}", *options)


def compare(folder: Path) -> None:
    for trainer in ("ddp", "fsdp"):
        for accumulate in (1, 2):
            for name in matrix(trainer, accumulate):
                where = folder / f"{trainer}-{name}-{accumulate}"
                trained(method(where, 2, trainer, name, accumulate), where.with_suffix(".pt"))
        statistics = made(folder / f"{trainer}-bn", 2, trainer, WHOLE, *METHODS["sam"], task="WithStatistics")
        trained(statistics, folder / f"{trainer}-statistics.pt")


def copied(source: Path, target: Path) -> Path:
    """The last checkpoint of the run in a folder, moved out of it: resuming it leaves the run as it is."""
    (saved,) = source.glob("*/checkpoints")
    moved = target / f"from-{os.environ.get('LOCAL_RANK', '0')}"
    shutil.copytree(saved, moved)
    return moved / "last.ckpt"


def resume(folder: Path) -> None:
    """Saves half of a run in each way, and goes on with what one process and the others saved."""
    ways: dict[str, Sequence[str]] = {"fsdp": (), "ddp": (), "parts": ("trainer.distributed_checkpoint=true",)}
    for way, more in ways.items():
        trained(made(folder / "half" / way, 2, "ddp" if way == "ddp" else "fsdp", HALF, *more, *RESUMED))
    for source in ("one", "parts", "ddp"):
        for trainer in ("fsdp", "ddp"):
            if source == trainer:
                continue
            target = folder / f"{source}-to-{trainer}"
            checkpoint = copied(folder / "half" / source, target)
            trained(made(target, 2, trainer, WHOLE, f"run.resume={checkpoint}", *RESUMED), target.with_suffix(".pt"))


def recorded(root: Path, devices: int, trainer: str, *overrides: str) -> tuple[list[int], list[str]]:
    """The rows that this process trained on, in batches that together are of eight, and what the run noted."""
    made_of = ("++trainer.use_distributed_sampler=true", f"data.batch_size={8 // devices}", "trainer.max_epochs=1")
    run = made(root, devices, trainer, *made_of, *overrides, task="Recording", data="Shuffled")
    result = run.execute(show_progress=False)
    return run.task.rows, list(result.summary.get("notes", ()))  # type: ignore[return-value]


def go_on_in_the_middle(folder: Path) -> None:
    """Of an epoch that one process began; and begins one that another number goes on with."""
    rank = os.environ.get("LOCAL_RANK", "0")
    checkpoint = copied(folder / "middle-of-one", folder / "middle-to-two")
    more = ("trainer.max_steps=-1", f"run.resume={checkpoint}")
    torch.save(recorded(folder / "middle-to-two", 2, "ddp", *more), folder / f"middle-to-two-{rank}.pt")
    begun = recorded(folder / "middle-of-two", 2, "fsdp", "trainer.max_steps=2")
    torch.save(begun, folder / f"middle-of-two-{rank}.pt")


def main() -> None:
    folder = Path(sys.argv[1])
    lightrail.report.write_report = lambda *_args, **_options: None  # not what is compared
    compare(folder)
    resume(folder)
    go_on_in_the_middle(folder)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
