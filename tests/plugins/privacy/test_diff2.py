# pyright: reportMissingImports=false
"""DIFF2: its noise, its differences, and what it becomes where nothing is clipped or everything starts anew."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from privacy_runs import Module, compose, only, points, sample_gradients, told, watched
from private_descent import Descent, GivenRelease, descend, logistic, sampled
from run_plugins import Signals
from torch import Tensor

from lightrail.errors import CompositionError, ConfigurationError, Interrupted, NonFiniteLoss
from lightrail.privacy import PrivateHorizon
from lightrail.privacy.accounting import epsilon_of
from lightrail.privacy.events import Event
from lightrail.sample_gradients import SampleGradients
from lightrail.sample_gradients.pieces import LinearPiece
from lightrail_privacy.diff2 import DIFF2
from lightrail_privacy.dp_sgd import DPSGD
from lightrail_privacy.gradient_differences import anchors_between, clipped_sum, distance, shared_noise

MU = 0.268051  # of a Gaussian release that has epsilon 1 at delta 1e-5
START = torch.linspace(-1, 1, 5, dtype=torch.float64)
UNCLIPPED: dict[str, Any] = {"clip_norm": 1e6, "smoothness": 1e6}


def ran(method: Any, steps: int = 12, records: int = 40, start: Tensor = START, **options: Any) -> Descent:
    gradient, _ = logistic(records, len(start))
    return descend(method, gradient, start, PrivateHorizon(records, records, steps), **options)


# The noise.


def test_noises_of_a_run_of_200_steps_with_4_anchors() -> None:
    run, noise = PrivateHorizon(1000, 1000, 200), math.sqrt(200) / MU
    method = DIFF2(noise=noise, restart=50)
    assert method.noise_at(0, noise, run) == pytest.approx(10.5518, abs=1e-4)
    assert method.noise_at(199, noise, run) == pytest.approx(73.8627, abs=2e-4)
    planned = method.events(noise, run)
    assert [(each.steps, each.batch, each.records) for each in planned] == [(4, 1000, 1000), (196, 1000, 1000)]
    assert epsilon_of(planned, 1e-5) == pytest.approx(1.0, abs=2e-4)


@pytest.mark.parametrize("restart", [1, 7, 200, None, 0.1])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_run_costs_as_much_as_its_noise_in_every_step(restart: Any, share: float) -> None:
    run = PrivateHorizon(50, 50, 200)
    method = DIFF2(noise=3.0, restart=restart, share=share)
    costs = [method.noise_at(step, 3.0, run) ** -2 for step in range(200)]
    assert sum(costs) == pytest.approx(200 / 9)
    period = method.period(run)
    if period > 1:
        assert sum(costs[::period]) == pytest.approx(share * 200 / 9)


@pytest.mark.parametrize("first", [0, 1, 50, 99, 100])
def test_planned_events_are_those_of_the_steps(first: int) -> None:
    run = PrivateHorizon(30, 30, 100)
    method = DIFF2(noise=2.0, restart=7)
    planned = method.events(2.0, run, first)
    steps = [Event(method.noise_at(t, 2.0, run), 1, 30, 30) for t in range(first, 100)]
    for noise in {each.noise for each in steps}:
        assert sum(e.steps for e in planned if e.noise == noise) == sum(e.noise == noise for e in steps)
    assert sum(e.steps for e in planned) == len(steps)


def test_anchors_are_counted() -> None:
    for period in (1, 3, 50):
        for first in range(12):
            for end in range(first, 12):
                assert anchors_between(first, end, period) == sum(t % period == 0 for t in range(first, end))


def test_one_noise_for_both_kinds_would_cost_the_same_and_be_another() -> None:
    assert shared_noise(2.0, 10, 10, 0.5) == (2.0, math.inf)
    z_1, z_2 = shared_noise(1.0, steps=100, anchors=1, share=0.5)
    assert z_1 == pytest.approx(math.sqrt(1 / 50))
    assert z_2 == pytest.approx(math.sqrt(99 / 50))


# The differences.


def test_without_clipping_and_noise_it_is_the_exact_gradient_at_every_step() -> None:
    gradient, rows = logistic(40, 5)
    found = ran(DIFF2(noise=0.0, restart=None, **UNCLIPPED), steps=60)
    for w, v in zip(found.points, found.gradients, strict=False):
        torch.testing.assert_close(v, gradient(w, rows).mean(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_a_restart_in_every_step_is_dp_gd_bit_for_bit(noise: float) -> None:
    one = ran(DIFF2(noise=noise, restart=1, clip_norm=0.3), noise=noise)
    other = ran(DPSGD(noise=noise, clip_norm=0.3, sampling="full"), noise=noise)
    assert one.released == other.released == [(0.3, noise)] * 12
    assert all(torch.equal(a, b) for a, b in zip(one.points, other.points, strict=True))


def test_two_steps_by_hand() -> None:
    def gradient(w: Tensor, rows: Tensor) -> Tensor:
        return w * torch.tensor([[1.0], [3.0]], dtype=torch.float64)[rows]

    start = torch.tensor([2.0], dtype=torch.float64)
    found = descend(
        DIFF2(noise=0.0, clip_norm=4.0, smoothness=2.0), gradient, start, PrivateHorizon(2, 2, 2), rate=lambda t: 0.1
    )
    # 2 and 6, of which 4 is left; then a step of 0.3 changes them by 0.3 and 0.9, of which 0.6 is left.
    assert found.gradients[0].item() == pytest.approx(3.0)
    assert found.points[1].item() == pytest.approx(1.7)
    assert found.gradients[1].item() == pytest.approx(3.0 - (0.3 + 0.6) / 2)
    assert [sensitivity for sensitivity, _ in found.released] == pytest.approx([4.0, 0.6])


def test_the_radius_is_that_of_the_iterates() -> None:
    found = ran(DIFF2(noise=1.0, restart=5, smoothness=0.3), noise=1.0)
    for step, (sensitivity, _) in enumerate(found.released):
        moved = float((found.points[step] - found.points[step - 1]).norm()) if step else 0
        assert sensitivity == pytest.approx(0.3 * moved if step % 5 else 1.0, rel=1e-12)


def test_one_record_moves_the_sum_of_a_step_by_the_radius_at_most() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.zeros(50)
    for length in (1e-6, 1.0, 1e6):
        g = torch.randn(9, 50, generator=generator)
        close = g + length * torch.randn(9, 50, generator=generator) / 7
        for radius in (length / 10, length, 10 * length):
            for i in range(9):
                moved = clipped_sum(sampled(w, g[i : i + 1]).minus(sampled(w, close[i : i + 1])), radius)[0].norm()
                assert moved <= radius * (1 + 1e-5)
    assert not clipped_sum(sampled(w, g), 0.0)[0].any()


def test_differences_of_close_iterates_are_not_lost_to_rounding() -> None:
    """At a distance of 1e-6 the products of norms are 1e12 times what is looked for."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 4, 8, dtype=torch.float64), torch.randn(16, 4, 6, dtype=torch.float64)
    shift = 1e-6 * torch.randn(8, dtype=torch.float64)
    w = torch.zeros(6, 8)

    def of(inputs: Tensor, rows: Sequence[int] = range(16)) -> SampleGradients:
        return SampleGradients([w], [[LinearPiece(w, inputs[list(rows)], y[list(rows)].float())]])

    here, there = x.float(), (x + shift).float()
    exact = torch.einsum("btp,btd->bpd", y.float().double(), here.double() - there.double())
    norms = exact.flatten(1).norm(dim=1)
    difference = of(here).minus(of(there))
    torch.testing.assert_close(difference.norms().double(), norms, rtol=0.2, atol=0)
    radius = float(norms.median())
    factors = (radius / norms).clamp(max=1)
    wanted = torch.einsum("b,bpd->pd", factors, exact)
    found = clipped_sum(difference, radius)[0].double()
    assert float((found - wanted).norm() / wanted.norm()) < 0.2
    for i in range(16):
        alone = clipped_sum(of(here, [i]).minus(of(there, [i])), radius)[0]
        assert alone.norm() <= radius * (1 + 1e-5)


