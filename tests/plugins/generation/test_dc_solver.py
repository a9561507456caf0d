# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
"""DC-Solver and the ratios that are fitted for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightrail.errors import CompositionError, ConfigurationError, DataError
from lightrail.generation import GaussianMixture, Level, Prediction, sample
from lightrail.generation.search import Artefact, SearchProblem
from lightrail.traits import traits_of
from lightrail_generation.samplers.dc_solver import DCSolver, compensated
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.unipc import UniPC
from lightrail_generation.searches.dc_ratios import DCRatios, smallest
from lightrail_generation.time_grids.uniform import Uniform
from lightrail_generation.time_grids.uniform_lambda import UniformLambda

MIXTURE = GaussianMixture()
KNOTS = Uniform(stop=0.05, end="minimum")
START = torch.from_numpy(np.random.default_rng(0).standard_normal((16, 2)))


def run(sampler, knots=KNOTS):
    return sample(MIXTURE, sampler, sampler.grid(MIXTURE.path, knots), range(16), start=START)


def problem_of(sampler, knots=KNOTS) -> SearchProblem:
    return SearchProblem(MIXTURE, sampler, knots, sampler.grid(MIXTURE.path, knots))


def history_of(values, times) -> list[Prediction]:
    x = torch.zeros(2, 1, dtype=torch.float64)
    return [
        Prediction(x, Level(t, 1.0, t), "data", torch.full_like(x, value))
        for value, t in zip(values, times, strict=True)
    ]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("form", ["data", "noise"])
@pytest.mark.parametrize("b", ["bh1", "bh2", "vary"])
def test_ratios_of_one_are_unipc_bit_for_bit(order, form, b):
    options = {"steps": 7, "order": order, "form": form, "b": b}
    for given in ({}, {"corrector": False}, {"corrector_start": 2}, {"lower_order_final": False}):
        for knots in (KNOTS, UniformLambda()):
            ours, base = run(DCSolver(**options, **given), knots), run(UniPC(**options, **given), knots)
            assert torch.equal(ours.x, base.x)
            assert ours.evaluations == base.evaluations == 7


@pytest.mark.parametrize("order", [2, 3])
def test_ratios_near_one_are_near_unipc(order):
    near = run(DCSolver(7, order=order, ratios=[1.0] * 2 + [1 + 1e-9] * 5)).x
    far = run(DCSolver(7, order=order, ratios=[1.0] * 2 + [1.2] * 5)).x
    base = run(UniPC(7, order=order, b="bh1")).x
    assert 0 < float((near - base).abs().max()) < 1e-7
    assert float((far - base).abs().max()) > 1e-3


def test_the_first_two_steps_are_unipc_whatever_their_ratios():
    assert torch.equal(run(DCSolver(5, ratios=[2.0, 2.0, 1, 1, 1])).x, run(DCSolver(5)).x)


def test_without_a_corrector_it_is_dpm_solver_pp():
    options = {"order": 2, "lower_order_final": False}
    ours = run(DCSolver(8, b="bh2", corrector=False, **options)).x
    base = run(DPMSolverPP(8, **options)).x
    torch.testing.assert_close(ours, base, rtol=1e-12, atol=1e-12)
    assert float((run(DCSolver(8, b="bh2", corrector=False, ratios=[1.3] * 8, **options)).x - base).abs().max()) > 1e-3


def test_the_newest_prediction_moves_along_a_parabola_in_time():
    def law(t):
        return 3 * t**2 - 2 * t + 1

    times = (0.3, 0.5, 0.6)
    for ratio in (0.5, 1.0, 1.4):
        found = compensated(history_of([law(t) for t in times], times), ratio, "data")
        place = ratio * 0.3 + (1 - ratio) * 0.5
        assert float(found.data[0, 0]) == pytest.approx(law(place), abs=1e-12)
        assert found.level.t == 0.3
    # Of more values the last three alone count.
    longer = compensated(history_of([1.0, 2.0, 4.0, 100.0], (0.3, 0.5, 0.6, 0.9)), 1.2, "data")
    assert torch.equal(longer.data, compensated(history_of([1.0, 2.0, 4.0], times), 1.2, "data").data)


def test_a_step_by_hand():
    """The third step of order 2, with its corrector, from the published equations."""
    knots = UniformLambda(stop=0.05, end="minimum")
    ratio = 1.3
    sampler = DCSolver(4, order=2, b="bh2", ratios=[1, 1, ratio, 1], lower_order_final=False)
    grid = sampler.grid(MIXTURE.path, knots)
    found = []
    sample(MIXTURE, sampler, grid, range(16), start=START, after_step=lambda state: found.append(state) or state)

    def predictor(x, m0, m1, here, there, before):
        h, r = there.lam - here.lam, (before.lam - here.lam) / (there.lam - here.lam)
        lost = np.expm1(-h)
        d1 = (m1 - m0) / r
        return there.sigma / here.sigma * x - there.alpha * lost * m0 - there.alpha * lost * 0.5 * d1

    def corrector(x, m0, m1, mt, here, there, before):
        h, r = there.lam - here.lam, (before.lam - here.lam) / (there.lam - here.lam)
        lost = np.expm1(-h)
        phi1 = lost / -h
        phi2 = (phi1 - 1) / -h
        phi3 = (phi2 - 0.5) / -h
        # With z = −h and B = e^z − 1: Σ ρ_j r_j^{i−1} = i! z φ_{i+1}/B for i = 1, 2.
        rho = np.linalg.solve(np.array([[1, 1], [r, 1]]), np.array([-h * phi2 / lost, 2 * -h * phi3 / lost]))
        terms = rho[0] * (m1 - m0) / r + rho[1] * (mt - m0)
        return there.sigma / here.sigma * x - there.alpha * lost * m0 - there.alpha * lost * terms

    g = grid.levels
    m_0 = MIXTURE.predict(START, g[0]).data
    h0 = g[1].lam - g[0].lam
    x1 = g[1].sigma / g[0].sigma * START - g[1].alpha * np.expm1(-h0) * m_0
    m_1 = MIXTURE.predict(x1, g[1]).data
    x1c = x1 - g[1].alpha * np.expm1(-h0) * 0.5 * (m_1 - m_0)
    x2 = predictor(x1c, m_1, m_0, g[1], g[2], g[0])
    m_2 = MIXTURE.predict(x2, g[2]).data
    x2c = corrector(x1c, m_1, m_0, m_2, g[1], g[2], g[0])
    t0, t1, t2 = g[2].t, g[1].t, g[0].t
    t = ratio * t0 + (1 - ratio) * t1
    moved = (
        (t - t1) * (t - t2) / ((t0 - t1) * (t0 - t2)) * m_2
        + (t - t0) * (t - t2) / ((t1 - t0) * (t1 - t2)) * m_1
        + (t - t0) * (t - t1) / ((t2 - t0) * (t2 - t1)) * m_0
    )
    x3 = predictor(x2c, moved, m_1, g[2], g[3], g[1])
    torch.testing.assert_close(found[1].x, x2, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[2].x, x3, rtol=1e-10, atol=1e-10)
    # What replaced it stays in the history: the next corrector and predictor read it.
    torch.testing.assert_close(found[2].history[0].data, moved, rtol=1e-10, atol=1e-10)


def test_fitted_ratios_lower_the_error_on_starts_that_they_were_not_fitted_on():
    # 5 to 10 evaluations: by at least the factors 0.159/0.060, 0.109/0.049, 0.057/0.037 and 0.036/0.029, less a tenth.
    for steps, factor in ((5, 2.65), (6, 2.2), (8, 1.54), (10, 1.24)):
        found = DCRatios(samples=10, trials=28, held_out=64).search(problem_of(DCSolver(steps)))
        before, after = found.before["endpoint_error"], found.after["endpoint_error"]
        assert before / after > 0.9 * factor
        ratios = found.values["ratios"]
        assert ratios[:2] == [1.0, 1.0]
        assert ratios[-1] == max(ratios)
        assert 1.2 < ratios[-1] < 1.6


@pytest.mark.parametrize("knots", [KNOTS, Uniform(), UniformLambda(stop=0.05, end="denoise")])
@pytest.mark.parametrize("options", [{}, {"corrector": False}, {"order": 2, "b": "bh2"}])
def test_no_ratio_is_worse_than_one_where_it_was_fitted(knots, options):
    problem = problem_of(DCSolver(6, **options), knots)
    found = DCRatios(samples=8, held_out=4).search(problem)
    fitted = list(found.values["ratios"])
    grid, target = problem.grid, problem.solution(range(8))[-1]

    def loss(ratios):
        x = sample(MIXTURE, DCSolver(6, **options, ratios=ratios), grid, range(8)).x
        return float((x - target).square().mean())

    assert loss(fitted) == pytest.approx(found.values["losses"][-1], rel=1e-9)
    assert loss(fitted) <= loss([*fitted[:-1], 1.0])
    assert found.values["losses"][:2] == [None, None]


def test_a_ratio_is_fitted_to_the_state_that_the_corrector_leaves():
    problem = problem_of(DCSolver(6))
    found = DCRatios(samples=8, held_out=2, trials=12).search(problem)
    sampler, predict = DCSolver(6, ratios=found.values["ratios"]), problem.predictor(range(8))
    state = sampler.start(problem.starts(range(8)), problem.noise(range(8)), problem.grid)
    for index in range(5):
        state = sampler.step(state, predict, problem.grid)
        if index >= 2:
            x = sampler.corrected(state, predict(state.x, problem.grid[index + 1]), problem.grid)
            loss = float((x - problem.solution(range(8))[index + 1]).square().mean())
            assert found.values["losses"][index] == pytest.approx(loss, rel=1e-6)
            assert not torch.equal(x, state.x)


def test_it_is_the_same_again_and_begins_at_unipc_too():
    quick = DCRatios(samples=4, held_out=4, trials=12)
    one = quick.search(problem_of(DCSolver(5)))
    assert quick.search(problem_of(DCSolver(5))) == one
    assert quick.search(problem_of(UniPC(5, order=3, b="bh1"))).values == one.values
    for other in (DDIM(5), DPMSolverPP(5)):
        with pytest.raises(CompositionError, match="those of DC-Solver"):
            quick.search(problem_of(other))


def test_the_smallest_of_a_function():
    place, value = smallest(lambda r: (r - 1.234) ** 2 + 3, 0.5, 2.0, 60)
    assert place == pytest.approx(1.234, abs=1e-4)
    assert value == pytest.approx(3)
    asked = []
    smallest(lambda r: asked.append(r) or abs(r), 0.5, 2.0, 30)
    assert len(asked) <= 31
    assert min(asked) == 0.5
    assert asked[0] == 1.0
    # Of two valleys the deeper one that a row of places shows.
    place, _ = smallest(lambda r: min((r - 0.7) ** 2, (r - 1.9) ** 2 - 0.1), 0.5, 2.0, 60)
    assert place == pytest.approx(1.9, abs=1e-3)


def saved(tmp_path):
    found = DCRatios(samples=4, held_out=4, trials=12).search(problem_of(DCSolver(5)))
    found.save(tmp_path / "ratios.json")
    return found, str(tmp_path / "ratios.json")


def test_a_file_is_for_one_model_grid_and_setting(tmp_path):
    found, file = saved(tmp_path)
    sampler = DCSolver(5, ratios=file)
    sampler.prepare(MIXTURE)
    assert list(sampler.ratios) == found.values["ratios"]
    assert problem_of(sampler).scores(range(4, 8)) == found.after
    words = DCRatios().words(found, file)
    assert words[:2] == ["+sampler=dc_solver", "sampler.steps=5"]
    assert {"sampler.order=3", "sampler.b=bh1", "sampler.corrector=true", f"sampler.ratios={file}"} < set(words)
    with pytest.raises(CompositionError, match="another model"):
        sampler.prepare(GaussianMixture(means=[[0.0, 0.0]], weights=[1.0], variances=[1.0]))
    with pytest.raises(CompositionError, match="number of steps"):
        DCSolver(6, ratios=file).prepare(MIXTURE)
    with pytest.raises(CompositionError, match="another time grid"):
        sampler.grid(MIXTURE.path, UniformLambda())
    for name, value in (("order", 2), ("b", "bh2"), ("corrector", False), ("form", "noise")):
        with pytest.raises(ConfigurationError, match="set otherwise") as caught:
            DCSolver(5, ratios=file, **{name: value})
        assert name in caught.value.remedy


def test_other_files_are_refused(tmp_path):
    with pytest.raises(DataError):
        DCSolver(5, ratios="nowhere.json")
    Artefact("ems", {}, {"l": [1.0]}).save(tmp_path / "ems.json")
    with pytest.raises(ConfigurationError, match="found no ratios"):
        DCSolver(5, ratios=str(tmp_path / "ems.json"))


@pytest.mark.parametrize(
    "options", [{"ratios": [1.0] * 4}, {"ratios": [1, 1, 0, 1, 1]}, {"order": 5}, {"b": "bh3"}, {"steps": 0}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigurationError):
        DCSolver(**{"steps": 5, **options})


@pytest.mark.parametrize(
    "options", [{"samples": 0}, {"trials": 7}, {"lowest": 1.0}, {"lowest": 0.0}, {"highest": 1.0}, {"held_out": 1}]
)
def test_a_search_out_of_range_is_refused(options):
    with pytest.raises(ConfigurationError):
        DCRatios(**options)


def test_it_declares_what_it_is():
    assert traits_of(DCSolver, {}).order == 2
    assert traits_of(DCSolver, {"lower_order_final": False}).order == 4
    assert traits_of(DCSolver, {"lower_order_final": False, "corrector": False, "order": 2}).order == 2
    assert traits_of(DCSolver, {"ratios": [1.0]}).order is None
    assert traits_of(DCSolver, {"form": "noise"}).needs_predictions == ("noise",)


def test_half_precision_states_keep_their_type():
    mixture = GaussianMixture(dtype="bfloat16")
    sampler = DCSolver(6, ratios=[1, 1, 1.2, 1.2, 1.2, 1.4])
    found = sample(mixture, sampler, sampler.grid(mixture.path, Uniform()), range(4)).x
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()
