"""The refined schedule: what a first run records, and what a second run makes of it."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import median_filter
from torch import nn

from lightrail import Closure, TransformedOptimizer
from lightrail.errors import ConfigurationError
from lightrail.traits import traits_of
from lightrail_optimizers.transforms.clip_norm import ClipNorm
from lightrail_schedules import linear_decay
from lightrail_schedules import refined as refined_schedule
from lightrail_schedules.gradient_norms import GradientNorms, norms_of, read_norms
from lightrail_schedules.refined import median_filtered, refined_shape

# Its schedulers have more methods than torch's class declares.
refined: Any = refined_schedule

G = (4.0, 2.0, 1.0, 1.0, 2.0)
BY_L2 = [0.125, 0.45, 1.0, 0.2, 0.0]  # of the largest: .0609756, .2195122, .4878049, .0975610, 0
BY_L1 = [0.5, 5 / 6, 1.0, 1 / 3, 0.0]  # .2307692, .3846154, .4615385, .1538462, 0


def make(lr=1.0, kind: Any = torch.optim.SGD):
    return kind([nn.Parameter(torch.zeros(2))], lr=lr)


def run_folder(path, l2, l1=None):
    """A folder with the record of a run whose gradient norms are these."""
    path.mkdir(exist_ok=True)
    norms = GradientNorms(len(l2))
    for step, pair in enumerate(zip(l2, l1 or l2, strict=True)):
        norms.put(step, torch.tensor(pair, dtype=torch.float64))
    norms.write(str(path))
    return str(path)


def rates(optimizer, schedule, count):
    found = []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def second(folder, total, kind: Any = torch.optim.SGD, lr=1.0, **options):
    optimizer = make(lr, kind)
    return rates(optimizer, refined(optimizer, total, from_run=folder, **options), total)


class TestShape:
    def test_the_numbers_of_the_sheet(self):
        assert refined_shape(np.array(G), 2).tolist() == pytest.approx(BY_L2, abs=1e-12)
        assert refined_shape(np.array(G), 1).tolist() == pytest.approx(BY_L1, abs=1e-12)
        published = np.array([0.0609756, 0.2195122, 0.4878049, 0.0975610, 0])
        assert refined_shape(np.array(G), 2) == pytest.approx(published / published.max(), abs=1e-6)
        published = np.array([0.2307692, 0.3846154, 0.4615385, 0.1538462, 0])
        assert refined_shape(np.array(G), 1) == pytest.approx(published / published.max(), abs=1e-6)

    @pytest.mark.parametrize("power", [1.0, 2.0])
    def test_gradients_that_are_all_alike_give_a_straight_line(self, power):
        assert refined_shape(np.full(5, 3.0), power).tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0], abs=1e-12)

    def test_it_does_not_know_the_unit_of_the_gradient(self):
        for unit in (1e-200, 1e200):
            assert refined_shape(unit * np.array(G), 2).tolist() == pytest.approx(BY_L2, abs=1e-12)

    def test_large_gradients_at_first_warm_up_and_small_ones_at_last_fall_fast(self):
        progress = np.linspace(0, 1, 500)
        shape = refined_shape(1 + 5 * np.exp(-progress / 0.02), 2)
        assert shape[0] < 0.05
        assert 20 < shape.argmax() < 100
        sinking = refined_shape(1.2 - progress, 2)
        assert sinking.argmax() > 300
        assert sinking[-1] == 0


class TestMedian:
    def test_by_hand(self):
        # Width 3: the first value goes on before the start, the last but one comes after the end.
        assert median_filtered(np.array([9.0, 1.0, 2.0, 50.0, 4.0]), 0.4).tolist() == [9, 2, 2, 4, 50]

    def test_a_width_of_one_changes_nothing(self):
        g = np.random.default_rng(0).random(19)
        assert median_filtered(g, 0.1).tolist() == g.tolist() == median_filtered(g, 0.0).tolist()

    @pytest.mark.parametrize(("count", "tau"), [(2, 1.0), (20, 0.1), (50, 0.1), (101, 0.3), (40, 1.0), (997, 0.1)])
    def test_it_is_scipys_with_the_edges_of_the_published_code(self, count, tau):
        g = np.random.default_rng(count).random(count)
        width = 2 * (int(tau * count) // 2) + 1
        pad = 2 * width
        theirs = median_filter(np.pad(g, (0, pad), mode="reflect"), size=width, mode="nearest")[:-pad]
        assert median_filtered(g, tau).tolist() == theirs.tolist()


class TestFirstRun:
    def test_it_is_linear_decay_bit_for_bit(self):
        for options in ({}, {"warmup_steps": 0.2}):
            mine, theirs = make(0.3), make(0.3)
            expected = rates(theirs, linear_decay(theirs, 20, **options), 25)
            assert rates(mine, refined(mine, 20, **options), 25) == expected

    def test_it_records_the_raw_gradient_of_every_step(self, tmp_path):
        w = nn.Parameter(torch.tensor([3.0, -4.0]))
        optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=0.5), [ClipNorm(max_norm=0.1)])
        schedule = refined(optimizer, 4, folder=str(tmp_path))
        optimizer.observers.append(schedule.observe)
        expected = []
        for _ in range(4):
            expected.append((w.detach().norm().item(), w.detach().abs().sum().item()))
            optimizer.step(Closure(lambda: (w**2).sum() / 2, [w]))
            assert schedule.logged() == pytest.approx({"gradient_norm": expected[-1][0]})
            schedule.step()
        rows = list(csv.reader((tmp_path / "gradient_norms.csv").open()))
        assert rows[0] == ["step", "l2", "l1"]
        assert [int(row[0]) for row in rows[1:]] == [0, 1, 2, 3]
        for row, (l2, l1) in zip(rows[1:], expected, strict=True):
            assert (float(row[1]), float(row[2])) == pytest.approx((l2, l1), rel=1e-6)
        assert str(tmp_path) in schedule.notes[0]

    def test_the_file_is_written_every_twentieth_of_the_run_and_at_its_end(self, tmp_path, monkeypatch):
        written = []
        monkeypatch.setattr(GradientNorms, "write", lambda self, folder: written.append(len(self.rows())))
        optimizer = make()
        (w,) = optimizer.param_groups[0]["params"]
        w.grad = torch.ones(2)
        schedule = refined(optimizer, 110, folder=str(tmp_path))
        for _ in range(115):
            schedule.observe([w], None)
            optimizer.step()
            schedule.step()
        assert written == [*range(5, 111, 5)]

    def test_without_a_folder_nothing_is_written(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        optimizer = make()
        (w,) = optimizer.param_groups[0]["params"]
        w.grad = torch.ones(2)
        schedule = refined(optimizer, 1)
        schedule.observe([w], None)
        assert list(tmp_path.iterdir()) == []
        assert schedule.notes == []

    def test_a_resumed_run_records_on(self, tmp_path):
        def train(schedule, optimizer, steps):
            (w,) = optimizer.param_groups[0]["params"]
            for t in steps:
                w.grad = torch.full((2,), 1.0 + t)
                schedule.observe([w], None)
                optimizer.step()
                schedule.step()

        whole, cut = tmp_path / "whole", tmp_path / "cut"
        whole.mkdir()
        cut.mkdir()
        optimizer = make()
        train(refined(optimizer, 700, folder=str(whole)), optimizer, range(700))
        optimizer = make()
        schedule = refined(optimizer, 700, folder=str(cut))
        train(schedule, optimizer, range(300))
        torch.save(schedule.state_dict(), tmp_path / "state")
        optimizer = make()
        schedule = refined(optimizer, 700, folder=str(cut))
        schedule.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        train(schedule, optimizer, range(300, 700))
        name = "gradient_norms.csv"
        assert (cut / name).read_text() == (whole / name).read_text()
        assert len((cut / name).read_text().splitlines()) == 701

    def test_a_step_that_was_not_seen_is_left_out_and_interpolated(self, tmp_path):
        norms = GradientNorms(5)
        for step, value in ((0, 1.0), (1, 2.0), (3, 4.0)):
            norms.put(step, torch.tensor([value, 2 * value]))
        norms.put(7, torch.ones(2))
        norms.write(str(tmp_path))
        assert (tmp_path / "gradient_norms.csv").read_text().splitlines()[3] == "3,4.0,8.0"
        assert read_norms(str(tmp_path), "l1").tolist() == [2, 4, 6, 8]

    def test_only_a_first_run_watches(self):
        assert traits_of(refined).watches_gradient
        assert traits_of(refined, {"norm": "l2", "from_run": None}).watches_gradient
        assert not traits_of(refined, {"from_run": "runs/first"}).watches_gradient


class TestNorms:
    def test_of_all_kinds_of_gradients(self):
        gradients = [
            torch.full((3, 3), 2.0, dtype=torch.bfloat16),
            torch.tensor(-3.0),
            torch.empty(0),
            torch.ones(4, 2, dtype=torch.float64).T,
            torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.tensor([1.0, 2.0]), (5,), check_invariants=True),
        ]
        l2, l1 = norms_of(gradients).tolist()
        assert l2 == pytest.approx((9 * 4 + 9 + 8 + 9) ** 0.5, rel=1e-6)
        assert l1 == pytest.approx(18 + 3 + 8 + 3, rel=1e-6)
        assert norms_of([]).tolist() == [0, 0]

    def test_large_complex_and_strided_ones(self):
        torch.manual_seed(0)
        gradients = [torch.randn(700, 801).T, torch.randn(300_000).bfloat16(), torch.randn(9, dtype=torch.complex64)]
        exact = torch.cat([g.to(torch.complex128).abs().flatten() for g in gradients])
        expected = [float(exact.norm()), float(exact.sum())]
        assert norms_of(gradients).tolist() == pytest.approx(expected, rel=1e-5)

    def test_half_precision_is_summed_in_single(self):
        # In bfloat16 a sum of ones ends at 256.
        l2, l1 = norms_of([torch.ones(10_000, dtype=torch.bfloat16)]).tolist()
        assert (l2, l1) == pytest.approx((100, 10_000), rel=1e-5)

    def test_a_network_without_gradients_yet(self):
        schedule = refined(make(), 5)
        schedule.observe([nn.Parameter(torch.ones(1))], None)
        assert schedule.logged() == {"gradient_norm": 0.0}


class TestSecondRun:
    def test_the_norm_is_what_the_optimizer_asks_for(self, tmp_path):
        folder = run_folder(tmp_path / "run", l2=G, l1=[g**2 for g in G])
        assert second(folder, 5) == pytest.approx(BY_L2, abs=1e-9)
        # The norms l1 are the squares here: at the power 1 they give the same.
        assert second(folder, 5, kind=torch.optim.AdamW) == pytest.approx(BY_L2, abs=1e-9)
        assert second(folder, 5, norm="l2", kind=torch.optim.AdamW) == pytest.approx(BY_L2, abs=1e-9)
        same = run_folder(tmp_path / "same", l2=G)
        assert second(same, 5, kind=torch.optim.AdamW) == pytest.approx(BY_L1, abs=1e-9)
        assert second(same, 5, norm="l1", lr=0.2) == pytest.approx([0.2 * each for each in BY_L1], abs=1e-9)

    def test_a_median_is_taken_first(self, tmp_path):
        spiked = [1.0] * 40
        spiked[20] = 1000.0
        folder = run_folder(tmp_path / "run", l2=spiked)
        line = [1 - t / 39 for t in range(40)]
        assert second(folder, 40) == pytest.approx(line, abs=1e-9)
        assert second(folder, 40, tau=0.0)[20] < 1e-5

    def test_another_length_takes_the_shape_stretched_and_says_so(self, tmp_path):
        folder = run_folder(tmp_path / "run", l2=G)
        schedule = refined(make(), 9, from_run=folder)
        assert "stretched" in schedule.notes[1]
        assert "5 steps" in schedule.notes[1]
        expected = np.interp(np.linspace(0, 4, 9), range(5), BY_L2)
        assert second(folder, 9) == pytest.approx(expected.tolist(), abs=1e-9)
        assert max(second(folder, 4)) == 1  # although the peak falls between its steps
        assert second(folder, 1) == [1.0]
        assert len(refined(make(), 5, from_run=folder).notes) == 1

    def test_a_warm_up_is_a_factor_more(self, tmp_path):
        folder = run_folder(tmp_path / "run", l2=[1.0] * 5)
        assert second(folder, 5, warmup_steps=1) == pytest.approx([0.5, 0.75, 0.5, 0.25, 0], abs=1e-12)

    def test_beyond_the_end_it_stays_at_zero(self, tmp_path):
        folder = run_folder(tmp_path / "run", l2=G)
        optimizer = make()
        assert rates(optimizer, refined(optimizer, 5, from_run=folder), 9)[4:] == [0] * 5

    def test_resume_is_exact(self, tmp_path):
        folder = run_folder(tmp_path / "run", l2=G)
        optimizer = make()
        schedule = refined(optimizer, 8, from_run=folder)
        rates(optimizer, schedule, 3)
        state = schedule.state_dict()
        expected = rates(optimizer, schedule, 5)
        again = make()
        resumed = refined(again, 8, from_run=folder)
        resumed.load_state_dict(state)
        assert rates(again, resumed, 5) == expected

    def test_a_single_norm_that_is_no_number_is_outvoted(self, tmp_path):
        norms = [1.0] * 40
        norms[7], norms[30] = float("nan"), 0.0
        folder = run_folder(tmp_path / "run", l2=norms)
        assert second(folder, 40) == pytest.approx([1 - t / 39 for t in range(40)], abs=1e-9)

    @pytest.mark.parametrize("wrong", [0.0, float("nan"), float("inf")])
    def test_norms_that_give_no_schedule_are_refused(self, tmp_path, wrong):
        folder = run_folder(tmp_path / "run", l2=[1.0, wrong, wrong, 1.0, 1.0])
        with pytest.raises(ConfigurationError, match="give no schedule") as error:
            second(folder, 5)
        assert "2 such steps of 5" in error.value.found

    def test_a_folder_without_a_record_is_refused(self, tmp_path):
        with pytest.raises(ConfigurationError, match="no gradient norms") as error:
            second(str(tmp_path / "elsewhere"), 5)
        assert "schedule=refined" in error.value.remedy
        with pytest.raises(ConfigurationError, match="no gradient norms"):
            second(run_folder(tmp_path / "short", l2=[1.0]), 5)
        for text in ("", "step,l2\n0,1\n1,1\n", "step,l2,l1\n0,a,b\n", "\x00\xff"):
            (tmp_path / "gradient_norms.csv").write_text(text)
            with pytest.raises(ConfigurationError, match="no gradient norms"):
                second(str(tmp_path), 5, norm="l1")

    @pytest.mark.parametrize("options", [{"norm": "l3"}, {"tau": 1.5}, {"tau": -0.1}])
    def test_what_is_out_of_range_is_refused_by_name(self, options):
        with pytest.raises(ConfigurationError, match=next(iter(options))):
            refined(make(), 20, **options)


def test_latest_is_the_newest_recorded_beside_this_run_and_stays_it(tmp_path: Path) -> None:
    for name in ("old", "new", "mine"):
        (tmp_path / name).mkdir()
    for name in ("old", "new"):
        (tmp_path / name / "gradient_norms.csv").write_text("step,l2,l1\n0,4,4\n1,2,2\n2,1,1\n3,1,1\n4,2,2\n")
    os.utime(tmp_path / "old" / "gradient_norms.csv", (1, 1))
    mine = str(tmp_path / "mine")
    schedule = refined(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), 5, from_run="latest", folder=mine)
    assert str(tmp_path / "new") in schedule.notes[0]
    os.utime(tmp_path / "new" / "gradient_norms.csv", (0, 0))
    again = refined(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), 5, from_run="latest", folder=mine)
    assert again.notes == schedule.notes


def test_latest_without_any_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigurationError, match=r"gradient_norms\.csv"):
        refined(
            torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0),
            5,
            from_run="latest",
            folder=str(tmp_path / "mine"),
        )