def test_where_the_iterates_coincide_nothing_is_asked_and_the_gradient_stays() -> None:
    found = ran(DIFF2(noise=2.0), noise=2.0, rate=lambda step: 0.0 if step < 3 else 0.5)
    assert all(torch.equal(v, found.gradients[0]) for v in found.gradients[:4])
    assert not torch.equal(found.gradients[4], found.gradients[3])
    # What is spent is what was planned, so that no step is thought to be without noise.
    assert [sensitivity for sensitivity, _ in found.released[:4]] == [1.0, 0.0, 0.0, 0.0]
    assert len({noise for _, noise in found.released[1:]}) == 1
    method = DIFF2(noise=1.0)
    method.load_state_dict({"v": [START], "w_before": [START], "step": 1})
    method.prepare(PrivateHorizon(4, 4, 9))
    assert method.elsewhere([START.clone()]) is None
    # Differences so small that their squares vanish could not be bounded.
    assert method.elsewhere([START + 1e-15]) is None
    assert method.elsewhere([START + 1e-14]) is not None


def test_a_step_by_parts_is_that_of_the_whole() -> None:
    whole, parts = (ran(DIFF2(noise=0.0, restart=4), parts=parts) for parts in (1, 7))
    torch.testing.assert_close(whole.points, parts.points, rtol=0, atol=1e-14)


