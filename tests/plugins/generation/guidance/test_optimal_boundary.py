# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""The optimal boundary condition: the search against the posterior mean, and samples that start from what it found."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lightrail.command import main
from lightrail.errors import CompositionError, ConfigurationError, DataError, PluginError
from lightrail.generation import GaussianMixture, Generated, Observed, sample
from lightrail.generation.search import Artefact, SearchProblem
from lightrail.testing import examine
from lightrail.testing.guidance import GuidanceSuite
from lightrail.testing.suite import name_of
from lightrail_generation.guidance.optimal_boundary import OptimalBoundary
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.edm import EDMHeun
from lightrail_generation.samplers.flow import FlowHeun
from lightrail_generation.samplers.unipc import UniPC
from lightrail_generation.searches.optimal_boundary import (
    OptimalBoundarySearch,
    mean_absolute_error,
    mean_squared_error,
)
from lightrail_generation.time_grids.uniform_lambda import UniformLambda

MIXTURE = GaussianMixture()
# One component a class, far apart: given the class the model is linear and Gaussian.
CLASSES = GaussianMixture(means=[[3.0, 0.0], [-3.0, 1.0]], weights=[0.5, 0.5], variances=[0.2, 0.4])


def problem_of(mixture=MIXTURE, sampler=None, **given):
    sampler, times = sampler or DPMSolverPP(6), UniformLambda()
    return SearchProblem(mixture, sampler, times, sampler.grid(mixture.path, times), **given)


def by_class(indices):
    return {"label": torch.tensor([i % 2 for i in indices])}


def saved(tmp_path, artefact):
    path = tmp_path / "found.json"
    artefact.save(path)
    return str(path)


def drawn(guidance, sampler=None, mixture=MIXTURE, indices=range(6), **given):
    sampler = sampler or DDIM(6)
    grid = sampler.grid(mixture.path, UniformLambda())
    return sample(mixture, sampler, grid, indices, seed=1, guidance=guidance, **given)


@pytest.fixture
def found(tmp_path):
    artefact = OptimalBoundarySearch(candidates=32, references=16, held_out=16).search(problem_of())
    return artefact, saved(tmp_path, artefact)


@pytest.mark.parametrize("reference", ["data", "model"])
def test_of_a_normal_the_search_approaches_0_the_start_of_the_mean(reference):
    # h(x_T) = m + g (x_T − α_T m), and E|h − x_0|² = |h − m|² + n v is least where x_T = α_T m, nearly 0.
    mixture = GaussianMixture(means=[[0.8, -0.5]], weights=[1.0], variances=[0.3])
    norms, distances = [], []
    for candidates in (1, 16, 256):
        search = OptimalBoundarySearch(candidates, references=200, reference=reference, held_out=200)
        artefact = search.search(problem_of(mixture))
        norms.append(float(artefact.values["start"].norm()))
        distances.append(artefact.after["distance"])
    assert norms[0] > norms[1] > norms[2]
    assert norms[2] < 0.2
    # The variance is what no start can save; a random one has it twice.
    assert distances[2] == pytest.approx(0.3, rel=0.15)
    assert artefact.before["distance"] == pytest.approx(0.6, rel=0.35)


def test_one_start_is_shared_by_all_classes():
    problem = problem_of(CLASSES, condition_of=by_class)
    artefact = OptimalBoundarySearch(candidates=200, references=60, held_out=60).search(problem)
    assert float(artefact.values["start"].norm()) < 0.3
    assert artefact.after["distance"] < 0.75 * artefact.before["distance"]
    assert artefact.after["distance"] == pytest.approx(0.3, rel=0.3)
    assert artefact.values["labels"].tolist() == [i % 2 for i in range(260, 320)]


def test_the_distance_is_the_mean_over_all_pairs():
    problem = problem_of(CLASSES, condition_of=by_class, batch_size=3)
    search = OptimalBoundarySearch(candidates=5, references=4, held_out=2, distance="mae", reference="model")
    artefact = search.search(problem)
    indices = range(5, 9)
    truths = problem.solution(range(5, 11))[-1][:4]
    sampler, wanted = problem.sampler, []
    for start in problem.starts(range(5)):
        starts = start.expand(4, 2)
        x = sample(CLASSES, sampler, problem.grid, range(4), start=starts, condition=by_class(indices)).x
        wanted.append(float((x - truths).abs().mean()))
    assert artefact.values["distance"] == pytest.approx(min(wanted))
    assert artefact.values["candidate"] == wanted.index(min(wanted))
    torch.testing.assert_close(artefact.values["start"], problem.starts(range(5))[artefact.values["candidate"]])


