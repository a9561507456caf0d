# pyright: reportAttributeAccessIssue=false
"""Searches: the problem that they fit to, the file of what they found, and the command."""

from __future__ import annotations

import json
import math
import os
from typing import Any

import pytest
import torch

from lightrail.command import main
from lightrail.command.candidates import candidates
from lightrail.errors import CompositionError, ConfigurationError, DataError, RunFolderError, UserError
from lightrail.generation import Evaluator, GaussianMixture, Grid, Prediction, Sampler, State, TimeGrid
from lightrail.generation.artefact import SMALL, Artefact, path_key
from lightrail.generation.composed import compose_generation
from lightrail.generation.fine_solution import fine_levels, fine_solution
from lightrail.generation.guidance import Guidance
from lightrail.generation.noise_path import KarrasVE, LinearFlow, NoisePath
from lightrail.generation.search import SearchProblem, sliced_wasserstein
from lightrail.generation.variance_preserving import CosineVP, LinearVP, TableVP
from lightrail.traits import Traits

TIMES = {"linear": [1.0, 0.6, 0.3, 0.1, 0.0], "flow": [1.0, 0.7, 0.4, 0.1, 0.0], "edm": [80.0, 9.0, 1.0, 0.1, 0.0]}


class Euler(Sampler):
    """D by Euler, in ρ."""

    def step(self, state: State, predict, grid: Grid) -> State:
        here, there = grid[state.index], grid[state.index + 1]
        ratio = there.sigma / here.sigma
        data = predict(state.x, here).data
        return state.next(ratio * state.x + (there.alpha - ratio * here.alpha) * data)


class Noisy(Euler):
    traits = Traits(is_stochastic=True)


class Listed(TimeGrid):
    def __init__(self, times):
        super().__init__()
        self.listed = times

    def times(self, path, start, stop, count):
        return self.listed


def grid_on(path: NoisePath, times, denoises_last: bool = False) -> Grid:
    return Grid(path, tuple(path.level(t) for t in times), denoises_last)


def problem_on(name: str = "linear", **given) -> SearchProblem:
    mixture = GaussianMixture(path=name)
    times = given.pop("times", TIMES[name])
    denoises_last = given.pop("denoises_last", False)
    sampler = given.pop("sampler", None) or Euler(steps=len(times) - 1)
    return SearchProblem(mixture, sampler, Listed(times), grid_on(mixture.path, times, denoises_last), **given)


def rms(difference: torch.Tensor) -> float:
    return float(difference.double().square().mean().sqrt())


@pytest.mark.parametrize("name", ["linear", "edm"])
@pytest.mark.parametrize("flow", [False, True])
def test_the_fine_solution_is_the_exact_one_at_every_knot_to_second_order(name, flow):
    mixture = GaussianMixture(path=name)
    # A flow has its own steps in time: from moderate noise, where those are short enough.
    levels = [mixture.path.level(t) for t in ([0.9, 0.6, 0.3, 0.1] if name == "linear" else [3.0, 1.0, 0.4, 0.1])]
    start = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * levels[0].sigma
    exact = mixture.exact(start, levels[0].t, [level.t for level in levels[1:]])
    few, many = (
        fine_solution(Evaluator(mixture), start, mixture.path, levels, count, flow=flow)[1:] for count in (60, 240)
    )
    for knot in range(3):
        assert rms(many[knot] - exact[knot]) < 1e-3
    assert 3.2 < math.sqrt(rms(few[-1] - exact[-1]) / rms(many[-1] - exact[-1])) < 4.9


@pytest.mark.parametrize("name", ["linear", "flow", "edm"])
def test_the_fine_solution_begins_at_alpha_0_and_reaches_sigma_0(name):
    problem = problem_on(name, times=TIMES[name][1:] if name == "linear" else TIMES[name])
    found = problem.solution(range(6))
    assert found.isfinite().all()
    begin = 1 if name == "flow" else 0  # where α is 0 the exact solution cannot begin
    times = [level.t for level in problem.grid]
    exact = problem.denoiser.exact(found[begin], times[begin], times[begin + 1 :])
    assert rms(found[begin + 1 :] - exact) < 5e-4
    asked = [level for part in fine_levels(problem.grid.path, problem.grid.levels, 200) for level in part[:-1]]
    smallest = problem.grid.path.level(problem.grid.path.t_min)
    assert all(level.lam <= smallest.lam + 1e-9 for level in asked)
    assert 150 < len(asked) < 250


