"""Batchings: worked examples, what they do to a run, and what they refuse."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightrail
from lightrail import Closure, Extent
from lightrail.errors import UserError
from lightrail_schedules.batching.adaptive_batch import AdaptiveBatch, batch_size_wanted, gradient_noise
from lightrail_schedules.batching.constant import Constant
from lightrail_schedules.batching.multigrid import IMAGES, Multigrid, grids_of, long_cycles, resized
from lightrail_schedules.batching.rate import rate_factor

EXTENT = Extent(data_size=1000, batch_size=32, total_samples=10000, scales_with_gradient=True)
ROWS = np.array([[1.0, 0.0], [3.0, 0.0], [2.0, 2.0], [2.0, -2.0]])


def rows(values: Any) -> list[list[Tensor]]:
    """Gradients of two parameters, so that sums over parameters are seen."""
    return [[torch.tensor([x]), torch.tensor([[y]])] for x, y in np.asarray(values, dtype=float)]


def test_the_norm_test_of_the_worked_example():
    noise = gradient_noise(rows(ROWS))
    assert noise.variance == pytest.approx(10 / 3)
    assert noise.norm_squared == pytest.approx(4.0)
    assert batch_size_wanted(noise, "norm", eta=0.5, theta=0.5, nu=1.0) == pytest.approx(10 / 3)
    assert math.ceil(batch_size_wanted(noise, "norm", eta=0.25, theta=0.5, nu=1.0)) == 14


def test_the_other_tests_against_numpy():
    g = np.random.default_rng(0).normal(1.0, 2.0, (12, 2))
    mean = g.mean(0)
    square = mean @ mean
    along = (g @ mean).var(ddof=1)
    across = sum(((x - (x @ mean) / square * mean) ** 2).sum() for x in g) / (len(g) - 1)
    noise = gradient_noise(rows(g))
    assert noise.along == pytest.approx(along, rel=1e-5)
    inner = along / (0.7**2 * square**2)
    assert batch_size_wanted(noise, "inner_product", 0.5, 0.7, 1.0) == pytest.approx(inner, rel=1e-5)
    # Across: the deviations from the mean that are orthogonal to it.
    deviations = g - mean
    orthogonal = ((deviations - np.outer(deviations @ mean, mean) / square) ** 2).sum() / (len(g) - 1)
    assert noise.across == pytest.approx(orthogonal, rel=1e-4)
    assert across == pytest.approx(orthogonal)
    both = max(inner, orthogonal / (0.3**2 * square))
    assert batch_size_wanted(noise, "augmented", 0.5, 0.7, 0.3) == pytest.approx(both, rel=1e-4)


def test_groups_say_of_a_sample_what_samples_say():
    """Averaged over ways to divide the samples, the variance from groups is that of the samples."""
    generator = np.random.default_rng(1)
    g = generator.normal(0.5, 1.0, (24, 2))
    exact = g.var(0, ddof=1).sum()
    found = []
    for _ in range(400):
        parts = generator.permutation(g).reshape(6, 4, 2).mean(1)
        found.append(gradient_noise(rows(parts), samples=4).variance)
    assert np.mean(found) == pytest.approx(exact, rel=0.05)


def test_no_noise_wants_nothing_and_noise_alone_wants_everything():
    assert batch_size_wanted(gradient_noise(rows(np.ones((4, 2)))), "norm", 0.5, 0.5, 1.0) == 0
    alone = gradient_noise(rows([[1.0, 0.0], [-1.0, 0.0]]))
    assert batch_size_wanted(alone, "norm", 0.5, 0.5, 1.0) == math.inf


def observe(batching: AdaptiveBatch, gradients: Any) -> float:
    """One step on a linear loss, so that a sample's gradient is its row; what it spent."""
    w = nn.Parameter(torch.zeros(2))
    closure = Closure(lambda x: (x @ w).mean(), [w], torch.tensor(gradients, dtype=torch.float32))
    closure()
    with torch.no_grad():
        batching.observe([w], closure)
    return closure.evaluations


@pytest.mark.parametrize(("eta", "expected"), [(0.5, 4), (0.25, 14)])
def test_the_batch_grows_as_in_the_worked_example(eta: float, expected: int):
    batching = AdaptiveBatch(start=4, max_batch=100, eta=eta, every=1, groups=None)
    batching.begin(EXTENT)
    observe(batching, ROWS)
    assert batching.next(0, 0).samples == expected


def test_the_batch_never_shrinks_and_stops_at_the_largest():
    batching = AdaptiveBatch(start=20, max_batch=24, eta=0.25, every=1, groups=None)
    batching.begin(EXTENT)
    observe(batching, ROWS)
    assert batching.batch_size == 20
    observe(batching, [[1.0, 0.0], [-1.0, 0.0]])
    assert batching.batch_size == 24


def test_it_tests_every_few_steps_and_not_at_the_largest():
    batching = AdaptiveBatch(start=4, max_batch=14, eta=0.25, every=3, groups=4)
    batching.begin(EXTENT)
    assert [observe(batching, ROWS) for _ in range(7)] == [1, 1, 2, 1, 1, 1, 1]


