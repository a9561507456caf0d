# pyright: reportAttributeAccessIssue=false
"""DPM-Solver-v3 and the statistics that it reads."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch

from lightrail.errors import CompositionError, ConfigurationError, DataError
from lightrail.generation import Denoiser, Evaluator, GaussianMixture, Grid, LinearVP, Noise, Prediction, sample
from lightrail.generation.search import Artefact, SearchProblem
from lightrail.traits import traits_of
from lightrail_generation.samplers.dpm_solver_v3 import DPMSolverV3, remainder
from lightrail_generation.samplers.exponential import adams_weights, carried, phi
from lightrail_generation.samplers.model_statistics import ModelStatistics, step_weights, weighted_states
from lightrail_generation.searches.ems import EMS, regression, statistics_of
from lightrail_generation.time_grids.uniform_lambda import UniformLambda

MIXTURE = GaussianMixture()
PATH = MIXTURE.path
KNOTS = UniformLambda(stop=0.05, end="minimum")
START = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 2)))
LAM = np.linspace(-6.0, 3.0, 200)
SMOOTH = ModelStatistics(LAM, 0.5 - 0.4 * np.tanh(LAM / 2), 0.3 * np.sin(LAM), 0.2 * np.cos(LAM))


def rms(difference: torch.Tensor) -> float:
    return float(difference.square().mean().sqrt())


def with_statistics(statistics: ModelStatistics | None, **options) -> DPMSolverV3:
    sampler = DPMSolverV3(**options)
    sampler.statistics = statistics or sampler.statistics
    return sampler


@functools.cache
def exact_at(times: tuple[float, ...]) -> torch.Tensor:
    return MIXTURE.exact(START, times[0], times[1:])


def error(sampler: DPMSolverV3, seeded: bool = False) -> float:
    grid = sampler.grid(PATH, KNOTS)
    exact = exact_at(tuple(level.t for level in grid))

    def on_the_solution(state):
        return dataclasses.replace(state, x=exact[state.index - 1]) if state.index < sampler.order else state

    found = sample(MIXTURE, sampler, grid, range(64), start=START, after_step=on_the_solution if seeded else None)
    return rms(found.x - exact[-1])


def slope(**options) -> float:
    statistics = options.pop("statistics", None)
    few, many = (error(with_statistics(statistics, steps=n, **options), seeded=True) for n in (80, 160))
    return math.log2(few / many)


PLAIN = {"corrector": False, "lower_order_final": False}


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("known", "form"), [("data", "data"), ("noise", "noise")])
def test_constant_statistics_are_exponential_adams_bashforth(order, known, form):
    sampler = DPMSolverV3(steps=9, order=order, statistics=known, **PLAIN)
    grid = sampler.grid(PATH, KNOTS)
    found = sample(MIXTURE, sampler, grid, range(64), start=START).x
    x, history = START, []
    for here, there in zip(grid.levels, grid.levels[1:], strict=False):
        history = [MIXTURE.predict(x, here), *history][:order]
        weights = adams_weights(here, there, [each.level.lam for each in history], form)
        x = carried(here, there, form) * x
        for weight, each in zip(weights, history, strict=True):
            x = x + weight * each.get(form)
    assert float((found - x).abs().max()) < 1e-12 * max(1.0, float(x.abs().max()))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("statistics", [None, SMOOTH])
def test_any_smooth_statistics_keep_the_order(order, statistics):
    assert slope(order=order, statistics=statistics, **PLAIN) == pytest.approx(order, abs=0.12)


def test_the_corrector_keeps_the_order_and_its_low_order_derivatives_have_two():
    options = {"lower_order_final": False, "statistics": SMOOTH}
    assert slope(order=3, corrector_pseudo=False, **options) > 2.5
    assert slope(order=1, **options) == pytest.approx(2, abs=0.1)
    assert slope(order=2, **options) == pytest.approx(2, abs=0.1)
    assert slope(order=3, **options) == pytest.approx(2, abs=0.1)
    assert slope(order=3, pseudo=True, corrector=False, **options) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(
    ("options", "order"),
    [
        ({}, 2),
        ({"order": 3, "corrector": False, "lower_order_final": False}, 3),
        ({"order": 3, "corrector_pseudo": False, "lower_order_final": False}, 3),
        ({"order": 3, "corrector": False, "lower_order_final": False, "pseudo": True}, 2),
        ({"order": 3, "corrector": False}, 2),
        ({"order": 1, "corrector": False}, 1),
        ({"order": 1}, 2),
    ],
)
def test_it_declares_the_order_that_it_has(options, order):
    assert traits_of(DPMSolverV3, options).order == order


def test_the_fitted_l_cuts_the_error_of_the_first_order():
    options = {"steps": 10, "order": 1, "corrector": False}
    data, noise = (error(DPMSolverV3(statistics=known, **options)) for known in ("data", "noise"))
    assert data == pytest.approx(0.12, abs=0.005)
    assert noise == pytest.approx(data, rel=1e-9)  # DDIM, both of them
    # e^{−λ} ε is what l = 0 leaves; taken for constant it is no solver of the noise form.
    assert error(with_statistics(ModelStatistics.constant(0.0), **options)) == pytest.approx(0.86, abs=0.01)
    problem = problem_of(DPMSolverV3(**options))
    found = EMS(points=120, samples=128, per="scalar", jacobian="exact", held_out=2).search(problem)
    lam, l = (found.values[name].numpy() for name in ("lam", "l"))  # noqa: E741
    assert l[0] == pytest.approx(1.0, abs=0.001)
    assert l[-1] == pytest.approx(0.09, abs=0.015)
    assert (np.diff(l) < 1e-3).all()
    none = np.zeros_like(l)
    fitted = error(with_statistics(ModelStatistics(lam, l, none, none), **options))
    assert fitted == pytest.approx(0.040, abs=0.002)
    # The exact diagonal, by hand at one level: σ ∂ε/∂x = 1 − α ∂D/∂x.
    level = PATH.level_at_lam(float(lam[60]))
    states = problem.solution(range(128), Grid(PATH, (PATH.level(1.0), level)))[1].requires_grad_()
    data_there = Evaluator(MIXTURE)(states, level).data
    rows = [torch.autograd.grad(data_there[:, i].sum(), states, retain_graph=True)[0][:, i] for i in range(2)]
    assert l[60] == pytest.approx(float(1 - level.alpha * torch.stack(rows).mean()), abs=1e-4)


def problem_of(sampler, mixture: Denoiser | None = None, knots=KNOTS) -> SearchProblem:
    model = mixture or MIXTURE
    return SearchProblem(model, sampler, knots, sampler.grid(model.path, knots))


def test_all_statistics_improve_a_run_on_samples_that_they_were_not_measured_on():
    found = EMS(points=60, samples=128, held_out=64).search(problem_of(DPMSolverV3(steps=10)))
    assert found.after["endpoint_error"] < 0.8 * found.before["endpoint_error"]
    lam = found.values["lam"]
    assert found.values["l"].shape == (60, 2)
    torch.testing.assert_close(lam, torch.linspace(float(lam[0]), float(lam[-1]), 60, dtype=torch.float64))
    # Each element of the mixture is much the same, and Hutchinson's estimate near the exact one.
    exact = EMS(points=60, samples=128, jacobian="exact", held_out=2).search(problem_of(DPMSolverV3(steps=10)))
    assert float((found.values["l"] - exact.values["l"]).abs().max()) < 0.06
    assert float((found.values["l"] - exact.values["l"]).abs().max()) > 1e-6


def test_statistics_of_a_gaussian_are_known_in_closed_form():
    # D = v α x/(α² v + σ²) about a mean of 0: l = σ²/(α² v + σ²) leaves f = 0 for every x, and s, b have nothing to do.
    variance = 0.3
    gaussian = GaussianMixture(means=[[0.0, 0.0]], weights=[1.0], variances=[variance])
    sampler = DPMSolverV3(steps=3, order=1, corrector=False)
    found = EMS(points=40, samples=8, held_out=8).search(problem_of(sampler, gaussian))
    lam = found.values["lam"]
    wanted = 1 / (1 + variance * torch.exp(2 * lam))
    torch.testing.assert_close(found.values["l"], wanted[:, None].expand(40, 2), atol=1e-9, rtol=1e-9)
    assert found.values["b"].abs().max() < 1e-6
    # With f = 0 a step is exact but for the statistics being linear between their knots.
    assert found.after["endpoint_error"] < 0.01 * found.before["endpoint_error"]


def test_s_and_b_are_the_regression_of_the_rate_on_the_remainder():
    lam = torch.linspace(-1, 1, 60, dtype=torch.float64)
    begin = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # f = begin e^{s λ} − b/s solves f' = s f + b.
    s, b = 0.7, -0.4
    f = begin * torch.exp(s * lam)[:, None, None] - b / s
    for per_element in (True, False):
        l, found_s, found_b = statistics_of(torch.zeros_like(f), -f, torch.ones_like(f), lam, per_element)  # noqa: E741
        assert found_s.shape == ((60, 2) if per_element else (60,))
        assert float(l.abs().max()) == 0
        assert float((found_s - s).abs().max()) < 2e-3
        assert float((found_b - b).abs().max()) < 2e-3
    flat = regression(torch.full((5,), 2.0), torch.arange(5.0), (0,))
    assert [float(each) for each in flat] == [0.0, 2.0]


def test_the_weights_are_the_integrals():
    # l and s constant: e^{−L} = e^{−l h}, and the first weight is h φ_1((l + s) h) less what b moves.
    statistics = ModelStatistics.constant(0.6, 0.5, 0.3)
    h = 1.7
    weights = step_weights(statistics, 0.4, 0.4 + h, (0.4,))
    assert weights.decay == pytest.approx(math.exp(-0.6 * h), rel=1e-13)
    assert weights.of_f[0] == pytest.approx(h * phi(1, 1.1 * h), rel=1e-13)
    # B = b (1 − e^{−s u})/s, and ∫ e^{(l+s) u} B du.
    wanted = 0.3 / 0.5 * (h * phi(1, 1.1 * h) - h * phi(1, 0.6 * h))
    assert weights.constant == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("point", [-0.9, 1.3])
def test_a_remainder_that_obeys_its_law_is_followed_exactly(point):
    # f' = s f + b keeps g constant: the step is exact with one value or with more, on either side of it.
    statistics = ModelStatistics.constant(0.6, 0.5, 0.3)

    def f(lam: float) -> float:
        return 2.0 * math.exp(0.5 * lam) - 0.6

    here, there = 0.1, 1.3
    results = []
    for points in ((here,), (here, point), (here, point, -1.4)):
        weights = step_weights(statistics, here, there, points)
        results.append(weights.constant + sum(w * f(lam) for w, lam in zip(weights.of_f, points, strict=True)))
    assert results[1] == pytest.approx(results[0], rel=1e-12)
    assert results[2] == pytest.approx(results[0], rel=1e-12)
    nodes = np.linspace(0, 1, 20001)
    lam = here + (there - here) * nodes
    integral = np.trapezoid(np.exp(0.6 * (lam - here)) * np.array([f(each) for each in lam]), lam)
    assert results[0] == pytest.approx(integral, rel=1e-7)


def test_a_step_is_solved_exactly_within_linear_pieces():
    # The statistics have kinks; the quadrature splits there, so that a step in two halves composes.
    rough = ModelStatistics(np.array([-1.0, -0.2, 0.3, 1.0]), *(np.array(v) for v in ([1, 0.2, 0.9, 0.1],) * 3))
    whole = step_weights(rough, -1.0, 1.0, (-1.0,))
    first, second = step_weights(rough, -1.0, 0.1, (-1.0,)), step_weights(rough, 0.1, 1.0, (0.1,))
    assert whole.decay == pytest.approx(first.decay * second.decay, rel=1e-13)
    l_area = 0.8 * 0.6 + 0.5 * 0.55 + 0.7 * 0.5
    assert whole.decay == pytest.approx(math.exp(-l_area), rel=1e-13)


def test_statistics_are_linear_between_their_values_and_constant_beyond():
    known = ModelStatistics(np.array([0.0, 1.0]), np.array([1.0, 3.0]), np.array([0.0, 2.0]), np.array([5.0, 5.0]))
    l, s, b = known.at(np.array([-1.0, 0.0, 0.25, 1.0, 9.0]))  # noqa: E741
    assert l.tolist() == [1, 1, 1.5, 3, 3]
    assert s.tolist() == [0, 0, 0.5, 2, 2]
    assert b.tolist() == [5, 5, 5, 5, 5]


def test_statistics_for_each_element_act_on_each():
    each = ModelStatistics(LAM, *(np.stack([v, 0.5 * v], axis=1) for v in (SMOOTH.l, SMOOTH.s, SMOOTH.b)))
    half = ModelStatistics(SMOOTH.lam, *(0.5 * v for v in (SMOOTH.l, SMOOTH.s, SMOOTH.b)))
    gaussian = GaussianMixture(means=[[0.4, 0.4]], weights=[1.0], variances=[0.3])  # its elements do not meet
    results = []
    for statistics in (each, SMOOTH, half):
        sampler = with_statistics(statistics, steps=6)
        results.append(sample(gaussian, sampler, sampler.grid(PATH, KNOTS), range(64), start=START).x)
    torch.testing.assert_close(results[0][:, 0], results[1][:, 0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(results[0][:, 1], results[2][:, 1], rtol=1e-11, atol=1e-11)
    assert rms(results[1] - results[2]) > 1e-3


def test_the_corrector_keeps_the_remainder_and_costs_no_evaluation():
    asked = []

    class Watching(GaussianMixture):
        def output(self, x, t, condition):
            asked.append(float(t[0]))
            return super().output(x, t, condition)

    sampler = with_statistics(SMOOTH, steps=8)
    grid = sampler.grid(PATH, UniformLambda())
    assert sample(Watching(), sampler, grid, range(3)).evaluations == 8 == sampler.evaluations(grid)
    assert asked == [level.t for level in grid][:-1]


def test_the_corrector_in_half_of_the_path_alone():
    def states(**options):
        found = []
        sampler = with_statistics(SMOOTH, steps=8, **options)
        grid = sampler.grid(PATH, KNOTS)
        sample(MIXTURE, sampler, grid, range(4), after_step=lambda state: found.append(state.x) or state)
        return found, [level.t for level in grid]

    (never, times), (half, _), (always, _) = states(corrector=False), states(half=True), states()
    # Corrected is what is left behind, so that it shows one step later.
    first = next(i for i, t in enumerate(times) if t <= 0.5)
    for index in range(first):
        assert torch.equal(never[index], half[index])
    assert not torch.equal(never[first], half[first])
    assert not torch.equal(never[1], always[1])


def test_the_remainder_is_the_same_from_either_form():
    level = PATH.level(0.4)
    x = START[:5]
    data = MIXTURE.predict(x, level)
    noise = Prediction(x, level, "noise", data.noise)
    l = float(SMOOTH.at(np.array([level.lam]))[0][0])  # noqa: E741
    wanted = (level.sigma * data.noise - l * x) / level.alpha
    torch.testing.assert_close(remainder(data, SMOOTH), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(remainder(noise, SMOOTH), wanted, rtol=1e-12, atol=1e-12)


def test_the_last_step_returns_the_data_as_the_corrector_leaves_them():
    sampler = with_statistics(SMOOTH, steps=1)
    grid = sampler.grid(PATH, UniformLambda())
    found = sample(MIXTURE, sampler, grid, range(64), start=START).x
    torch.testing.assert_close(found, MIXTURE.predict(START, grid[0]).data, rtol=1e-12, atol=1e-12)
    longer = with_statistics(SMOOTH, steps=5)
    assert sample(MIXTURE, longer, longer.grid(PATH, UniformLambda()), range(9)).x.isfinite().all()


def test_weighted_states_take_numbers_and_tensors():
    x, y = torch.ones(2, 3, dtype=torch.bfloat16), torch.full((2, 3), 2.0, dtype=torch.bfloat16)
    row = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    found = weighted_states((2.0, x), (row, y), (0.5, None), like=x)
    assert found.dtype == torch.bfloat16
    assert found[0].tolist() == [4.5, 6.5, 8.5]
    assert weighted_states((row, None), like=x)[1].tolist() == [1, 2, 3]
    assert weighted_states((0.0, None), like=x).sum() == 0


def saved(tmp_path, mixture: GaussianMixture = MIXTURE):
    problem = problem_of(DPMSolverV3(steps=6), mixture)
    found = EMS(points=20, samples=16, held_out=4).search(problem)
    found.save(tmp_path / "ems.json")
    return found, str(tmp_path / "ems.json")


def test_a_file_is_read_and_is_for_one_model(tmp_path):
    found, file = saved(tmp_path)
    sampler = DPMSolverV3(steps=6, statistics=file)
    sampler.prepare(MIXTURE)
    held_out = range(16, 20)
    assert problem_of(sampler).scores(held_out) == found.after
    DPMSolverV3(steps=9, statistics=file).prepare(MIXTURE)  # statistics serve any number of steps
    with pytest.raises(CompositionError, match="another model"):
        sampler.prepare(GaussianMixture(means=[[0.0, 0.0]], weights=[1.0], variances=[1.0]))
    with pytest.raises(CompositionError, match="another noise path"):
        sampler.prepare(GaussianMixture(path=LinearVP(beta_max=10.0)))
    words = EMS().words(found, file)
    assert words[0] == "+sampler=dpm_solver_v3"
    assert {"sampler.steps=6", "sampler.corrector=true", f"sampler.statistics={file}"} < set(words)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(DataError):
        DPMSolverV3(statistics="nowhere.json")
    Artefact("usf", {}, {"schedule": []}).save(tmp_path / "usf.json")
    with pytest.raises(ConfigurationError, match="found no statistics"):
        DPMSolverV3(statistics=str(tmp_path / "usf.json"))


@pytest.mark.parametrize("options", [{"order": 0}, {"order": 4}, {"order": 1.5}, {"steps": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigurationError):
        DPMSolverV3(**options)


@pytest.mark.parametrize(
    "options", [{"points": 2}, {"samples": 1}, {"probes": 0}, {"per": "pixel"}, {"jacobian": "none"}]
)
def test_a_measurement_out_of_range_is_refused(options):
    with pytest.raises(ConfigurationError):
        EMS(**options)


def test_a_model_that_cannot_be_measured_is_refused():
    class Opaque(GaussianMixture):
        def output(self, x, t, condition):
            return super().output(x.detach(), t, condition)

    class Flow(GaussianMixture):
        gives = ("flow",)

    with pytest.raises(CompositionError, match="cannot be differentiated"):
        EMS(points=5, samples=4).search(problem_of(DPMSolverV3(steps=4), Opaque()))
    with pytest.raises(CompositionError, match="data or noise prediction"):
        EMS(points=5, samples=4).search(problem_of(DPMSolverV3(steps=4), Flow()))


def test_more_probes_are_nearer_the_exact_diagonal():
    problem = problem_of(DPMSolverV3(steps=4))
    state = START.clone()
    level = PATH.level(0.3)

    def diagonal(**options):
        return EMS(**options)._diagonal(problem.predictor(range(64)), state, level, Noise(0, range(64), (2,)))

    exact = diagonal(jacobian="exact")
    one, many = (rms(diagonal(probes=count) - exact) for count in (1, 64))
    assert 0 < many < 0.4 * one
