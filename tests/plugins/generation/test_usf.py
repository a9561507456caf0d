# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
"""USF: steps that are each solved in their own way, and the search for them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from lightrail.errors import CompositionError, ConfigurationError, DataError
from lightrail.generation import GaussianMixture, Grid, Prediction, sample
from lightrail.generation.search import Artefact, SearchProblem
from lightrail.traits import traits_of
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.exponential import adams_weights, carried
from lightrail_generation.samplers.unipc import UniPC, predictor_weights
from lightrail_generation.samplers.usf import USF, SolverStep
from lightrail_generation.searches.usf import KNOWN, USFSearch, _made, _Space
from lightrail_generation.time_grids.searched import Searched
from lightrail_generation.time_grids.uniform import Uniform
from lightrail_generation.time_grids.uniform_lambda import UniformLambda

MIXTURE = GaussianMixture()
KNOTS = UniformLambda(stop=0.05, end="minimum")
START = torch.from_numpy(np.random.default_rng(0).standard_normal((32, 2)))
SMALL = {"initial": 12, "rounds": 2, "scored": 6, "children": 40, "samples": 8, "held_out": 16}


def run(sampler, knots=KNOTS):
    return sample(MIXTURE, sampler, sampler.grid(MIXTURE.path, knots), range(32), start=START).x


def all_steps(count: int, **entry) -> USF:
    return USF(schedule=[entry] * count)


def problem_of(sampler, mixture=MIXTURE, knots=KNOTS) -> SearchProblem:
    return SearchProblem(mixture, sampler, knots, sampler.grid(mixture.path, knots))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize(("derivatives", "b"), [("bh1", "bh1"), ("bh2", "bh2"), ("exact", "vary")])
@pytest.mark.parametrize("form", ["data", "noise"])
@pytest.mark.parametrize("corrector", [False, True])
def test_schedules_of_equal_steps_are_unipc(order, derivatives, b, form, corrector):
    base = UniPC(7, order=order, form=form, b=b, corrector=corrector, lower_order_final=False)
    ours = all_steps(7, order=order, form=form, derivatives=derivatives, corrector=corrector)
    for knots in (KNOTS, Uniform(stop=0.02, end="denoise")):
        wanted = run(base, knots)
        assert float((run(ours, knots) - wanted).abs().max()) < 1e-11 * max(1.0, float(wanted.abs().max()))


def test_known_methods_are_schedules():
    torch.testing.assert_close(run(all_steps(6, order=1, form="noise")), run(DDIM(6)), rtol=1e-11, atol=1e-11)
    second = run(all_steps(8, order=2, derivatives="bh2"))
    torch.testing.assert_close(second, run(DPMSolverPP(8, lower_order_final=False)), rtol=1e-12, atol=1e-12)
    taylor = run(DPMSolverPP(8, solver_type="taylor", lower_order_final=False))
    torch.testing.assert_close(run(all_steps(8, order=2, derivatives="exact")), taylor, rtol=1e-12, atol=1e-12)
    assert run(USF(steps=6)).equal(run(all_steps(6, order=3)))


def test_a_step_from_an_earlier_knot_is_the_last_stage_of_a_single_step_method():
    """Pairs of steps, the second from the first's start: an exponential Runge–Kutta method of order 2."""
    pair = [{"order": 1, "form": "data"}, {"order": 2, "form": "data", "derivatives": "exact", "back": 1}]
    sampler = USF(schedule=pair * 3)
    grid = sampler.grid(MIXTURE.path, KNOTS)
    x = START
    for index in range(0, 6, 2):
        start, middle, end = grid[index], grid[index + 1], grid[index + 2]
        first = MIXTURE.predict(x, start).data
        h, part = end.lam - start.lam, middle.lam - start.lam
        inner = middle.sigma / start.sigma * x - middle.alpha * np.expm1(-part) * first
        second = MIXTURE.predict(inner, middle).data
        slope = (second - first) / part
        # ∫₀ʰ e^{u−h} (D_0 + slope u) du
        x = end.sigma / start.sigma * x + end.alpha * (-np.expm1(-h) * first + (h + np.expm1(-h)) * slope)
    torch.testing.assert_close(run(sampler), x, rtol=1e-11, atol=1e-11)