def test_what_is_handed_out_can_be_changed_in_place() -> None:
    method = DIFF2(noise=0.0, **UNCLIPPED)
    handing = method.gradient

    def spoiled(sums: Any, params: Any, release: Any) -> list[Tensor]:
        found = handing(sums, params, release)
        kept = [each.clone() for each in found]
        for each in found:
            each.zero_()
        return kept

    method.gradient = spoiled  # type: ignore[method-assign]
    assert torch.equal(ran(method).points[-1], ran(DIFF2(noise=0.0, **UNCLIPPED)).points[-1])


def test_a_state_goes_on_exactly() -> None:
    method, other = (DIFF2(noise=1.0, restart=5) for _ in range(2))
    gradient, rows = logistic(40, 5)
    run = PrivateHorizon(40, 40, 12)

    def step(method: DIFF2, w: Tensor, step: int) -> Tensor:
        elsewhere = method.elsewhere([w])
        there = None if elsewhere is None else sampled(w, gradient(elsewhere[0], rows))
        sums = method.contribution(sampled(w, gradient(w, rows)), there)
        (g,) = method.gradient(sums, [w], GivenRelease(run, 1.0, seed=step, step=step, batch=40))
        return w - 0.5 * g

    w = START
    method.prepare(run)
    for t in range(8):
        w = step(method, w, t)
    state, at = copy.deepcopy(method.state_dict()), w.clone()
    for t in range(8, 12):
        w = step(method, w, t)
    other.prepare(run)
    other.load_state_dict(state)
    for t in range(8, 12):
        at = step(other, at, t)
    assert torch.equal(w, at)


# What is refused.


