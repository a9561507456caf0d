# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""Feynman–Kac correctors: the exact targets of Gaussians, weights by hand, populations, and what is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import GaussianMixture, Generated, KarrasVE, LinearVP, Noise, sample
from lightrail_generation.guidance.feynman_kac import FeynmanKac
from lightrail_generation.guidance.path_weights import annealing_rate, cfg_rate, lambda_step, product_rate
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.ddpm import DDPM
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.edm import EDMHeun
from lightrail_generation.samplers.si_sde import SISDE
from lightrail_generation.samplers.unipc import UniPC
from lightrail_generation.time_grids.explicit import Explicit
from lightrail_generation.time_grids.karras import Karras
from lightrail_generation.time_grids.uniform import Uniform
from lightrail_generation.wrappers.time_shift import TimeShift

MANY = 4000


class Pair(GaussianMixture):
    """N(1.5, 1) under label 1, N(−1, 4) under label 0, which is also what is said without a label."""

    def __init__(self):
        super().__init__([[-1.0], [1.5]], [1.0, 1.0], [4.0, 1.0], path=KarrasVE(0.002, 20.0))

    def unconditional(self, condition):
        return None if condition is None else {"label": torch.zeros_like(condition["label"])}


def one(mean, variance, path=None):
    return GaussianMixture([[mean]], [1.0], [variance], path=path or KarrasVE(0.002, 20.0))


NARROW, WIDE = one(1.5, 1.0), one(-1.0, 4.0)


def drawn(guidance, denoiser, sampler, count, label=None, first=0, times=None):
    grid = sampler.grid(denoiser.path, times or Karras())
    condition = None if label is None else {"label": torch.as_tensor(label).expand(count)}
    indices = range(first, first + count)
    return sample(denoiser, sampler, grid, indices, seed=1, condition=condition, guidance=guidance)


def moments(found):
    return float(found.x.mean()), float(found.x.var())


@pytest.fixture
def quick_noise(monkeypatch):
    """All samples' numbers in one draw, which is faster by far; no sample then has numbers of its own."""

    def at_once(self, step, draw, shape, *, uniform):
        generator = torch.Generator().manual_seed(10_000 * self.seed + 10 * (step + 1) + 7 * draw + uniform)
        fill = torch.rand if uniform else torch.randn
        return fill((len(self.indices), *shape), generator=generator, dtype=self.dtype)

    monkeypatch.setattr(Noise, "_drawn", at_once)


def best_sampler(steps=150):
    return DDPM(steps, variance="large")


@pytest.mark.parametrize(
    "sampler", [best_sampler(), DPMSolverPP(150, stochastic=True), SISDE(150, 30.0, "noise")], ids=type
)
def test_guidance_reaches_the_geometric_mean_that_the_guided_score_alone_misses(quick_noise, sampler):
    # q_u^{−1} q_c^2: precision 2 − 1/4, mean (2 · 1.5 − (−1)/4)/1.75
    mean, variance = moments(drawn([FeynmanKac("cfg", 2.0, MANY)], Pair(), sampler, MANY, 1))
    assert mean == pytest.approx(3.25 / 1.75, abs=0.07)
    assert variance == pytest.approx(1 / 1.75, abs=0.06)
    never = [FeynmanKac("cfg", 2.0, MANY, resample="never")]
    mean, variance = moments(drawn(never, Pair(), best_sampler(), MANY, 1))
    assert mean == pytest.approx(2.129, abs=0.04)
    assert variance == pytest.approx(0.449, abs=0.04)


def test_a_product_of_two_models(quick_noise):
    # precision 1 + 1/4, mean (1.5 − 1/4)/1.25
    mean, variance = moments(drawn([FeynmanKac("product", particles=MANY, other=WIDE)], NARROW, best_sampler(), MANY))
    assert mean == pytest.approx(1.0, abs=0.08)
    assert variance == pytest.approx(0.8, abs=0.08)


@pytest.mark.parametrize("beta", [0.5, 1.5, 2.0])
def test_annealing_divides_the_variance(quick_noise, beta):
    mean, variance = moments(drawn([FeynmanKac("annealing", beta, MANY)], NARROW, best_sampler(), MANY))
    assert mean == pytest.approx(1.5, abs=0.08)
    assert variance == pytest.approx(1 / beta, rel=0.1)


def test_a_linear_reward_moves_the_mean(quick_noise):
    tilted = FeynmanKac("reward", 0.5, MANY, function=lambda samples: samples[:, 0])
    found = drawn([tilted], NARROW, best_sampler(), MANY)
    mean, variance = moments(found)
    assert mean == pytest.approx(2.0, abs=0.1)
    assert variance == pytest.approx(1.0, abs=0.1)
    assert found.evaluations == 150


