# pyright: reportAttributeAccessIssue=false
"""AutoDiffusion: subsets of times, their evolution, and the grid that reads what was found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from lightrail.errors import CompositionError, ConfigurationError, DataError
from lightrail.generation import GaussianMixture, Grid, TimeGrid
from lightrail.generation.search import Artefact, SearchProblem
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.flow import FlowEuler
from lightrail_generation.searches.autodiffusion import (
    AutoDiffusion,
    candidate_levels,
    crossed,
    mutated,
    random_subset,
)
from lightrail_generation.searches.evolution import Evolution, evolve
from lightrail_generation.time_grids.explicit import Explicit
from lightrail_generation.time_grids.searched import Searched
from lightrail_generation.time_grids.uniform import Uniform
from lightrail_generation.time_grids.uniform_lambda import UniformLambda

SMALL = {"epochs": 3, "population": 12, "kept": 4, "mutations": 5, "crossings": 3, "chance": 0.3}


def problem(path: str = "linear", times: TimeGrid | None = None, steps: int = 5, eta: float = 0.0) -> SearchProblem:
    mixture, sampler = GaussianMixture(path=path), DDIM(steps=steps, eta=eta)
    spacing = times or UniformLambda(stop=0.05, end="minimum")
    options = {"steps": steps, "eta": eta}
    grid = sampler.grid(mixture.path, spacing)
    return SearchProblem(mixture, sampler, spacing, grid, described={"sampler": "ddim", "options": options})


def small(**options) -> AutoDiffusion:
    return AutoDiffusion(**{**SMALL, "samples": 16, "held_out": 32, **options})


def test_subsets_are_sorted_without_repetition_through_every_operation():
    rng = np.random.default_rng(0)
    seen, differ = set(), 0
    for _ in range(200):
        parent = random_subset(12, 5, rng)
        child = mutated(parent, 12, 0.5, rng)
        both = crossed(parent, child, rng)
        differ += parent != child
        for each in (parent, child, both):
            if each is not None:
                assert list(each) == sorted(set(each))
                assert len(each) == 5
                assert each[0] >= 0
                assert each[-1] < 12
        seen.add(parent)
    assert len(seen) > 100
    assert differ > 150
    assert mutated((0, 3, 7), 12, 0.0, rng) == (0, 3, 7)
    assert mutated((0, 1, 2), 3, 1.0, rng) == (0, 1, 2)  # there is nothing to change to
    # The coin tosses of (0, 1) and (1, 2) may give 1 twice.
    assert {crossed((0, 1), (1, 2), rng) for _ in range(60)} == {(0, 1), (0, 2), (1, 2), None}


def test_a_mutation_changes_a_share_of_the_genes():
    rng = np.random.default_rng(0)
    parent = tuple(range(0, 400, 4))
    kept = [len(set(parent) & set(mutated(parent, 400, 0.1, rng))) for _ in range(20)]
    assert 87 < np.mean(kept) < 93


def test_evolution_finds_the_best_of_a_small_space_and_tries_none_twice():
    tried = []

    def score(subset):
        tried.append(subset)
        return float(sum(subset))

    size = Evolution(epochs=8, population=12, kept=3, mutations=6, crossings=3)
    rng = np.random.default_rng(0)
    best, value, history = evolve(
        size,
        (7, 8, 9),
        score,
        lambda: random_subset(10, 3, rng),
        lambda parent: mutated(parent, 10, 0.3, rng),
        lambda mother, father: crossed(mother, father, rng),
        rng,
        lambda done, total, score=None: None,
    )
    assert (best, value) == ((0, 1, 2), 3.0)
    assert tried[0] == (7, 8, 9)
    assert len(tried) == len(set(tried))
    assert len(tried) <= 8 * 12
    assert history == sorted(history, reverse=True)
    assert len(history) == 8


def test_a_space_that_runs_out_ends_the_search():
    found = small(resolution=1, moves_start=True).search(problem(steps=2))
    assert found.values["times"] == [level.t for level in problem(steps=2).grid]


@pytest.mark.parametrize("path", ["linear", "edm", "flow"])
def test_the_grid_itself_is_among_the_candidates(path):
    times = Uniform() if path == "flow" else UniformLambda()
    whole = problem(path, times)
    levels, own = candidate_levels(whole.denoiser.path, whole.grid, 7)
    assert [levels[i].t for i in own] == [level.t for level in whole.grid][:-1]
    lams = [level.lam for level in levels]
    assert lams == sorted(lams)
    assert len(set(lams)) == len(lams)
    smallest = whole.denoiser.path.level(whole.denoiser.path.t_min).lam
    assert lams[-1] == pytest.approx(smallest)  # the last evaluation may come down to the path's smallest time


def test_a_path_of_training_steps_is_searched_over_those():
    whole = problem("ddpm", UniformLambda())
    levels, own = candidate_levels(whole.denoiser.path, whole.grid, 7)
    assert [level.t for level in levels] == [float(t) for t in range(999, -1, -1)]
    assert len(own) == 5
    found = small().search(whole).values["times"]
    assert all(t == int(t) for t in found)
    assert found[-1] == -1


def test_a_start_of_pure_noise_is_kept():
    mixture, sampler, spacing = GaussianMixture(path="flow"), FlowEuler(steps=4), Uniform()
    whole = SearchProblem(mixture, sampler, spacing, sampler.grid(mixture.path, spacing))
    found = small().search(whole)
    assert found.values["times"][0] == 1.0
    assert found.after["endpoint_error"] < found.before["endpoint_error"]


@pytest.mark.parametrize("scorer", ["endpoint_error", "sliced_wasserstein"])
@pytest.mark.parametrize(("path", "times"), [("linear", None), ("linear", Uniform()), ("ddpm", UniformLambda())])
def test_it_is_better_on_samples_that_it_never_saw_and_never_worse_on_its_own(path, times, scorer):
    whole = problem(path, times)
    found = small(scorer=scorer).search(whole)
    assert found.after[scorer] < found.before[scorer]
    own = whole.scores(range(16))[scorer]
    scores = found.values["scores"]
    assert scores[0] <= own
    assert scores == sorted(scores, reverse=True)
    again = Grid(whole.grid.path, tuple(whole.grid.path.level(t) for t in found.values["times"]))
    assert whole.scores(range(16), grid=again)[scorer] == scores[-1]
    assert whole.scores(range(16, 48), grid=again) == found.after
    assert again.steps == 5
    assert (again[0].t, again[-1].t) == (whole.grid[0].t, whole.grid[-1].t)


def test_digits_come_out_better_on_searched_times_than_on_uniform_ones():
    digits = torch.tensor(load_digits().data / 8 - 1)
    shown, held = digits[:60], digits[60:600]
    mixture = GaussianMixture(shown.tolist(), [1.0] * 60, [0.05] * 60)
    sampler, spacing = DDIM(steps=5), Uniform()
    grid = sampler.grid(mixture.path, spacing)
    whole = SearchProblem(mixture, sampler, spacing, grid, data=held)
    found = small(scorer="sliced_wasserstein", samples=48, held_out=48).search(whole)
    assert found.after["sliced_wasserstein"] < found.before["sliced_wasserstein"]


def test_it_is_the_same_again_and_another_with_another_seed():
    first, again = small().search(problem()), small().search(problem())
    assert first == again
    other = problem()
    object.__setattr__(other, "seed", 3)
    assert small().search(other).values["times"] != first.values["times"]


def test_the_start_moves_only_if_it_is_told_to():
    free = small(moves_start=True, epochs=4, chance=0.5)
    assert free.search(problem()).values["times"][0] < 1.0
    assert small().search(problem()).values["times"][0] == 1.0


def test_a_stochastic_solver_is_scored_by_distributions_alone():
    noisy = problem(eta=1.0)
    with pytest.raises(CompositionError, match="draws noise"):
        small(scorer="endpoint_error").search(noisy)
    found = small(scorer="sliced_wasserstein").search(noisy)
    assert set(found.before) == {"sliced_wasserstein"}


@pytest.mark.parametrize(
    "options",
    [
        {"scorer": "fid"},
        {"epochs": 0},
        {"population": 1},
        {"kept": 0},
        {"kept": 13},
        {"mutations": -1},
        {"chance": 0.0},
        {"resolution": 0},
        {"samples": 1},
        {"held_out": 0},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigurationError):
        small(**options)


def test_more_steps_than_training_steps_are_refused():
    short = GaussianMixture(path="ddpm")
    spacing = Explicit([20.3, 20.1, 0.0, -1.0])
    grid = Grid(short.path, tuple(short.path.level(t) for t in spacing.listed))
    with pytest.raises(ConfigurationError, match="fewer possible times"):
        small().search(SearchProblem(short, DDIM(steps=3), spacing, grid))


def test_searched_reads_the_times(tmp_path):
    whole = problem()
    found = small().search(whole)
    found.save(tmp_path / "found.json")
    times = Searched(str(tmp_path / "found.json"))
    grid = DDIM(steps=5).grid(whole.denoiser.path, times)
    assert [level.t for level in grid] == found.values["times"]
    assert not grid.denoises_last
    assert whole.scores(range(16, 48), grid=grid) == found.after
    assert small().words(found, "x.json") == ["+time_grid=searched", "time_grid.file=x.json"]
    with pytest.raises(CompositionError, match="number of steps"):
        DDIM(steps=6).grid(whole.denoiser.path, times)
    with pytest.raises(CompositionError, match="noise path"):
        DDIM(steps=5).grid(GaussianMixture(path="cosine").path, times)


def test_searched_keeps_what_a_grid_ends_with(tmp_path):
    whole = problem(times=UniformLambda(stop=0.05, end="denoise"))
    found = small().search(whole)
    found.save(tmp_path / "found.json")
    assert Searched(str(tmp_path / "found.json")).grid(whole.grid.path, 5).denoises_last
    assert found.after["endpoint_error"] < found.before["endpoint_error"]


def test_searched_begins_where_a_solver_can(tmp_path):
    path = GaussianMixture(path="flow").path
    key = {"steps": 2, "path": Artefact.load(_written(tmp_path, path)).key["path"]}
    Artefact("mine", key, {"times": [1.0, 0.5, 0.0]}).save(tmp_path / "pure.json")
    times = Searched(str(tmp_path / "pure.json"))
    assert times.grid(path, 2)[0].t == path.t_finite
    assert times.grid(path, 2, finite=False)[0].t == 1.0


def _written(folder, path):
    found = small().search(problem("flow", Uniform(stop=0.05, end="minimum")))
    found.save(folder / "flow.json")
    return folder / "flow.json"


def test_searched_refuses_other_files(tmp_path):
    with pytest.raises(DataError):
        Searched(str(tmp_path / "none.json"))
    Artefact("ems", {}, {"l": [1.0]}).save(tmp_path / "ems.json")
    with pytest.raises(ConfigurationError, match="found no times"):
        Searched(str(tmp_path / "ems.json"))
