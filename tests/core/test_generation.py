"""Noise paths, predictions, noise that belongs to samples, grids, and the exact mixture."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import (
    CosineVP,
    Denoiser,
    GaussianMixture,
    Grid,
    KarrasVE,
    LinearFlow,
    LinearVP,
    Noise,
    NoisePath,
    Prediction,
    Sampler,
    SamplerWrapper,
    State,
    TableVP,
    TimeGrid,
    check_fit,
    invert,
    sample,
    weighted_sum,
)
from lightrail.generation.prediction import FORMS
from lightrail.traits import Traits

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
PATHS: dict[str, NoisePath] = {
    "linear": LinearVP(),
    "cosine": CosineVP(),
    "edm": KarrasVE(),
    "flow": LinearFlow(),
    "table": TableVP(torch.cumprod(1 - BETAS, 0)),
}


class Uniform(TimeGrid):
    reaches_zero = True

    def times(self, path: NoisePath, start: float, stop: float, count: int) -> np.ndarray:
        return np.linspace(start, stop, count)


class Euler(Sampler):
    """x' = α' D + σ' ε."""

    traits = Traits(order=1, needs_predictions=("data",))

    def step(self, state: State, predict, grid: Grid) -> State:  # type: ignore[no-untyped-def]
        here, there = grid[state.index], grid[state.index + 1]
        found = predict(state.x, here)
        return state.next(there.alpha * found.data + there.sigma * found.noise)

    def invert(self, state: State, predict, grid: Grid) -> State:  # type: ignore[no-untyped-def]
        return state


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> NoisePath:
    return PATHS[request.param]


def times_on(path: NoisePath, count: int = 41) -> torch.Tensor:
    """Times inside the path, none of them whole: a table's slope jumps there."""
    return torch.linspace(path.t_min, path.t_finite, count + 2, dtype=torch.float64)[1:-1] + 1e-4 * path.t_max / count