def test_rates_and_steps_by_hand():
    first, second = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    assert annealing_rate(first, 3.0).tolist() == [30.0, 6.0]
    assert cfg_rate(first, second, 3.0).tolist() == [48.0, 6.0]
    assert product_rate(first, second).tolist() == [6.0, 2.0]
    path = LinearVP()
    here, there = path.level(0.5), path.level(0.4999)
    assert lambda_step(here, there) == pytest.approx(there.lam - here.lam, rel=1e-3)
    assert lambda_step(here, path.level(0.0)) == 0.5


def test_one_step_by_hand():
    seen = []

    class Seen(FeynmanKac):
        def after_step(self, state, moment):
            state = super().after_step(state, moment)
            seen.append((moment.x, moment.memory["log_weights"], moment.memory["ess"]))
            return state

    guided = Seen("annealing", 2.0, 4, threshold=0.0)
    drawn([guided], NARROW, DDIM(2, eta=1.0), 4, times=Explicit([20.0, 10.0, 5.0]))
    (x, weights, ess), (y, both, _) = seen
    start = Noise(1, range(4), (1,), torch.float64).normal(-1) * 20 / math.sqrt(2)
    torch.testing.assert_close(x, start, rtol=1e-12, atol=0)
    # ε = σ (x − m)/(v + σ²); Δλ = (1 − (10/20)²)/2, then the same from 10 to 5.
    rates = [2 * (s * (each - 1.5) / (1 + s**2)).square()[:, 0] for s, each in ((20.0, x), (10.0, y))]
    torch.testing.assert_close(weights, 0.375 * rates[0], rtol=1e-10, atol=0)
    torch.testing.assert_close(both, 0.375 * (rates[0] + rates[1]), rtol=1e-10, atol=0)
    shares = weights.softmax(0)
    torch.testing.assert_close(ess, (1 / shares.square().sum() / 4).expand(4), rtol=1e-10, atol=0)


def test_only_the_first_evaluation_of_a_step_counts_for_the_weight():
    seen = []

    class Seen(FeynmanKac):
        def after_step(self, state, moment):
            state = super().after_step(state, moment)
            seen.append((moment.x, moment.memory["log_weights"]))
            return state

    sampler = SISDE(2, method="heun")
    drawn([Seen("annealing", 2.0, 4, threshold=0.0)], NARROW, sampler, 4, times=Explicit([20.0, 10.0, 5.0]))
    x, weights = seen[0]
    torch.testing.assert_close(weights, 0.75 * (20 * (x - 1.5) / 401).square()[:, 0], rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "guided",
    [
        FeynmanKac("cfg", 1.0, 4),
        FeynmanKac("annealing", 1.0, 4),
        FeynmanKac("reward", 0.0, 4, function=lambda samples: samples[:, 0]),
    ],
    ids=lambda each: each.target,
)
@pytest.mark.parametrize("sampler", [DDPM(10), DPMSolverPP(10, stochastic=True), SISDE(10, method="heun")], ids=type)
def test_beta_of_one_or_no_reward_is_the_sampler_alone(guided, sampler):
    plain = drawn([], Pair(), sampler, 8, 1)
    torch.testing.assert_close(drawn([guided], Pair(), sampler, 8, 1).x, plain.x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("target", "calls"), [("cfg", 2), ("annealing", 1), ("product", 2)])
def test_evaluations_are_counted(target, calls):
    guided = FeynmanKac(target, 1.3, 4, other=Pair() if target == "product" else None)
    assert drawn([guided], Pair(), DDPM(10), 4, 1).evaluations == 10 * calls
    again = drawn([guided], Pair(), SISDE(10, method="heun"), 4, 1)
    assert again.evaluations == 19 * calls


def test_a_population_does_not_depend_on_another():
    guided = [FeynmanKac("cfg", 3.0, 8, threshold=0.9)]
    labels = torch.tensor([1] * 8 + [0] * 8)
    together = drawn(guided, Pair(), DDPM(20), 16, labels).x
    alone = drawn(guided, Pair(), DDPM(20), 8, 0, first=8).x
    torch.testing.assert_close(together[8:], alone, rtol=1e-12, atol=1e-12)


def test_resampling_takes_the_history_along():
    """A multistep run of a population that is drawn again at each step is finite and near the target."""
    guided = [FeynmanKac("annealing", 1.5, 64, threshold=1.0)]
    found = drawn(guided, NARROW, DPMSolverPP(60, stochastic=True), 64)
    assert float((found.x - 1.5).abs().max()) < 5
    assert len(found.x.unique()) > 32


