"""Two processes, with copies of the parameters or with shards, end where one process does, and go on for each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sharding_program as program
import torch
from sharding_models import Module
from torch import nn

import lightrail.report
from lightrail.errors import CompositionError
from lightrail.run.sharding import blocks_of

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process and two have left behind."""
    folder = tmp_path_factory.mktemp("sharding")
    patch = pytest.MonkeyPatch()
    patch.setattr(lightrail.report, "write_report", lambda *_args, **_options: None)
    try:
        program.trained(program.made(folder / "half" / "one", 1, "cpu", program.HALF, *program.RESUMED))
        begun = program.recorded(folder / "middle-of-one", 1, "cpu", "trainer.max_steps=2")
        torch.save(begun, folder / "middle-of-one-0.pt")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
        command = [sys.executable, str(HERE / "sharding_program.py"), str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        for accumulate in (1, 2):
            for name in program.matrix("ddp", accumulate):
                where = folder / f"one-{name}-{accumulate}"
                program.trained(program.method(where, 1, "cpu", name, accumulate), where.with_suffix(".pt"))
        whole = program.made(folder / "whole", 1, "cpu", program.WHOLE, *program.RESUMED)
        program.trained(whole, folder / "whole.pt")
        for source in ("fsdp", "ddp", "parts"):
            target = folder / f"{source}-to-one"
            checkpoint = program.copied(folder / "half" / source, target)
            resumed = (program.WHOLE, f"run.resume={checkpoint}", *program.RESUMED)
            program.trained(program.made(target, 1, "cpu", *resumed), target.with_suffix(".pt"))
        checkpoint = program.copied(folder / "middle-of-two", folder / "middle-to-one")
        more = ("trainer.max_steps=-1", f"run.resume={checkpoint}")
        torch.save(program.recorded(folder / "middle-to-one", 1, "cpu", *more), folder / "middle-to-one-0.pt")
    finally:
        patch.undo()
    return folder


def same(left: dict[str, Any], right: dict[str, Any], message: str) -> None:
    assert left["weights"].keys() == right["weights"].keys()
    for key, value in left["weights"].items():
        torch.testing.assert_close(value, right["weights"][key], rtol=1e-4, atol=2e-6, msg=f"{message} {key}")


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_two_processes_end_where_one_does(folder: Path, trainer: str, accumulate: int) -> None:
    for name in program.matrix(trainer, accumulate):
        one, two = (torch.load(folder / f"{who}-{name}-{accumulate}.pt") for who in ("one", trainer))
        same(one, two, f"{trainer} {name} {accumulate}")
        assert two["metrics"]["val_loss"] == pytest.approx(one["metrics"]["val_loss"], rel=1e-4)
        assert two["metrics"]["test_loss"] == pytest.approx(one["metrics"]["test_loss"], rel=1e-4)


def test_running_statistics_are_those_of_the_first_rank_as_in_copies(folder: Path) -> None:
    ddp, fsdp = (torch.load(folder / f"{trainer}-statistics.pt") for trainer in ("ddp", "fsdp"))
    same(ddp, fsdp, "statistics")
    assert fsdp["metrics"]["val_loss"] == pytest.approx(ddp["metrics"]["val_loss"], rel=1e-4)


ROUTES = ("fsdp-to-one", "ddp-to-one", "parts-to-one", "one-to-fsdp", "one-to-ddp", "parts-to-fsdp", "parts-to-ddp")


@pytest.mark.parametrize("route", [*ROUTES, "ddp-to-fsdp"])
def test_a_run_goes_on_elsewhere(folder: Path, route: str) -> None:
    same(torch.load(folder / "whole.pt"), torch.load(folder / f"{route}.pt"), route)


@pytest.mark.parametrize(("before", "after"), [("one", "two"), ("two", "one")])
def test_an_epoch_goes_on_with_what_was_left(folder: Path, before: str, after: str) -> None:
    """Each of 30 rows once, though the first half was shared among another number of processes."""
    begun, gone_on = ([torch.load(each) for each in sorted(folder.glob(f"middle-{way}-?.pt"))]
                      for way in (f"of-{before}", f"to-{after}"))  # fmt: skip
    assert {len(begun), len(gone_on)} == {1, 2}
    rows = [row for found, _ in (*begun, *gone_on) for row in found]
    assert sum(len(found) for found, _ in begun) == 16
    assert sorted(rows) == list(range(30))
    assert "the 14 samples that were left are shared anew" in " ".join(gone_on[0][1])


def test_a_checkpoint_is_that_of_one_process(folder: Path) -> None:
    one, fsdp = (torch.load(_last(folder / "half" / each), weights_only=True) for each in ("one", "fsdp"))
    assert one["state_dict"].keys() == fsdp["state_dict"].keys()
    left, right = one["optimizer_states"][0], fsdp["optimizer_states"][0]
    assert left["optimizer"]["state"].keys() == right["optimizer"]["state"].keys()
    for index, state in left["optimizer"]["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(value, right["optimizer"]["state"][index][key], rtol=1e-4, atol=1e-6)
    assert [type(slow) for slow in right["transforms"][0]["slow"]] == [torch.Tensor] * len(
        left["transforms"][0]["slow"]
    )


def test_shards_lie_beside_the_file_that_names_them(folder: Path) -> None:
    last = _last(folder / "half" / "parts")
    named = torch.load(last, weights_only=True)["lightrail"]["shards"]
    best = torch.load(last.with_name("best.ckpt"), weights_only=True)["lightrail"]["shards"]
    assert {each.name for each in last.parent.iterdir() if each.is_dir()} == {named, best}


def _last(folder: Path) -> Path:
    (found,) = folder.glob("*/checkpoints/last.ckpt")
    return found


def test_blocks_are_what_repeats() -> None:
    module = Module()
    assert blocks_of(module) == list(module.blocks)
    assert blocks_of(module, ["Linear"]) == [module.blocks[0].layer, module.blocks[1].layer, module.leave]
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert blocks_of(tied) == [tied[2]]
    with pytest.raises(CompositionError, match="'Blok'"):
        blocks_of(module, ["Blok"])


class Scaled(Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer=psgd_xmat"], "psgd_xmat.*whole tensors"),
        (["optimizer=mars"], "mars.*whole tensors"),
        (["optimizer=adafactor"], "adafactor.*whole tensors"),
        (["transform=mup"], "mup.*before they are sharded"),
        (["trainer.precision=16-mixed"], "precision 16-mixed"),
        (["federated=fedavg"], "fedavg.*copies of the whole task"),
        (["task=test_sharding.Scaled"], "'scale' is a scalar"),
        (["trainer.strategy=fsdp_cpu_offload"], "older way"),
    ],
)
def test_what_cannot_work_is_refused_by_name(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(CompositionError, match=message):
        program.made(tmp_path, 2, "fsdp", *overrides)
    assert not list(tmp_path.iterdir())