def test_the_rate_answers_by_the_rule_of_the_method():
    assert rate_factor("auto", 128, EXTENT) == 4
    assert rate_factor("auto", 128, Extent(1000, 32, None, scales_with_gradient=False)) == 2
    assert rate_factor("none", 128, EXTENT) == 1
    batching = Constant(batch_size=128, lr_rule="linear")
    batching.begin(EXTENT)
    assert batching.next(0, 0).lr_factor == 4


def test_the_worked_schedule_of_multigrid():
    stages = long_cycles([0, 94, 154, 196], 239, epoch_factor=1.5)
    ends = [round(stage.until) for stage in stages]
    assert ends == [73, 110, 142, 158, 205, 228, 248, 259, 291, 308, 322, 329, 358]
    shapes = [stage.grids[-1] for stage in stages[:4]]
    assert [(round(grid.batch), round(grid.time * 32), round(grid.space * 224)) for grid in shapes] == [
        (8, 8, 158),
        (4, 16, 158),
        (2, 16, 224),
        (1, 32, 224),
    ]
    rates = [0.1**stage.index * stage.grids[-1].batch for stage in stages]
    assert rates == pytest.approx([8, 4, 2, 1, 0.8, 0.4, 0.2, 0.1, 0.08, 0.04, 0.02, 0.01, 0.001])


def test_multigrid_without_a_short_cycle():
    assert [len(stage.grids) for stage in long_cycles([0, 0.5], 1.0, IMAGES, short_cycle=False)] == [1, 1, 1, 1]


@pytest.mark.parametrize("space", [0.5, math.sqrt(0.5), 1.0])
def test_every_grid_has_the_same_volume(space: float):
    for grid in grids_of(0.5, space, short_cycle=True):
        assert grid.batch * grid.time * grid.space**2 == pytest.approx(1.0)
        assert grid.space <= space


def test_clips_lose_frames_and_sides():
    clip = torch.arange(4.0).view(1, 1, 4, 1, 1).expand(2, 3, 4, 8, 8)
    small = resized(clip, (2, 4, 4))
    assert small.shape == (2, 3, 2, 4, 4)
    assert small[0, 0, :, 0, 0].tolist() == [0.0, 3.0]
    batching = Multigrid(video=True)
    assert batching.reshape((clip, torch.zeros(2)), (0.5, 0.5))[0].shape == (2, 3, 2, 4, 4)


def test_sides_are_multiples():
    images = torch.zeros(2, 1, 28, 28)
    assert Multigrid(multiple=8).reshape([images], (1.0, math.sqrt(0.5)))[0].shape[-2:] == (16, 16)
    assert Multigrid().reshape([images], (1.0, math.sqrt(0.5)))[0].shape[-2:] == (20, 20)


REFUSED = {
    "more than the data has": (("adaptive_batch", "batching.max_batch=5000"), r"batching\.max_batch=5,000"),
    "start above the largest": (("adaptive_batch", "batching.start=64", "batching.max_batch=32"), "larger than it may"),
    "a multiple the data cannot fill": (("multigrid", "data.batch_size=400"), "cannot fill a batch of 1,600"),
    "a horizon in steps": (("multigrid", "trainer.max_steps=9"), "how many samples it will see"),
    "stages that do not ascend": (("multigrid", "batching.stages=[0.5,0.2]"), "no stages"),
    "an empty batch": (("constant", "batching.batch_size=0"), "batch_size"),
    "scaled gradients": (("adaptive_batch", "trainer.precision=16-mixed"), "16-mixed"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_named(tmp_path: Path, what: str):
    (name, *options), match = REFUSED[what]
    with pytest.raises(UserError, match=match):
        lightrail.compose(
            [f"+batching={name}", *options, "logger=[csv]", "trainer.accelerator=cpu", f"run.root={tmp_path}"]
        ).execute(show_progress=False)


def test_inputs_without_a_size_are_named():
    with pytest.raises(UserError, match="no inputs whose size"):
        Multigrid().reshape((torch.zeros(2, 5, dtype=torch.long),), (1.0, 0.5))
    with pytest.raises(UserError, match=r"inputs \[2, 64\]"):
        Multigrid().reshape((torch.zeros(2, 64),), (1.0, 0.5))


@pytest.mark.parametrize(
    ("name", "options"),
    [("adaptive_batch", ("batching.start=8", "batching.every=5")), ("multigrid", ("model=resnet",))],
)
def test_a_run_changes_its_batch_and_shows_it(tmp_path: Path, name: str, options: tuple[str, ...]):
    run = lightrail.compose(
        [
            f"+batching={name}",
            "model=mlp",
            *options,
            "trainer.max_epochs=1",
            "trainer.accelerator=cpu",
            "trainer.log_every_n_steps=2",
            "logger=[csv]",
            f"run.root={tmp_path}",
        ]
    )
    result = run.execute(show_progress=False)
    with open(result.folder / "metrics.csv", newline="") as file:
        logged = [row for row in csv.DictReader(file) if row["batch_size"]]
    assert len({float(row["batch_size"]) for row in logged}) > 1
    assert any(row[name + {"adaptive_batch": "/batch_size_wanted", "multigrid": "/side"}[name]] for row in logged)
    assert "Batch size" in (result.folder / "report.html").read_text()