def test_the_same_seed_finds_the_same_in_any_batch():
    search = OptimalBoundarySearch(candidates=20, references=8, held_out=4)
    first, second = (search.search(problem_of(batch_size=size)) for size in (7, 64))
    assert first.values["candidate"] == second.values["candidate"]
    other = search.search(problem_of(seed=5))
    assert not torch.equal(other.values["start"], first.values["start"])


def test_labelled_data_are_matched_with_the_classes_that_are_asked_for():
    class Data:
        x = torch.arange(40.0, dtype=torch.float64).view(20, 2)

        def prepare_data(self):
            pass

        def setup(self, stage):
            pass

        def val_dataloader(self):
            return [(self.x[i : i + 4], torch.arange(i, i + 4) % 2) for i in range(0, 20, 4)]

    problem = problem_of(CLASSES, condition_of=by_class)
    problem.denoiser.data = Data()
    try:
        search = OptimalBoundarySearch(candidates=3, references=4, held_out=2, reference="data")
        artefact = search.search(problem)
        # Indices 3 to 8 are of classes 1, 0, 1, 0, 1, 0; the last two are held out.
        assert artefact.values["truths"].tolist() == [[10.0, 11.0], [8.0, 9.0]]
        with pytest.raises(CompositionError, match="too few data"):
            OptimalBoundarySearch(candidates=3, references=40, reference="data").search(problem)
    finally:
        del problem.denoiser.data
    with pytest.raises(CompositionError, match="too few data"):
        OptimalBoundarySearch(candidates=3, references=4, reference="data").search(problem)


def test_another_distance_and_what_it_must_answer():
    def first_alone(samples, truths):
        return (samples - truths)[:, 0].abs()

    search = OptimalBoundarySearch(candidates=16, references=8, held_out=8, distance=first_alone)
    assert search.search(problem_of()).after["distance"] > 0
    named = OptimalBoundarySearch(distance=f"{mean_squared_error.__module__}.mean_squared_error")
    assert named.distance is mean_squared_error
    with pytest.raises(PluginError, match="does not answer for each sample"):
        OptimalBoundarySearch(distance=lambda a, b: a - b).search(problem_of())
    with pytest.raises(ConfigurationError, match="distance cannot be called"):
        OptimalBoundarySearch(distance="lpips")
    x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]])
    assert (mean_squared_error(x, y).tolist(), mean_absolute_error(x, y).tolist()) == ([2.5], [1.5])


@pytest.mark.parametrize(
    "options", [{"candidates": 0}, {"references": 0}, {"held_out": 0}, {"reference": "mine"}, {"distance": 3}]
)
def test_an_option_out_of_range(options):
    with pytest.raises(ConfigurationError):
        OptimalBoundarySearch(**options)


def test_a_sampler_that_adds_noise_is_refused(found):
    noisy = problem_of(sampler=DDIM(4, eta=1.0), described={"options": {"eta": 1.0}})
    with pytest.raises(CompositionError, match="draws noise"):
        OptimalBoundarySearch().search(noisy)
    with pytest.raises(CompositionError, match="adds other noise"):
        OptimalBoundary(found[1]).prepare(MIXTURE, DDIM(4, eta=1.0))


@pytest.mark.parametrize("sampler", [DDIM(6), DPMSolverPP(6), UniPC(5), EDMHeun(5)])
def test_every_sample_starts_there(found, sampler):
    guidance = OptimalBoundary(found[1])
    guidance.prepare(MIXTURE, sampler)
    x = found[0].values["start"].expand(6, 2)
    guided, plain = drawn([guidance], sampler), drawn([], sampler, start=x)
    torch.testing.assert_close(guided.x, plain.x, rtol=1e-12, atol=1e-12)
    assert guided.evaluations == plain.evaluations
    torch.testing.assert_close(drawn([guidance], sampler, indices=[4]).x[0], guided.x[4], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "sampler"), [("edm", EDMHeun(5)), ("flow", FlowHeun(6))])