def test_a_grid_that_denoises_last_is_compared_with_denoised_solutions():
    plain = problem_on(times=[0.9, 0.5, 0.2])
    denoised = problem_on(times=[0.9, 0.5, 0.2], denoises_last=True)
    predict = Evaluator(plain.denoiser)
    expected = predict(plain.solution(range(4))[-1], plain.grid[-1]).data
    torch.testing.assert_close(denoised.solution(range(4))[-1], expected)
    assert denoised.endpoint_error(denoised.solution(range(4))[-1], range(4)) == 0


def test_samples_begin_from_the_same_noise_whatever_is_tried():
    problem = problem_on(batch_size=3)
    whole = problem_on(batch_size=100)
    assert torch.equal(problem.samples(range(8)), whole.samples(range(8)))
    assert torch.equal(problem.samples([5]), whole.samples(range(8))[[5]])
    other = grid_on(problem.grid.path, [1.0, 0.5, 0.0])
    assert torch.equal(problem.starts(range(4)), problem.starts(range(4), other))
    assert not torch.equal(problem.starts(range(4)), problem_on(seed=1).starts(range(4)))
    assert torch.equal(problem.solution(range(8)), whole.solution(range(8)))


def test_conditions_reach_both_samples_and_solutions():
    free = problem_on()
    steered = problem_on(condition_of=lambda indices: {"label": torch.tensor([i % 3 for i in indices])})
    assert rms(free.samples(range(6)) - steered.samples(range(6))) > 0.1
    label = {"label": torch.tensor([i % 3 for i in range(6)])}
    start = steered.solution(range(6))[1]
    exact = steered.denoiser.exact(start, 0.6, [0.1], label)[0]
    assert rms(steered.solution(range(6))[3] - exact) < 1e-3


def test_guidance_reaches_both_and_one_that_moves_states_has_no_solution():
    class Doubled(Guidance):
        def mix(self, named, moment):
            return named["cond"].with_data(named["cond"].data * 2)

    class Moved(Guidance):
        def after_step(self, state: State, moment) -> State:
            return State(state.x + 1, state.noise, state.index, state.history, state.memory)

    doubled = problem_on(guidance=(Doubled(),))
    assert rms(doubled.samples(range(4)) - problem_on().samples(range(4))) > 0.1
    assert rms(doubled.solution(range(4))[-1] - problem_on().solution(range(4))[-1]) > 0.1
    moved = problem_on(guidance=(Moved(),))
    with pytest.raises(CompositionError, match="moves the states"):
        moved.solution(range(4))
    assert set(problem_on(guidance=(Moved(),), data=torch.zeros(9, 2)).scores(range(4))) == {"sliced_wasserstein"}


def test_scores_are_distances_from_the_solution_and_from_the_data():
    problem = problem_on()
    x = problem.samples(range(32))
    exact = problem.denoiser.exact(problem.starts(range(32)), 1.0, [0.0])[0]
    scores = problem.scores(range(32))
    assert scores["endpoint_error"] == pytest.approx(rms(x - exact), rel=5e-3)
    assert scores["sliced_wasserstein"] <= scores["endpoint_error"] * 1.2
    far = problem_on(data=exact + 3.0)
    assert far.scores(range(32))["sliced_wasserstein"] > 2
    assert far.scores(range(32))["endpoint_error"] == scores["endpoint_error"]
    assert set(problem_on(sampler=Noisy(steps=4)).scores(range(8))) == {"sliced_wasserstein"}
    with pytest.raises(CompositionError, match="draws noise"):
        problem_on(sampler=Noisy(steps=4)).refuse_stochastic("mine")
    problem.refuse_stochastic("mine")


def test_the_sliced_wasserstein_distance():
    points = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    line = points[:, :1]
    assert sliced_wasserstein(line, line + 2) == pytest.approx(2)
    assert sliced_wasserstein(points, points[torch.randperm(200)]) == 0
    assert sliced_wasserstein(points, points * 2) == pytest.approx(sliced_wasserstein(points * 2, points))
    # A quarter of the points stands for all of them.
    assert sliced_wasserstein(points.repeat(4, 1), points) < 0.2
    assert sliced_wasserstein(points, points + 5) == sliced_wasserstein(points, points + 5)
    # E (v·c)² = |c|²/n for a random direction v.
    assert sliced_wasserstein(points, points + 5) == pytest.approx(5, rel=0.2)