def test_lambda_is_half_the_logarithm_of_the_signal_to_noise_ratio_and_can_be_inverted(path: NoisePath) -> None:
    t = times_on(path)
    torch.testing.assert_close(path.lam(t), (path.alpha(t) / path.sigma(t)).log(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(path.t_of_lam(path.lam(t)), t, rtol=1e-9, atol=1e-9)
    assert bool((path.lam(t).diff() < 0).all())


def test_the_general_inverse_by_bisection_finds_the_same_times(path: NoisePath) -> None:
    t = times_on(path)
    torch.testing.assert_close(NoisePath.t_of_lam(path, path.lam(t)), t, rtol=1e-9, atol=1e-9)


def test_rates_are_the_derivatives(path: NoisePath) -> None:
    t, h = times_on(path), 1e-6 * path.t_max
    for value, rate in ((path.alpha, path.alpha_rate), (path.sigma, path.sigma_rate)):
        slope = (value(t + h) - value(t - h)) / (2 * h)
        torch.testing.assert_close(rate(t), slope, rtol=2e-4, atol=1e-6)


def test_the_data_end_is_clean_and_variance_preserving_paths_keep_the_variance(path: NoisePath) -> None:
    assert (path.level(path.t_zero).alpha, path.level(path.t_zero).sigma) == (1.0, 0.0)
    assert path.level(path.t_zero).is_clean
    assert path.level(path.t_zero).lam == math.inf
    if not isinstance(path, KarrasVE | LinearFlow):
        t = times_on(path)
        torch.testing.assert_close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones_like(t), rtol=1e-12, atol=1e-12)


def test_a_table_holds_its_entries_at_whole_times() -> None:
    path, wanted = PATHS["table"], torch.cumprod(1 - BETAS, 0)
    found = path.alpha(torch.arange(1000, dtype=torch.float64)) ** 2
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    assert path.level(-1).alpha == 1.0


def test_the_finite_start_has_alpha_of_at_least_a_4096th() -> None:
    flow = LinearFlow()
    assert flow.t_finite == pytest.approx(1 - 2**-12, abs=1e-9)
    assert LinearVP().t_finite == 1.0
    assert KarrasVE().t_finite == 80.0


def test_one_level_a_sample_equals_the_levels_one_by_one(path: NoisePath) -> None:
    t = times_on(path, 5)
    together = path.levels(t, dims=3)
    for row, time in enumerate(t.tolist()):
        alone = path.level(time)
        for name in ("alpha", "sigma", "alpha_rate", "sigma_rate", "lam", "rho"):
            assert float(getattr(together, name)[row]) == pytest.approx(getattr(alone, name), rel=1e-12)
    assert together.alpha.shape == (5, 1, 1)  # type: ignore[attr-defined]


def test_every_form_of_a_prediction_converts_to_every_other(path: NoisePath) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, z = (torch.randn(3, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    for t in times_on(path, 7).tolist():
        level = path.level(t)
        x = level.alpha * x0 + level.sigma * z
        truth = {
            "data": x0,
            "noise": z,
            "velocity": level.alpha * z - level.sigma * x0,
            "flow": level.alpha_rate * x0 + level.sigma_rate * z,
            "score": -z / level.sigma,
        }
        for form in FORMS:
            prediction = Prediction(x, level, form, truth[form])
            for other in FORMS:
                scale = 1 + float(truth[other].abs().max())
                torch.testing.assert_close(prediction.get(other), truth[other], rtol=0, atol=1e-7 * scale)


def test_a_prediction_at_one_level_a_sample_equals_the_predictions_one_by_one() -> None:
    path = LinearVP()
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    x, y = torch.ones(2, 3, dtype=torch.float64), torch.full((2, 3), 0.5, dtype=torch.float64)
    together = Prediction(x, path.levels(t, 2), "noise", y)
    for row in range(2):
        alone = Prediction(x[row : row + 1], path.level(float(t[row])), "noise", y[row : row + 1])
        torch.testing.assert_close(together.data[row : row + 1], alone.data, rtol=1e-14, atol=1e-14)


def test_a_gradient_passes_through_a_conversion() -> None:
    level = LinearVP().level(0.5)
    y = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    Prediction(torch.ones(1, 2, dtype=torch.float64), level, "noise", y).data.sum().backward()
    assert y.grad is not None
    torch.testing.assert_close(y.grad, torch.full_like(y, -level.sigma / level.alpha), rtol=1e-12, atol=0)


def test_where_data_are_replaced_the_noise_follows() -> None:
    level = LinearVP().level(0.5)
    x = torch.ones(1, 2, dtype=torch.float64)
    following = Prediction(x, level, "data", 0.5 * x).with_data(0 * x)
    torch.testing.assert_close(following.noise, x / level.sigma, rtol=1e-12, atol=0)


# Noise.


def test_noise_belongs_to_the_sample_whatever_the_batch() -> None:
    together = Noise(3, range(5), (2, 2)).normal(7)
    for i in range(5):
        assert torch.equal(Noise(3, [i], (2, 2)).normal(7)[0], together[i])
    assert torch.equal(Noise(3, [4, 0], (2, 2)).normal(7), together[[4, 0]])


def test_noise_differs_by_seed_sample_step_draw_and_kind() -> None:
    seen = {
        tuple(Noise(seed, [i], (4,)).normal(step, draw)[0].tolist())
        for seed in (0, 1)
        for i in (0, 1)
        for step in (-1, 0, 1)
        for draw in (0, 1)
    }
    assert len(seen) == 24
    many = Noise(0, range(4000), ())
    # Normal and uniform numbers of one draw share no stream.
    assert abs(float(torch.stack((many.normal(0), many.uniform(0))).corrcoef()[0, 1])) < 0.06
    assert abs(float(torch.stack((many.normal(0), many.normal(0, 1))).corrcoef()[0, 1])) < 0.06


def test_noise_is_standard_normal_and_independent_between_samples_and_steps() -> None:
    noise = Noise(11, range(2000), (16,))
    first, second = noise.normal(0), noise.normal(1)
    assert abs(float(first.mean())) < 0.02
    assert abs(float(first.std()) - 1) < 0.02
    assert abs(float((first * second).mean())) < 0.02
    assert abs(float((first[1:] * first[:-1]).mean())) < 0.02
    uniform = noise.uniform(0)
    assert 0 <= float(uniform.min()) <= float(uniform.max()) < 1
    assert abs(float(uniform.mean()) - 0.5) < 0.03


def test_no_two_samples_of_a_draw_share_their_key() -> None:
    from lightrail.generation.noise import _mixed_32

    assert len({_mixed_32(i ^ 0x12345) for i in range(200_000)}) == 200_000


def test_noise_leaves_torchs_generator_alone_and_is_the_same_in_half_precision() -> None:
    state = torch.get_rng_state()
    wide = Noise(0, range(3), (5,)).normal(0)
    half = Noise(0, range(3), (5,), torch.bfloat16).normal(0)
    assert torch.equal(wide.bfloat16(), half)
    assert torch.equal(torch.get_rng_state(), state)


# Grids.


def test_the_ends_of_a_grid() -> None:
    path = LinearVP()
    zero = Uniform().grid(path, 4)
    assert [level.t for level in zero] == [1.0, 0.75, 0.5, 0.25, 0.0]
    jumping = Uniform(stop=0.1).grid(path, 4)
    assert [round(level.t, 6) for level in jumping] == [1.0, 0.7, 0.4, 0.1, 0.0]
    minimum = Uniform(stop=0.2, end="minimum").grid(path, 4)
    assert [round(level.t, 6) for level in minimum] == [1.0, 0.8, 0.6, 0.4, 0.2]
    denoising = Uniform(end="denoise").grid(path, 2)
    assert denoising.denoises_last
    assert denoising[-1].t == path.t_min
    assert len(Uniform().grid(path, 1)) == 2


def test_a_solver_that_divides_by_alpha_starts_where_there_is_some() -> None:
    flow = LinearFlow()
    assert Uniform().grid(flow, 3)[0].alpha == pytest.approx(2**-12)
    assert Uniform().grid(flow, 3, finite=False)[0].alpha == 0


def test_times_that_do_not_fall_or_leave_the_path_are_named() -> None:
    path = LinearVP()
    with pytest.raises(ConfigurationError, match="does not fall"):
        Grid(path, (path.level(0.5), path.level(0.5)))
    with pytest.raises(ConfigurationError, match="leaves the noise path"):
        Uniform(start=1.5, end="minimum").grid(path, 3, finite=False)
    with pytest.raises(ConfigurationError, match="end has no choice"):
        Uniform(end="never")


# The mixture.


def test_the_mixtures_score_is_the_gradient_of_its_density(path: NoisePath) -> None:
    mixture = GaussianMixture(path=path)
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in times_on(path, 3).tolist():
        point = x.clone().requires_grad_()
        (score,) = torch.autograd.grad(mixture.log_density(point, t).sum(), point)
        found = mixture.predict(x, path.level(t)).score
        torch.testing.assert_close(found, score, rtol=1e-8, atol=1e-8)


def test_a_label_chooses_one_component() -> None:
    mixture, level = GaussianMixture(), LinearVP().level(0.4)
    x = torch.ones(2, 2, dtype=torch.float64)
    condition = mixture.condition({"label": [0, 2]}, range(2))
    found = mixture.predict(x, level, condition).data
    for row, k in enumerate((0, 2)):
        alone = GaussianMixture(
            means=[mixture.means[k].tolist()], weights=[1.0], variances=[float(mixture.variances[k])]
        )
        torch.testing.assert_close(found[row : row + 1], alone.predict(x[row : row + 1], level).data)
    assert mixture.condition({"label": None}, range(2)) is None
    with pytest.raises(CompositionError, match="no class 3"):
        mixture.condition({"label": 3}, range(1))


def test_the_exact_solution_of_one_gaussian_is_the_known_one(path: NoisePath) -> None:
    mixture = GaussianMixture(means=[[0.5, -1.0]], weights=[2.0], variances=[0.3], path=path)
    begin, end = path.t_finite, path.t_min + 0.3 * (path.t_finite - path.t_min)
    start = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    a, b = path.level(begin), path.level(end)
    # x/α − m shrinks with the standard deviation √(v + ρ²).
    shrink = math.sqrt((0.3 + b.rho**2) / (0.3 + a.rho**2))
    wanted = b.alpha * (mixture.means[0] + shrink * (start / a.alpha - mixture.means[0]))
    found = mixture.exact(start, begin, [end, path.t_zero])
    torch.testing.assert_close(found[0], wanted, rtol=1e-8, atol=1e-8)
    clean = mixture.means[0] + math.sqrt(0.3 / (0.3 + a.rho**2)) * (start / a.alpha - mixture.means[0])
    torch.testing.assert_close(found[1], clean, rtol=1e-6, atol=1e-6)


def test_moments_of_the_mixture() -> None:
    mixture = GaussianMixture()
    drawn = mixture.draw(Noise(0, range(40_000), (2,), torch.float64))
    mean, covariance = mixture.moments()
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(drawn.T.cov(), covariance, rtol=0, atol=0.03)


def test_a_mixture_that_does_not_match_is_named() -> None:
    with pytest.raises(ConfigurationError, match="do not make a mixture"):
        GaussianMixture(weights=[0.5, 0.5])
    with pytest.raises(ConfigurationError, match="do not make a mixture"):
        GaussianMixture(variances=[0.1, 0.2, -0.1])


# Sampling.


def test_a_sample_is_the_same_alone_and_in_a_batch_and_evaluations_are_counted() -> None:
    mixture, sampler = GaussianMixture(), Euler(steps=6)
    grid = sampler.grid(mixture.path, Uniform())
    together = sample(mixture, sampler, grid, range(4), seed=5)
    for i in range(4):
        torch.testing.assert_close(sample(mixture, sampler, grid, [i], seed=5).x[0], together.x[i], rtol=1e-14, atol=0)
    assert together.evaluations == 6 == sampler.evaluations(grid)


def test_a_grid_that_denoises_asks_once_more() -> None:
    mixture, sampler = GaussianMixture(), Euler(steps=6)
    grid = sampler.grid(mixture.path, Uniform(stop=0.05, end="denoise"))
    assert sample(mixture, sampler, grid, range(2)).evaluations == 7 == sampler.evaluations(grid)


def test_a_state_can_be_resampled_history_and_all() -> None:
    path = LinearVP()
    x = torch.arange(6, dtype=torch.float64).view(3, 2)
    kept = Prediction(x, path.levels(torch.tensor([0.1, 0.2, 0.3]), 2), "data", 2 * x)
    state = State(x, Noise(0, range(3), (2,)), 1, (kept,), {"v": 3 * x, "both": (x, kept), "count": 4})
    rows = torch.tensor([2, 2, 0])
    chosen = state.select(rows)
    assert torch.equal(chosen.x, x[rows])
    assert torch.equal(chosen.history[0].data, 2 * x[rows])
    assert torch.equal(chosen.memory["v"], 3 * x[rows])
    assert torch.equal(chosen.memory["both"][1].data, 2 * x[rows])
    assert float(chosen.history[0].level.t[0]) == pytest.approx(0.3)  # type: ignore[index]
    assert chosen.memory["count"] == 4
    assert chosen.index == 1


def test_what_a_model_cannot_give_is_refused_before_anything_is_spent() -> None:
    mixture = GaussianMixture()
    mixture.gives = ("flow",)
    with pytest.raises(CompositionError, match="needs the data prediction"):
        check_fit(mixture, Euler(steps=2))
    with pytest.raises(CompositionError, match="needs the data prediction"):
        check_fit(mixture, SamplerWrapper(Euler(steps=2)))


def test_too_few_steps_are_refused() -> None:
    class Greedy(Euler):
        minimum_steps = 3

    with pytest.raises(ConfigurationError, match="needs more steps"):
        Greedy(steps=2)
    with pytest.raises(ConfigurationError, match="steps"):
        Euler(steps=0)


def test_a_sampler_without_an_inverse_says_so() -> None:
    class OneWay(Euler):
        invert = Sampler.invert

    mixture, sampler = GaussianMixture(), OneWay(steps=2)
    grid = sampler.grid(mixture.path, Uniform())
    with pytest.raises(CompositionError, match="cannot be run backwards"):
        invert(mixture, sampler, grid, torch.zeros(1, 2, dtype=torch.float64), [0])


def test_a_model_without_classes_refuses_a_label() -> None:
    class Plain(Denoiser):
        path = LinearVP()
        form = "data"
        shape = (2,)

        def output(self, x, t, condition):  # type: ignore[no-untyped-def]
            return x

    assert Plain().condition({"label": None}, range(2)) is None
    with pytest.raises(CompositionError, match="knows no classes"):
        Plain().condition({"label": 1}, range(2))


def test_a_weighted_sum_leaves_out_what_weighs_nothing() -> None:
    x, infinite = torch.ones(2), torch.full((2,), math.inf)
    assert torch.equal(weighted_sum((2.0, x), (0.0, infinite), (0.5, x)), torch.full((2,), 2.5))
    assert torch.equal(weighted_sum((0.0, x)), torch.zeros(2))
    assert torch.equal(x, torch.ones(2))