def test_it_is_in_units_of_the_noise_on_every_path(tmp_path, name, sampler):
    mixture = GaussianMixture(path=name)
    problem = problem_of(mixture, sampler)
    artefact = OptimalBoundarySearch(candidates=16, references=8, held_out=8).search(problem)
    guidance = OptimalBoundary(saved(tmp_path, artefact))
    guidance.prepare(mixture, sampler)
    start = problem.starts([artefact.values["candidate"]]).expand(6, 2)
    wanted = drawn([], sampler, mixture, start=start)
    torch.testing.assert_close(drawn([guidance], sampler, mixture).x, wanted.x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("check", GuidanceSuite.checks, ids=name_of)
def test_it_conforms(found, check):
    outcome = examine(check, OptimalBoundary, {"path": found[1]})
    assert outcome.state == "passed", outcome.reason


def test_what_is_measured(found):
    artefact, path = found
    guidance = OptimalBoundary(path)
    guided, plain = drawn([guidance]), drawn([])
    errors = [guidance.measure(Generated(each.x, each.start))["truth_error"] for each in (guided, plain)]
    assert errors[0] < errors[1]
    assert errors[0] ** 2 == pytest.approx(artefact.after["distance"], rel=0.2)
    observed = Observed(None, guided.x, guided.x - 2.0)
    assert guidance.measure(Generated(guided.x, guided.start, observed=observed))["truth_error"] == pytest.approx(2.0)
    assert guidance.measure(Generated(guided.x, guided.start, observed=Observed(None, guided.x))) == {}


def test_of_classes_truths_of_the_same_are_compared(tmp_path):
    mixture = CLASSES
    values = {"start": torch.zeros(2), "truths": torch.tensor([[1.0, 1.0], [5.0, 5.0]]), "labels": torch.tensor([0, 1])}
    key = problem_of(mixture).key()
    guidance = OptimalBoundary(saved(tmp_path, Artefact("optimal_boundary", key, values)))
    samples = torch.tensor([[1.0, 1.0], [5.0, 8.0]])
    condition = {"label": torch.tensor([0, 1])}
    measured = guidance.measure(Generated(samples, samples, condition))
    assert measured["truth_error"] == pytest.approx(math.sqrt(9 / 4))
    assert guidance.measure(Generated(samples, samples, {"label": torch.tensor([7, 7])})) == {}


def test_a_file_of_another_model_or_search_is_refused(found, tmp_path):
    with pytest.raises(CompositionError, match="another model"):
        OptimalBoundary(found[1]).prepare(CLASSES, DDIM(4))
    with pytest.raises(CompositionError, match="another noise path"):
        OptimalBoundary(found[1]).prepare(GaussianMixture(path="cosine"), DDIM(4))
    with pytest.raises(DataError):
        OptimalBoundary(str(tmp_path / "none.json"))
    artefact = Artefact("dc_ratios", found[0].key, {"ratios": [1.0]})
    with pytest.raises(ConfigurationError, match="found no starting noise"):
        OptimalBoundary(saved(tmp_path, artefact))
    wide = Artefact("optimal_boundary", found[0].key, {"start": torch.zeros(3)})
    with pytest.raises(CompositionError, match="another shape"):
        OptimalBoundary(saved(tmp_path, wide)).prepare(MIXTURE, DDIM(4))


def test_the_command_prints_the_words_that_use_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["search.candidates=8", "search.references=4", "search.held_out=4"]
    words = ["denoiser=gaussian_mixture", "+sampler=unipc", "sampler.steps=4", "generate.label=1"]
    steered = ["+guidance=[cfg]", "guidance.cfg.scale=1.5"]
    assert main(["search", "optimal_boundary", *words, *steered, *options]) == 0
    out = capsys.readouterr().out
    assert "4 held-out samples" in out
    assert "'+guidance=[cfg,optimal_boundary]'" in out
    assert "guidance.cfg.scale=1.5" in out
    assert "guidance.optimal_boundary.path=searched/optimal_boundary_unipc_4.json" in out
    found = json.loads((tmp_path / "searched" / "optimal_boundary_unipc_4.json").read_text())
    assert found["search"] == "optimal_boundary"
    from lightrail.generation.composed import compose_generation

    line = next(line for line in out.splitlines() if "generate denoiser" in line)
    typed = [word.strip("'") for word in line.split()[1:]]
    generation = compose_generation(typed)
    assert [type(each).__name__ for each in generation.guidance] == ["CFG", "OptimalBoundary"]