def found(**given) -> Artefact:
    mixture = GaussianMixture()
    key = {"model": mixture.fingerprint(), "path": path_key(mixture.path), "steps": 4, "grid": TIMES["linear"]}
    return Artefact("mine", {**key, **given}, {"ratios": [1.0, 2.0]}, {"error": 2.0}, {"error": 1.0})


def test_a_file_holds_all_that_was_found(tmp_path):
    values = {
        "number": 0.1,
        "none": None,
        "steps": [{"order": 2, "form": "data"}],
        "small": torch.tensor([[0.1, 1 / 3]], dtype=torch.float64),
        "whole": torch.tensor([3], dtype=torch.int64),
        "large": {"inner": torch.arange(SMALL + 1, dtype=torch.float32)},
    }
    path = tmp_path / "a" / "found.json"
    Artefact("mine", {"steps": 3}, values, {"error": 2.0}, {"error": 1.0}).save(path)
    again = Artefact.load(path)
    assert (again.search, again.key, again.before, again.after) == (
        "mine",
        {"steps": 3},
        {"error": 2.0},
        {"error": 1.0},
    )
    assert {name: again.values[name] for name in ("number", "none", "steps")} == {
        name: values[name] for name in ("number", "none", "steps")
    }
    for name in ("small", "whole"):
        assert again.values[name].dtype == values[name].dtype
        assert torch.equal(again.values[name], values[name])
    assert torch.equal(again.values["large"]["inner"], values["large"]["inner"])
    assert sorted(each.name for each in path.parent.iterdir()) == ["found.json", "found.safetensors"]
    assert "0.1" in path.read_text()
    assert len(path.read_text()) < 3000


def test_a_damaged_file_is_told(tmp_path):
    path = tmp_path / "found.json"
    Artefact("mine", {}, {"large": torch.zeros(SMALL + 1)}).save(path)
    path.with_suffix(".safetensors").write_bytes(b"another")
    with pytest.raises(DataError, match="cannot be read") as caught:
        Artefact.load(path)
    assert "not the one that was written with it" in caught.value.found
    path.with_suffix(".safetensors").unlink()
    with pytest.raises(DataError):
        Artefact.load(path)
    path.write_text(path.read_text()[:40])
    with pytest.raises(DataError):
        Artefact.load(path)
    path.write_text(json.dumps({"values": []}))
    with pytest.raises(DataError):
        Artefact.load(path)
    with pytest.raises(DataError, match="nowhere"):
        Artefact.load(tmp_path / "nowhere.json")


def test_what_stood_there_survives_a_failed_write(tmp_path, monkeypatch):
    path = tmp_path / "found.json"
    found().save(path)
    before = path.read_text()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(RunFolderError):
        found(steps=9).save(path)
    monkeypatch.undo()
    assert path.read_text() == before
    assert [each.name for each in tmp_path.iterdir()] == ["found.json"]


def test_a_file_is_refused_for_what_it_is_not_for():
    artefact, mixture = found(), GaussianMixture()
    artefact.check(denoiser=mixture, steps=4)
    artefact.check_grid(problem_on().grid)
    other = GaussianMixture(means=[[0.0, 0.0]], weights=[1.0], variances=[1.0])
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"denoiser": other}, "another model"),
        ({"path": CosineVP()}, "another noise path"),
        ({"path": LinearVP(beta_max=19.0)}, "another noise path"),
        ({"denoiser": GaussianMixture(path="cosine")}, "another noise path"),
        ({"denoiser": mixture, "steps": 5}, "another number of steps"),
    )
    for given, what in cases:
        with pytest.raises(CompositionError, match=what) as caught:
            artefact.check(**given)
        assert caught.value.remedy.startswith("Search again")
    for times in ([1.0, 0.6, 0.3, 0.11, 0.0], [1.0, 0.6, 0.0]):
        with pytest.raises(CompositionError, match="another time grid"):
            artefact.check_grid(grid_on(mixture.path, times))
    artefact.check_grid(grid_on(mixture.path, [0.9, 0.1]), [0.9, 0.1])


@pytest.mark.parametrize(
    "path", [LinearVP(), CosineVP(), KarrasVE(), LinearFlow(), TableVP(torch.linspace(0.99, 0.01, 50))]
)
def test_a_path_is_known_again_through_a_file(path, tmp_path):
    mixture = GaussianMixture(path=path)
    Artefact("mine", {"model": mixture.fingerprint(), "path": path_key(path)}, {}).save(tmp_path / "a.json")
    Artefact.load(tmp_path / "a.json").check(denoiser=GaussianMixture(path=path))


