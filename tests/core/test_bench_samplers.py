"""The bench of samplers: budgets are kept, peers are run as they are meant, and the tables say what was measured."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lightrail.bench import main, samplers
from lightrail.bench.sampler_errors import Found, Problem, _Kept, _solved, errors_of_samplers
from lightrail.bench.samplers import SamplerTables, best_of, measure
from lightrail.bench.table import Table
from lightrail.errors import PluginError
from lightrail.generation import GaussianMixture, Grid, sample
from lightrail.testing.sampler_wrapper import FirstOrder
from lightrail.testing.solver_runs import EvenLambda


class TwoAStep(FirstOrder):
    """Asks twice a step, but in the last."""

    def evaluations(self, grid: Grid) -> int:
        return 2 * grid.steps - 1


def options(**changed: Any) -> argparse.Namespace:
    given = {"only": ["ddim"], "quick": True, "without_diffusers": True, "folder": None, "json": None, "document": None}
    return argparse.Namespace(**{**given, "rounds": 1, **changed})


def test_the_steps_are_as_many_as_the_budget_has_room_for() -> None:
    problem = Problem(samples=4)
    for budget, steps in ((1, 1), (5, 3), (6, 3), (20, 10)):
        built = []

        def build(count: int, built: list[int] = built) -> TwoAStep:
            built.append(count)
            return TwoAStep(count)

        assert _solved(problem, build, _Kept(EvenLambda()), budget) is not None
        assert built[-1] == steps, budget


def test_the_error_is_the_distance_from_the_exact_solution() -> None:
    problem = Problem(samples=4)
    found = _solved(problem, FirstOrder, _Kept(EvenLambda()), 7)
    assert found is not None
    mixture = GaussianMixture(path="ddpm")
    grid = EvenLambda().grid(mixture.path, 7)
    x = sample(mixture, FirstOrder(7), grid, range(4), start=problem.start).x
    exact = mixture.exact(problem.start, 999.0, [-1.0])[0]
    assert found == (7, pytest.approx(float((x - exact).square().mean().sqrt()), rel=1e-9))


def test_every_run_keeps_its_budget() -> None:
    found = list(errors_of_samplers(Problem(samples=2), (5,), ["ddim", "edm_heun"]))
    assert {each.method for each in found} == {"ddim", "edm_heun"}
    assert all(0 < each.evaluations <= 5 for each in found)
    assert len({each.setting for each in found}) > 4  # spacings


def test_the_best_is_taken_over_settings() -> None:
    found = [
        Found("a", "lightrail", "x", 5, 5, 0.3),
        Found("a", "lightrail", "y", 5, 4, 0.1),
        Found("a", "lightrail", "x", 8, 8, 0.2),
        Found("B", "diffusers", "z", 5, 5, 0.4),
    ]
    best = best_of(found)
    assert {(each.method, each.budget, each.setting) for each in best} == {("a", 5, "y"), ("a", 8, "x"), ("B", 5, "z")}
    tables = SamplerTables(best, (5, 8), 4, Table("", "ms", "", []))
    assert tables.ratio(5) == pytest.approx(0.25)
    assert tables.ratio(8) is None


def test_what_is_over_a_bound_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "PAIRS", (("a", "B"),))
    best = [
        Found("a", "lightrail", "", 5, 5, 0.5),
        Found("c", "lightrail", "", 5, 5, 0.2),
        Found("B", "diffusers", "", 5, 5, 0.4),
    ]
    arithmetic = Table("", "ms", "")
    arithmetic.add("a", [1.0])
    text = SamplerTables(best, (5,), 3, arithmetic).text()
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "a / B 1.25 OVER" in lines
    assert "ratio, at most 0.6 0.50" in lines


def test_without_diffusers_samplers_stand_alone() -> None:
    tables = measure(options())
    assert {each.library for each in tables.best} == {"lightrail"}
    assert "diffusers" not in tables.text()
    assert [row.bound for row in tables.arithmetic.rows] == [None]
    assert tables.to_dict()["pairs"] == {}


def test_an_unknown_sampler_is_named() -> None:
    with pytest.raises(PluginError, match="no sampler to measure"):
        measure(options(only=["no_such"]))


def test_the_bench_writes_tables_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    folder = tmp_path / "docs"
    assert main(["samplers", "--quick", "--only", "ddim", "--folder", str(folder)]) == 0
    document = (folder / "samplers.md").read_text()
    assert document.startswith("Made by `lightrail bench samplers --quick --only ddim`; not edited by hand.\n\n# Samp")
    assert "![error over evaluations](samplers.svg)" in document
    assert "| ddim / DDIMScheduler |" in document
    figures = json.loads((folder / "samplers.json").read_text())
    assert set(figures["pairs"]) == {"ddim / DDIMScheduler"}
    assert 0.5 < figures["pairs"]["ddim / DDIMScheduler"]["10"] < 1.5
    assert figures["arithmetic"]["rows"][0]["bound"] == 0.5
    picture = (folder / "samplers.svg").read_text()
    assert picture.startswith("<?xml")
    assert str(tmp_path) not in document + picture + json.dumps(figures)
    assert "best of diffusers" in capsys.readouterr().out


def test_a_picture_of_the_same_figures_is_the_same(tmp_path: Path) -> None:
    from lightrail.bench.sampler_plot import draw

    best = [Found(m, "lightrail", "", b, b, e / b) for m, e in (("a", 1.0), ("b", 1.01)) for b in (5, 10)]
    for name in ("one.svg", "two.svg"):
        draw(best, (5, 10), tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_schedulers_are_given_as_many_steps_as_the_budget_has_room_for() -> None:
    pytest.importorskip("diffusers")
    from lightrail.bench.diffusers_schedulers import Scheduler

    assert len(Scheduler("HeunDiscreteScheduler", "scaled").within(10).timesteps) == 9
    assert len(Scheduler("PNDMScheduler", "times", {"skip_prk_steps": True}).within(10).timesteps) == 10
    assert len(Scheduler("PNDMScheduler", "times", {"skip_prk_steps": False}).within(20).timesteps) == 20
    assert Scheduler("EulerDiscreteScheduler", "scaled", {"use_beta_sigmas": True}).within(5) is not None


def test_a_scheduler_of_first_order_ends_where_a_sampler_of_first_order_does() -> None:
    pytest.importorskip("diffusers")
    from lightrail.bench.diffusers_schedulers import Scheduler, last_time

    mixture = GaussianMixture(path="ddpm")
    start = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for name, space in (("EulerDiscreteScheduler", "scaled"), ("DPMSolverMultistepScheduler", "sigmas")):
        order = {"solver_order": 1} if space == "sigmas" else {}
        peer = Scheduler(name, space, {**order, "use_karras_sigmas": True})
        scheduler = peer.built(10)
        levels = [mixture.path.level_at_lam(-math.log(float(rho))) for rho in scheduler.sigmas[:-1]]
        grid = Grid(mixture.path, (*levels, mixture.path.level(-1.0)))
        ours = sample(mixture, FirstOrder(10), grid, range(8), start=start).x
        assert torch.allclose(peer.solved(scheduler, mixture, start), ours, atol=2e-4), name
        assert last_time(scheduler) == -1.0
    times = Scheduler("DDIMScheduler", "times", {"clip_sample": False, "timestep_spacing": "leading"})
    grid = Grid(mixture.path, tuple(mixture.path.level(t) for t in (750.0, 500.0, 250.0, 0.0, -1.0)))
    ours = sample(mixture, FirstOrder(4), grid, range(8), start=start).x
    assert torch.allclose(times.solved(times.built(4), mixture, start), ours, atol=1e-5)


def test_a_scheduler_that_keeps_noise_is_compared_there() -> None:
    pytest.importorskip("diffusers")
    from lightrail.bench.diffusers_schedulers import Scheduler, last_time

    assert last_time(Scheduler("DEISMultistepScheduler", "sigmas").built(5)) == 0.0
    assert last_time(Scheduler("UniPCMultistepScheduler", "sigmas").built(5)) == -1.0
