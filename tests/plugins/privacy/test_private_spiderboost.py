# pyright: reportMissingImports=false
"""Private SpiderBoost: its batches and noises, and what it becomes where phases or batches leave nothing of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from privacy_runs import compose, only, told, watched
from private_descent import Descent, descend, logistic
from run_plugins import Signals
from torch import Tensor

from lightrail.errors import ConfigurationError, Interrupted
from lightrail.privacy import PrivateHorizon
from lightrail_privacy.diff2 import DIFF2
from lightrail_privacy.dp_sgd import DPSGD
from lightrail_privacy.gradient_differences import shared_noise
from lightrail_privacy.private_spiderboost import PrivateSpiderBoost

START = torch.linspace(-1, 1, 5, dtype=torch.float64)
RUN = PrivateHorizon(records=60, batch=6, steps=20)


def ran(method: Any, horizon: PrivateHorizon = RUN, start: Tensor = START, **options: Any) -> Descent:
    return descend(method, logistic(horizon.records, len(start))[0], start, horizon, **options)


def same(one: Descent, other: Descent) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.points, other.points, strict=True))


# Its batches and its noise.


@pytest.mark.parametrize(
    ("options", "batch", "anchor"),
    [({}, 3, 48), ({}, 10, 60), ({"anchor_batch": 30}, 6, 30), ({"sampling": "full"}, 6, 60)],
)
def test_anchors_have_large_batches(options: dict[str, Any], batch: int, anchor: int) -> None:
    method, run = PrivateSpiderBoost(noise=1.0, phase=4, **options), PrivateHorizon(60, batch, 9)
    method.prepare(run)
    other = 60 if "sampling" in options else batch
    assert [method.batch_at(step, run) for step in range(9)] == [anchor, other, other, other] * 2 + [anchor]


@pytest.mark.parametrize(
    ("options", "records"), [({"anchor_batch": 61}, 60), ({"anchor_batch": 30, "sampling": "full"}, 60)]
)
def test_an_anchor_of_more_records_than_there_are_is_refused(options: dict[str, Any], records: int) -> None:
    with pytest.raises(ConfigurationError, match="cannot have so many records") as error:
        PrivateSpiderBoost(noise=1.0, **options).prepare(PrivateHorizon(records, 6, 9))
    assert "anchor_batch" in error.value.found


@pytest.mark.parametrize("rates", [(1.0, 1.0), (0.5, 0.1), (0.01, 6e-4)])
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_the_ratio_of_the_noises_is_that_of_the_closed_forms(rates: tuple[float, float], share: float) -> None:
    z_1, z_2 = shared_noise(2.0, 1000, 20, share, rates)
    paper = [max(1, q * math.sqrt(R)) for q, R in zip(rates, (20, 980), strict=True)]
    assert z_1 / z_2 == pytest.approx(paper[0] / paper[1] * math.sqrt((1 - share) / share))


def test_planned_events_are_those_of_the_steps() -> None:
    method = PrivateSpiderBoost(noise=1.5, phase=7, anchor_batch=40)
    for first in (0, 1, 7, 19, 20):
        planned = {(e.noise, e.batch): e.steps for e in method.events(1.5, RUN, first)}
        steps = [(method.noise_at(t, 1.5, RUN), method.batch_at(t, RUN)) for t in range(first, 20)]
        assert planned == {kind: steps.count(kind) for kind in set(steps)}


# What it becomes.


@pytest.mark.parametrize("noise", [0.0, 0.8])
@pytest.mark.parametrize("anchor_batch", [6, 25])
def test_with_phases_of_one_step_it_is_dp_sgd(noise: float, anchor_batch: int) -> None:
    one = ran(PrivateSpiderBoost(noise=noise, phase=1, anchor_batch=anchor_batch, lipschitz=0.3), noise=noise)
    run = PrivateHorizon(60, anchor_batch, 20)
    other = ran(DPSGD(noise=noise, clip_norm=0.3), run, noise=noise)
    assert same(one, other)
    assert one.released == other.released


@pytest.mark.parametrize("options", [{"sampling": "full"}, {"anchor_batch": 60}])
def test_on_all_records_it_is_diff2(options: dict[str, Any]) -> None:
    run = PrivateHorizon(60, 60, 20)
    spider = PrivateSpiderBoost(noise=0.7, phase=5, lipschitz=0.4, smoothness=0.3, **options)
    one = ran(spider, run, noise=0.7)
    other = ran(DIFF2(noise=0.7, restart=5, clip_norm=0.4, smoothness=0.3), run, noise=0.7)
    assert same(one, other)
    assert one.released == other.released


def test_without_clipping_and_noise_on_all_records_it_is_the_exact_gradient() -> None:
    gradient, rows = logistic(60, 5)
    found = ran(PrivateSpiderBoost(noise=0.0, sampling="full", phase=50, lipschitz=1e6, smoothness=1e6))
    for w, v in zip(found.points, found.gradients, strict=False):
        torch.testing.assert_close(v, gradient(w, rows).mean(0), rtol=0, atol=1e-12)


def test_a_radius_is_twice_the_largest_gradient_at_most() -> None:
    method = PrivateSpiderBoost(noise=1.0, phase=5, lipschitz=0.1, smoothness=0.5)
    found = ran(method, noise=1.0, rate=lambda step: 100.0 if step % 2 else 0.01)
    radii = [sensitivity for step, (sensitivity, _) in enumerate(found.released) if step % 5]
    moved = [float((b - a).norm()) for a, b in zip(found.points, found.points[1:], strict=False)]
    wanted = [min(0.5 * moved[step - 1], 0.2) for step in range(20) if step % 5]
    assert radii == pytest.approx(wanted, rel=1e-12)
    assert 0 < sum(radius == 0.2 for radius in radii) < len(radii)


def test_differences_are_of_the_samples_of_the_step() -> None:
    """Without noise and clipping, on batches: the sum over the batch, divided by the expected size."""
    gradient, _ = logistic(60, 5)
    seen: list[Tensor] = []

    def watched_gradient(w: Tensor, rows: Tensor) -> Tensor:
        seen.append(rows)
        return gradient(w, rows)

    method = PrivateSpiderBoost(noise=0.0, phase=3, anchor_batch=20, lipschitz=1e6, smoothness=1e6)
    found = descend(method, watched_gradient, START, PrivateHorizon(60, 6, 6))
    rows = iter(seen)
    v = torch.zeros(5, dtype=torch.float64)
    for step in range(6):
        mine = next(rows)
        if step % 3 == 0:
            v = gradient(found.points[step], mine).sum(0) / 20
        else:
            assert torch.equal(next(rows), mine)
            v = v + (gradient(found.points[step], mine) - gradient(found.points[step - 1], mine)).sum(0) / 6
        torch.testing.assert_close(found.gradients[step], v, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "options",
    [
        {"lipschitz": 0.0}, {"smoothness": 0.0}, {"phase": 0}, {"phase": 1.5}, {"anchor_batch": 0}, {"share": 1.0},
        {"sampling": "shuffle"}, {"smoothness": math.inf},
    ],
)  # fmt: skip
def test_options_out_of_range_are_told(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as error:
        PrivateSpiderBoost(noise=1.0, **options)
    assert next(iter(options)) in error.value.found


# In a whole run.

SPIDER = ("+privacy=private_spiderboost", "privacy.deterministic_noise=true", "privacy.accountant=rdp")
NOISE = ("privacy.noise=1", "optimizer.lr=0.3")


def test_phases_of_one_step_train_as_dp_sgd(tmp_path: Path) -> None:
    one = watched(compose(tmp_path / "a", *SPIDER, *NOISE, "privacy.phase=1", "privacy.anchor_batch=8"))
    other = watched(compose(tmp_path / "b", "+privacy=dp_sgd", *SPIDER[1:], *NOISE))
    assert one.records == other.records
    assert len(one.gradients) == 8
    assert all(torch.equal(a, b) for a, b in zip(one.gradients, other.gradients, strict=True))


def test_every_step_draws_at_the_rate_that_it_is_accounted_for(tmp_path: Path) -> None:
    options = ("privacy.phase=3", "privacy.anchor_batch=64", "data.batch_size=8")
    found = watched(compose(tmp_path, *SPIDER, *NOISE, *options))
    sizes = [len(records) for records in found.records]
    assert len(sizes) == 8
    assert all((size == 64) == (step % 3 == 0) for step, size in enumerate(sizes))


def test_a_stopped_run_goes_on_exactly(tmp_path: Path) -> None:
    options = (*SPIDER, *NOISE, "privacy.phase=3", "privacy.anchor_batch=32")
    whole = watched(compose(tmp_path / "whole", *options))
    stopped = compose(tmp_path / "stopped", *options)
    stopped.callbacks = [*stopped.callbacks, Signals(4)]
    with pytest.raises(Interrupted):
        stopped.execute(show_progress=False)
    rest = watched(compose(tmp_path / "stopped", *options, f"run.resume={only(tmp_path / 'stopped')}"))
    assert rest.records[-1] == whole.records[-1]
    assert torch.equal(rest.gradients[-1], whole.gradients[-1])


def test_the_ledger_has_both_rates_and_both_noises(tmp_path: Path) -> None:
    options = ("privacy.noise=2", "privacy.phase=4", "privacy.anchor_batch=32")
    compose(tmp_path, SPIDER[0], *options).execute(show_progress=False)
    ledger = told(only(tmp_path))
    z_1, z_2 = shared_noise(2.0, 8, 2, 0.5, (32 / 64, 8 / 64))
    anchor = {"noise": z_1, "steps": 1, "batch": 32, "records": 64}
    other = {"noise": z_2, "steps": 3, "batch": 8, "records": 64}
    assert ledger["events"] == [anchor, other] * 2
    assert ledger["planned"] == [{**anchor, "steps": 2}, {**other, "steps": 6}]
    assert ledger["epsilon"] == pytest.approx(ledger["planned_epsilon"], rel=1e-6)