def test_the_key_says_what_a_result_is_for():
    problem = problem_on(described={"sampler": "euler", "options": {"eta": 0.0}, "condition": {"label": 3}})
    key = json.loads(json.dumps(problem.key()))
    assert key["model"] == problem.denoiser.fingerprint()
    assert (key["sampler"], key["options"], key["steps"]) == ("euler", {"eta": 0.0}, 4)
    assert (key["grid"], key["condition"]) == (TIMES["linear"], {"label": 3})
    assert problem_on().key()["sampler"] == "Euler"


WORDS = ["denoiser=gaussian_mixture", "+sampler=ddim", "sampler.steps=4", "generate.accelerator=cpu"]
QUICK = ["search.epochs=1", "search.population=4", "search.kept=2", "search.samples=6", "search.held_out=6"]


def run(capsys, *words: str) -> tuple[int, str, str]:
    status = main(["search", *words])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_the_command_writes_a_file_and_says_how_to_use_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, out, _ = run(capsys, "autodiffusion", *WORDS, *QUICK)
    assert status == 0
    path = tmp_path / "searched" / "autodiffusion_ddim_4.json"
    artefact = Artefact.load(path)
    assert "endpoint_error" in out
    assert f"{artefact.before['endpoint_error']:.4g}" in out
    assert f"{artefact.after['endpoint_error']:.4g}" in out
    assert artefact.key["options"]["steps"] == 4
    command = out.strip().splitlines()[-1].split()
    assert command[0] == "generate"
    assert "+time_grid=searched" in command
    assert not [word for word in command if word.startswith("search.")]
    generation = compose_generation(command[1:])
    assert [level.t for level in generation.levels] == artefact.values["times"]
    with pytest.raises(UserError, match="another number of steps"):
        compose_generation([*command[1:], "sampler.steps=5"])


def test_the_command_puts_the_file_where_it_is_told_and_replaces_what_was_typed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "deep" / "mine.json"
    grid = ["+time_grid=uniform", "time_grid.shift=2"]
    status, out, _ = run(capsys, "autodiffusion", *WORDS, *QUICK, *grid, f"search.to={target}", "seed=5")
    assert status == 0
    assert target.is_file()
    command = out.strip().splitlines()[-1]
    assert "shift" not in command
    assert "seed=5" in command
    assert f"time_grid.file={target}" in command


def test_the_same_seed_finds_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(capsys, "autodiffusion", *WORDS, *QUICK, f"seed={seed}", f"search.to={name}.json")[0] == 0
    a, b, c = (Artefact.load(f"{name}.json") for name in "abc")
    assert a == b
    assert a.values["times"] != c.values["times"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["autodifusion", *WORDS], "Did you mean 'autodiffusion'"),
        ([*WORDS], "it is not said what to search"),
        (["autodiffusion", *WORDS, "search.to=found.txt"], "ends in .json"),
        (["autodiffusion", *WORDS, "search.epoch=2"], "epoch"),
        (["autodiffusion", "+sampler=ddim"], "there is nothing to sample"),
    ],
)
def test_a_mistake_is_told_in_four_parts(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, *words)
    assert status == 2
    assert told in err
    assert "remedy:" in err
    assert not list(tmp_path.iterdir())


def test_help_and_the_whole_configuration(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert "lightrail search NAME" in out
    assert "autodiffusion, dc_ratios, ems, optimal_boundary, usf" in out
    status, out, _ = run(capsys, "autodiffusion", *WORDS, "--cfg")
    assert status == 0
    assert "AutoDiffusion" in out
    assert "steps: 4" in out


def test_the_command_line_is_completed():
    assert "search" in candidates(["lightrail", "se"])
    assert candidates(["lightrail", "search", "auto"]) == ["autodiffusion"]
    assert "+sampler=ddim" in candidates(["lightrail", "search", "ems", "+sampler=dd"])


def test_an_option_out_of_range_names_the_search(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, "autodiffusion", *WORDS, "search.kept=9", "search.population=5")
    assert status == 2
    assert "search.kept=9" in err
    with pytest.raises(ConfigurationError):
        Euler(steps=0)


def test_a_prediction_is_what_the_evaluator_gives():
    problem = problem_on()
    predict = problem.predictor(range(3))
    found_there = predict(problem.starts(range(3)), problem.grid[0])
    assert isinstance(found_there, Prediction)
    assert predict.evaluations == 1