def test_each_entry_is_for_its_own_step_and_its_corrector_for_the_state_that_the_step_leads_to():
    first = {"order": 1, "corrector": True, "derivatives": "exact"}
    sampler = USF(schedule=[first, {"order": 2, "form": "noise"}, {"order": 2, "derivatives": "exact"}])
    g = sampler.grid(MIXTURE.path, KNOTS).levels
    lams = [level.lam for level in g]
    m_0 = MIXTURE.predict(START, g[0])
    x_1 = carried(g[0], g[1], "data") * START + adams_weights(g[0], g[1], lams[:1], "data")[0] * m_0.data
    m_1 = MIXTURE.predict(x_1, g[1])
    of_0, of_1 = adams_weights(g[0], g[1], lams[:2], "data")
    corrected = carried(g[0], g[1], "data") * START + of_0 * m_0.data + of_1 * m_1.data
    of_1, of_0 = predictor_weights(g[1], g[2], [lams[1], lams[0]], "noise", "bh2")
    x_2 = carried(g[1], g[2], "noise") * corrected + of_1 * m_1.noise + of_0 * m_0.noise
    m_2 = MIXTURE.predict(x_2, g[2])
    of_2, of_1 = adams_weights(g[2], g[3], [lams[2], lams[1]], "data")
    x_3 = carried(g[2], g[3], "data") * x_2 + of_2 * m_2.data + of_1 * m_1.data
    torch.testing.assert_close(run(sampler), x_3, rtol=1e-11, atol=1e-11)


def errors_of(entry, counts=(40, 80), first=3):
    found = []
    for count in counts:
        sampler = USF(schedule=[{"order": 4}] * first + [entry] * (count - first))
        grid = sampler.grid(MIXTURE.path, KNOTS)
        exact = MIXTURE.exact(START, 1.0, [level.t for level in grid][1:])

        def seeded(state, exact=exact):
            if state.index > first:
                return state
            memory = {**state.memory}
            return dataclasses.replace(state, x=exact[state.index - 1], memory=memory)

        x = sample(MIXTURE, sampler, grid, range(32), start=START, after_step=seeded).x
        found.append(float((x - exact[-1]).square().mean().sqrt()))
    return found


@pytest.mark.parametrize(
    ("entry", "order"),
    [
        ({"order": 2, "derivatives": "exact"}, 2),
        ({"order": 3}, 3),
        ({"order": 4}, 4),
        ({"order": 3, "derivatives": "low"}, 2),
        ({"order": 3, "form": "noise"}, 3),
        ({"order": 2, "corrector": True}, 3),
        ({"order": 3, "derivatives": "exact", "back": 1}, 3),
        ({"order": 2, "derivatives": "exact", "back": 1, "corrector": True}, 3),
        ({"order": 3, "derivatives": "exact", "back": 2}, 3),
    ],
)
def test_orders(entry, order):
    few, many = errors_of(entry)
    assert math.log2(few / many) == pytest.approx(order, abs=0.45)


def test_low_order_derivatives_are_taylor_with_divided_differences():
    knots = [-0.3, -0.8, -1.6]
    here, there = MIXTURE.path.level_at_lam(-0.3), MIXTURE.path.level_at_lam(0.4)
    weights = SolverStep(3, derivatives="low").predicting(here, there, knots)
    values = np.array([2.0, -1.0, 0.5])
    first = (values[0] - values[1]) / (knots[0] - knots[1])
    other = (values[1] - values[2]) / (knots[1] - knots[2])
    second = (first - other) / (knots[0] - knots[2])
    u = np.linspace(0, 0.7, 20001)
    wanted = there.alpha * np.trapezoid(np.exp(u - 0.7) * (values[0] + first * u + second * u**2), u)
    assert float(np.dot(weights, values)) == pytest.approx(wanted, rel=1e-8)


def test_the_last_step_to_the_data_is_of_order_one_and_is_not_corrected():
    sampler = all_steps(5, order=4, corrector=True)
    grid = sampler.grid(MIXTURE.path, UniformLambda())
    found = []
    end = sample(MIXTURE, sampler, grid, range(4), after_step=lambda state: found.append(state) or state).x
    assert torch.equal(end, found[-1].x)
    last: Prediction = found[-1].history[0]
    torch.testing.assert_close(end, last.data)
    assert sampler.evaluations(grid) == 5


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        ([{"order": 0}], "order"),
        ([{"order": 5}], "order"),
        ([{"order": 1.5}], "order"),
        ([{"form": "flow"}], "form"),
        ([{"derivatives": "best"}], "derivatives"),
        ([{"back": 1, "derivatives": "exact"}], "before the first knot"),
        ([{}, {"back": 1}], "takes its derivatives exactly"),
        ([{"ordr": 2}], "no option 'ordr'"),
    ],
)
def test_a_wrong_entry_is_told(schedule, told):
    with pytest.raises(ConfigurationError, match=told):
        USF(schedule=schedule)


def test_steps_and_schedule_must_agree():
    assert USF().steps == 10
    assert USF(schedule=[{}] * 3).steps == 3
    with pytest.raises(ConfigurationError, match="one entry for each step"):
        USF(steps=4, schedule=[{}] * 3)
    with pytest.raises(ConfigurationError):
        USF(steps=0)


def test_it_declares_what_it_is():
    assert traits_of(USF, {"steps": 8}).order == 3
    assert traits_of(USF, {"schedule": [{}]}).order is None


