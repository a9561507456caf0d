"""Several processes train in private as one does, and send each other nothing but sums with noise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from privacy_ddp_program import masks

HERE = Path(__file__).parent
NUMBERS = 4 * 6 + 6 + 6 * 2 + 2
PARAMETERS = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each rank saw, by ``devices-rank``."""
    folder = tmp_path_factory.mktemp("private-ddp")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    for devices in (1, 2):
        subprocess.run(
            [sys.executable, str(HERE / "privacy_ddp_program.py"), str(folder), str(devices)],
            env=environment,
            check=True,
            capture_output=True,
            timeout=200,
        )
    return {path.stem: torch.load(path, weights_only=False) for path in folder.glob("*.pt")}


def test_two_processes_with_the_same_records_end_where_one_does(runs: dict[str, Any]) -> None:
    one, first, second = (runs[name]["exact"] for name in ("1-0", "2-0", "2-1"))
    for step, drawn in enumerate(masks()):
        records = drawn.nonzero()[:, 0].tolist()
        assert sorted(one["records"][step]) == records
        assert sorted(first["records"][step] + second["records"][step]) == records
    for a, b in zip(one["gradients"], first["gradients"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(one["weights"], first["weights"], rtol=1e-5, atol=1e-6)


def test_ranks_take_the_same_steps_where_one_has_no_records(runs: dict[str, Any]) -> None:
    first, second = runs["2-0"]["exact"], runs["2-1"]["exact"]
    assert first["records"][2]
    assert not second["records"][2]
    assert not first["records"][4]
    assert not second["records"][4]
    # As many micro-batches on both, some of them empty.
    assert [len(each) for each in first["sizes"]] == [len(each) for each in second["sizes"]]
    assert len(first["sizes"][2]) > 1
    for name in ("exact", "noisy"):
        assert len(runs["2-0"][name]["gradients"]) == len(runs["2-1"][name]["gradients"])


def test_parameters_stay_equal_on_all_ranks(runs: dict[str, Any]) -> None:
    for name in ("exact", "noisy"):
        first, second = runs["2-0"][name], runs["2-1"][name]
        assert torch.equal(first["weights"], second["weights"])
        assert all(torch.equal(a, b) for a, b in zip(first["gradients"], second["gradients"], strict=True))


def test_only_sums_with_noise_are_exchanged(runs: dict[str, Any]) -> None:
    for rank in ("2-0", "2-1"):
        exact, noisy = runs[rank]["exact"], runs[rank]["noisy"]
        assert exact["by_ddp"] == noisy["by_ddp"] == 0
        assert not exact["early"]
        for each, steps in ((exact, 8), (noisy, 32)):
            assert len(each["exchanged"]) == steps * PARAMETERS
        # What this rank sent of a gradient of length 1e-9 is noise: its share of (noise · clip_norm)² is a half.
        sent = torch.cat([each.flatten() for each in noisy["exchanged"]])
        assert abs(float(sent.square().mean()) / (9 / 2) - 1) < 4 * (2 / len(sent)) ** 0.5


def test_the_shares_of_the_noise_add_up(runs: dict[str, Any]) -> None:
    for name, ranks in (("1-0", 1), ("2-0", 2), ("2-1", 2)):
        assert {round(std, 6) for std in runs[name]["stds"] if std} == {round(3.0 / ranks**0.5, 6)}
    gradients = torch.stack(runs["2-0"]["noisy"]["gradients"]) * 8
    assert gradients.shape == (32, NUMBERS)
    assert abs(float(gradients.square().mean()) / 9 - 1) < 4 * (2 / gradients.numel()) ** 0.5
    first, second = (
        torch.cat([each.flatten() for each in runs[rank]["noisy"]["exchanged"]]) for rank in ("2-0", "2-1")
    )
    assert abs(float((first * second).mean()) / 4.5) < 4 / len(first) ** 0.5


def test_ranks_draw_records_of_their_own_by_coins_of_their_own(runs: dict[str, Any]) -> None:
    first, second = (runs[rank]["noisy"]["records"] for rank in ("2-0", "2-1"))
    assert {record % 2 for drawn in first for record in drawn} == {0}
    assert {record % 2 for drawn in second for record in drawn} == {1}
    assert [[r // 2 for r in drawn] for drawn in first] != [[r // 2 for r in drawn] for drawn in second]
    sizes = torch.tensor([float(len(a) + len(b)) for a, b in zip(first, second, strict=True)])
    assert abs(float(sizes.mean()) - 8) < 4 * (7 / len(sizes)) ** 0.5


def test_the_ledger_is_that_of_all_ranks_together(runs: dict[str, Any]) -> None:
    one, two = runs["1-0"]["noisy"]["ledger"], runs["2-0"]["noisy"]["ledger"]
    assert two["events"] == one["events"] == [{"noise": 3e9, "steps": 32, "batch": 8, "records": 64}]