@pytest.mark.parametrize(
    "options",
    [
        {"clip_norm": 0.0}, {"smoothness": -1.0}, {"share": 0.0}, {"share": 1.0}, {"restart": 0}, {"restart": 1.5},
        {"restart": -3}, {"sampling": "poisson"}, {"clip_norm": math.inf}, {"restart": math.inf}, {"restart": True},
    ],
)  # fmt: skip
def test_options_out_of_range_are_told(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as error:
        DIFF2(noise=1.0, **options)
    assert next(iter(options)) in error.value.found


def test_parameters_that_come_and_go_or_explode_are_told() -> None:
    with pytest.raises(CompositionError, match="which parameters are trained has changed"):
        distance([torch.zeros(2), torch.zeros(3)], [torch.zeros(2)])
    with pytest.raises(NonFiniteLoss, match="not finite"):
        distance([torch.tensor([math.nan])], [torch.zeros(1)])
    assert distance([torch.zeros(0)], [torch.zeros(0)]) == 0.0


# The promise, and its price.


def test_at_the_same_learning_rate_it_ends_at_a_smaller_gradient_than_dp_gd() -> None:
    gradient, rows = logistic(2000, 50)
    run, noise = PrivateHorizon(2000, 2000, 800), math.sqrt(800) / MU
    start = torch.zeros(50, dtype=torch.float64)

    def outside(w: Tensor) -> Tensor:
        return 0.2 * w / (1 + w * w) ** 2

    def last(restart: int | None) -> float:
        method = DIFF2(noise=noise, clip_norm=1.2, smoothness=0.6, restart=restart)
        found = descend(method, gradient, start, run, noise=noise, rate=lambda _: 0.1, outside=outside)
        w = found.points[-1]
        return float((gradient(w, rows).mean(0) + outside(w)).square().sum())

    # 2.1e-3 and 7.3e-4.
    assert last(None) < 0.5 * last(1)


def test_its_noise_feeds_on_itself_at_large_steps() -> None:
    """Where gradients are constant, each step multiplies ‖v‖² by 1 + (lr C2 z2 / n)² d on average."""
    d, noise, run = 4000, 3.0, PrivateHorizon(10, 10, 30)
    method, start = DIFF2(noise=noise, smoothness=0.2), torch.zeros(d, dtype=torch.float64)
    found = descend(method, lambda w, rows: torch.zeros(len(rows), d).double(), start, run, noise=noise)
    factor = 1 + (0.5 * 0.2 * method.noise_at(1, noise, run) / 10) ** 2 * d
    grown = [float(b.norm() / a.norm()) ** 2 for a, b in zip(found.gradients, found.gradients[1:], strict=False)]
    assert sum(grown) / len(grown) == pytest.approx(factor, rel=0.02)


# In a whole run.

RUN = ("privacy.noise=1", "optimizer.lr=0.3", "privacy.accountant=rdp", "trainer.max_epochs=6")


def own(method: str, *options: str) -> list[str]:
    return [f"+privacy={method}", "privacy.sampling=full", "privacy.deterministic_noise=true", *options]


def test_a_restart_in_every_step_trains_as_dp_gd(tmp_path: Path) -> None:
    one = watched(compose(tmp_path / "a", *own("diff2", "privacy.restart=1", *RUN)))
    other = watched(compose(tmp_path / "b", *own("dp_sgd", *RUN)))
    assert len(one.gradients) == 6
    assert all(torch.equal(a, b) for a, b in zip(one.gradients, other.gradients, strict=True))


def test_a_run_follows_the_equation_and_spends_what_was_planned(tmp_path: Path) -> None:
    """Without noise, against gradients of the samples taken one by one."""
    options = ["privacy.noise=0", "privacy.clip_norm=0.5", "privacy.smoothness=0.4", "privacy.restart=4", *RUN[1:]]
    watch = watched(compose(tmp_path, *own("diff2", *options)))
    dataset, v = points(), torch.zeros(())
    for step, (w, gradient) in enumerate(zip(watch.before, watch.gradients, strict=True)):
        g, radius = sample_gradients(Module(), w, dataset), 0.5
        if step % 4:
            before = watch.before[step - 1]
            g, radius = g - sample_gradients(Module(), before, dataset), 0.4 * float((w - before).norm())
        mean = (g * (radius / g.norm(dim=1, keepdim=True)).clamp(max=1)).mean(0)
        v = v + mean if step % 4 else mean
        torch.testing.assert_close(gradient, v, rtol=1e-4, atol=1e-6)


def test_the_ledger_is_that_of_both_noises(tmp_path: Path) -> None:
    run = compose(tmp_path, "+privacy=diff2", "privacy.epsilon=2", "privacy.restart=3", "trainer.max_epochs=6")
    run.execute(show_progress=False)
    ledger = told(only(tmp_path))
    assert ledger["epsilon"] == pytest.approx(ledger["planned_epsilon"], rel=1e-6)
    assert ledger["epsilon"] == pytest.approx(2.0, rel=2e-3)
    steps = [(each["steps"], each["batch"]) for each in ledger["events"]]
    assert steps == [(1, 64), (2, 64), (1, 64), (2, 64)]
    noises = [each["noise"] for each in ledger["events"]]
    assert noises[0] / noises[1] == pytest.approx(math.sqrt(2 / 4))


def test_a_stopped_run_goes_on_exactly(tmp_path: Path) -> None:
    options = own("diff2", "privacy.restart=4", *RUN)
    whole = watched(compose(tmp_path / "whole", *options))
    stopped = compose(tmp_path / "stopped", *options)
    stopped.callbacks = [*stopped.callbacks, Signals(2)]
    with pytest.raises(Interrupted):
        stopped.execute(show_progress=False)
    rest = watched(compose(tmp_path / "stopped", *options, f"run.resume={only(tmp_path / 'stopped')}"))
    assert len(rest.gradients) in (3, 4)
    assert torch.equal(rest.gradients[-1], whole.gradients[-1])
    assert torch.equal(rest.before[-1], whole.before[-1])


@pytest.mark.parametrize("engine", ["one_pass", "one_by_one"])
def test_dropout_is_the_same_at_both_points(tmp_path: Path, engine: str) -> None:
    seen: list[tuple[int, Tensor, Tensor]] = []
    run = compose(tmp_path, *own("diff2", f"privacy.engine={engine}", *RUN), task="private_descent.Dropped")
    run.task.seen = seen  # type: ignore[assignment]
    run.execute(show_progress=False)
    # Micro-batches; whatever has other sizes belongs to the proof that some steps repeat.
    rows = (21, 22) if engine == "one_pass" else (1,)
    for step in range(1, 6):
        masks = [(w, mask) for at, w, mask in seen if at == step and len(mask) in rows]
        here = torch.cat([mask for w, mask in masks if torch.equal(w, masks[0][0])])
        there = torch.cat([mask for w, mask in masks if not torch.equal(w, masks[0][0])])
        assert here.shape == there.shape == (64, 8)
        assert torch.equal(here, there)
        assert 0.3 < here.float().mean() < 0.7