def test_what_is_measured():
    samples = torch.tensor([[1.0, 0.0], [3.0, 0.0], [3.0, 0.0], [1.0, 4.0]])
    guided = FeynmanKac("reward", 1.0, 2, function=lambda each: each[:, 0])
    assert guided.measure(Generated(samples, samples)) == {
        "distinct": 0.75,
        "reward": 2.0,
        "mean_0": 2.0,
        "variance_0": 1.0,
        "mean_1": 1.0,
        "variance_1": 3.0,
    }
    assert set(FeynmanKac().measure(Generated(samples[:, :1], samples))) == {"distinct", "mean", "variance"}
    assert set(FeynmanKac().measure(Generated(torch.zeros(2, 1, 8, 8), samples))) == {"distinct"}


@pytest.mark.parametrize(
    "sampler",
    [DDIM(10), DDIM(10, eta=0.5), DPMSolverPP(10), UniPC(10), EDMHeun(10), SISDE(10, epsilon=0.0), TimeShift(DDPM(10))],
    ids=type,
)
def test_samplers_without_full_noise_are_refused(sampler):
    with pytest.raises(CompositionError) as caught:
        FeynmanKac("annealing").prepare(NARROW, sampler)
    assert type(sampler).__name__ in str(caught.value)
    assert "ddpm" in caught.value.allowed


def test_samplers_with_full_noise_are_taken():
    for sampler in (DDPM(10), DDIM(10, eta=1.0), DPMSolverPP(10, stochastic=True), SISDE(10)):
        FeynmanKac("annealing").prepare(NARROW, sampler)
    FeynmanKac("reward", function=lambda samples: samples[:, 0]).prepare(NARROW, TimeShift(DDPM(10)))


@pytest.mark.parametrize("other", [one(0.0, 1.0, LinearVP()), GaussianMixture(path=KarrasVE(0.002, 20.0))])
def test_a_product_of_models_that_do_not_fit_is_refused(other):
    with pytest.raises(CompositionError, match="do not fit together"):
        FeynmanKac("product", other=other).prepare(NARROW, DDPM(10))


@pytest.mark.parametrize(
    "options",
    [
        {"target": "power"},
        {"particles": 1},
        {"threshold": 1.5},
        {"target": "annealing", "beta": 0.0},
        {"target": "cfg", "beta": -1.0},
        {"target": "reward", "beta": math.inf, "function": print},
        {"resample": "always"},
        {"target": "product"},
        {"target": "product", "other": NARROW, "run": "latest"},
        {"target": "reward"},
        {"target": "cfg", "function": print},
    ],
    ids=lambda options: "-".join(options),
)
def test_bad_options(options):
    with pytest.raises(ConfigurationError) as caught:
        FeynmanKac(**options)
    assert caught.value.remedy


def test_guidance_without_a_condition_is_refused():
    with pytest.raises(CompositionError, match="no condition"):
        drawn([FeynmanKac("cfg", 2.0, 2)], Pair(), DDPM(4), 2)


def test_the_other_model_may_come_from_a_run():
    asked = []

    def load_run(name):
        asked.append(name)
        return SimpleNamespace(task=SimpleNamespace(denoiser=lambda: WIDE), data=None, folder=None, checkpoint=None)

    of_run = FeynmanKac("product", particles=4, run="mine", load_run=load_run)
    assert asked == ["mine"]
    given = FeynmanKac("product", particles=4, other=WIDE)
    assert torch.equal(drawn([of_run], NARROW, DDPM(6), 4).x, drawn([given], NARROW, DDPM(6), 4).x)


def test_a_label_that_the_other_model_does_not_know_is_refused():
    with pytest.raises(CompositionError, match="same classes"):
        drawn([FeynmanKac("product", particles=2, other=WIDE)], Pair(), DDPM(4), 2, 1)


def test_annealing_cannot_start_without_data():
    flow = GaussianMixture(path="flow")
    with pytest.raises(CompositionError, match="no data are left"):
        drawn([FeynmanKac("annealing", 2.0, 2)], flow, SISDE(4), 2, times=Uniform())


def test_weights_that_are_not_finite_are_told():
    broken = FeynmanKac("annealing", 1e200, 2)
    with pytest.raises(CompositionError, match="not finite"):
        drawn([broken], NARROW, DDPM(4), 2)


def test_half_a_population_is_refused():
    with pytest.raises(CompositionError, match="not together"):
        drawn([FeynmanKac("annealing", 2.0, 4)], NARROW, DDPM(4), 6)