def test_the_search_beats_dpm_solver_pp_with_five_evaluations_on_starts_that_it_never_saw():
    quick = USFSearch(initial=15, rounds=2, scored=8, children=60, samples=16, held_out=32)
    found = quick.search(problem_of(DPMSolverPP(5)))
    assert found.after["endpoint_error"] < 0.25 * found.before["endpoint_error"]
    scores = found.values["scores"]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] < scores[0]


@pytest.mark.parametrize(("path", "knots"), [("linear", Uniform()), ("ddpm", UniformLambda()), ("flow", KNOTS)])
def test_it_is_never_worse_than_the_known_methods_that_it_begins_with(path, knots):
    mixture = GaussianMixture(path=path)
    problem = problem_of(DPMSolverPP(4), mixture, knots)
    found = USFSearch(**SMALL).search(problem)
    best = found.values["scores"][-1]
    for step in KNOWN:
        base = USF(schedule=[dataclasses.asdict(step)] * 4)
        assert best <= problem.scores(range(8), sampler=base)["endpoint_error"] + 1e-12
    own = USF(schedule=found.values["schedule"])
    grid = Grid(mixture.path, tuple(mixture.path.level(t) for t in found.values["times"]))
    assert problem.scores(range(8), sampler=own, grid=grid)["endpoint_error"] == best
    assert problem.scores(range(8, 24), sampler=own, grid=grid) == found.after


def test_every_candidate_is_a_schedule_that_runs():
    rng = np.random.default_rng(0)
    space = _Space(30, 5, 0.5, rng)
    problem = problem_of(DPMSolverPP(5))
    levels = [MIXTURE.path.level_at_lam(lam) for lam in np.linspace(-4, 1, 31)]
    seen = set()
    parent = space.draw()
    for _ in range(60):
        other = space.draw()
        for candidate in (other, space.mutate(parent), space.cross(parent, other)):
            if candidate is not None:
                sampler, _ = _made(problem, candidate, levels)
                assert sampler.steps == 5
                assert len(space.numbers(candidate)) == 4 + 5 * 8
                seen |= {(step.form, step.derivatives, step.back, step.corrector) for step in candidate.steps}
        parent = other
    assert {each[0] for each in seen} == {"data", "noise"}
    assert {each[1] for each in seen} == {"exact", "bh1", "bh2", "low"}
    assert {each[2] for each in seen} == {0, 1, 2}


def test_it_is_the_same_again():
    first, again = (USFSearch(**SMALL).search(problem_of(DPMSolverPP(4))) for _ in range(2))
    assert first == again


def saved(tmp_path):
    found = USFSearch(**SMALL).search(problem_of(DPMSolverPP(4)))
    found.save(tmp_path / "usf.json")
    return found, str(tmp_path / "usf.json")


def test_a_file_is_for_one_model_and_its_own_times(tmp_path):
    found, file = saved(tmp_path)
    sampler, times = USF(schedule=file), Searched(file)
    assert sampler.steps == 4
    sampler.prepare(MIXTURE)
    grid = sampler.grid(MIXTURE.path, times)
    assert [level.t for level in grid] == found.values["times"]
    problem = SearchProblem(MIXTURE, sampler, times, grid)
    assert problem.scores(range(8, 24)) == pytest.approx(found.after)
    words = USFSearch().words(found, file)
    assert words == [
        "+sampler=usf",
        "sampler.steps=4",
        f"sampler.schedule={file}",
        "+time_grid=searched",
        f"time_grid.file={file}",
    ]
    with pytest.raises(CompositionError, match="another model"):
        sampler.prepare(GaussianMixture(means=[[0.0, 0.0]], weights=[1.0], variances=[1.0]))
    with pytest.raises(CompositionError, match="another time grid"):
        sampler.grid(MIXTURE.path, UniformLambda())
    with pytest.raises(ConfigurationError, match="one entry for each step"):
        USF(steps=5, schedule=file)


def test_other_files_and_models_are_refused(tmp_path):
    class Flow(GaussianMixture):
        gives = ("flow",)

    with pytest.raises(DataError):
        USF(schedule="nowhere.json")
    Artefact("ems", {}, {"l": [1.0]}).save(tmp_path / "ems.json")
    with pytest.raises(ConfigurationError, match="found no schedule"):
        USF(schedule=str(tmp_path / "ems.json"))
    with pytest.raises(CompositionError, match="data and noise forms"):
        USFSearch(**SMALL).search(problem_of(DPMSolverPP(4), Flow()))


@pytest.mark.parametrize(
    "options",
    [{"scorer": "fid"}, {"initial": 3}, {"rounds": -1}, {"scored": 0}, {"children": 5}, {"kept": 0}, {"chance": 0.0}],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigurationError):
        USFSearch(**{**SMALL, **options})
