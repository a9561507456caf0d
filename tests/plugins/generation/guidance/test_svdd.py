# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""Soft value-based decoding: the tilted Gaussian that it nears as candidates grow, its draws, counts and refusals."""

from __future__ import annotations

import pytest
import torch

from lightrail.errors import CompositionError, ConfigurationError, PluginError
from lightrail.generation import GaussianMixture, Generated, KarrasVE, Noise, sample
from lightrail_generation.guidance.svdd import SVDD, best, drawn
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.ddpm import DDPM
from lightrail_generation.samplers.dmcmc import DMCMC
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.edm import EDMHeun
from lightrail_generation.samplers.si_sde import SISDE
from lightrail_generation.samplers.unipc import UniPC
from lightrail_generation.time_grids.karras import Karras
from lightrail_generation.wrappers.time_shift import TimeShift

GAUSSIAN = GaussianMixture([[1.5]], [1.0], [1.0], path=KarrasVE(0.002, 20.0))
MIXTURE = GaussianMixture(path="edm")


def first(samples):
    return samples[:, 0]


def generated(guidance, sampler, count=8, denoiser=MIXTURE, first_index=0):
    grid = sampler.grid(denoiser.path, Karras())
    indices = range(first_index, first_index + count)
    return sample(denoiser, sampler, grid, indices, seed=1, guidance=guidance)


@pytest.fixture
def quick_noise(monkeypatch):
    """All samples' numbers in one draw, which is faster by far; no sample then has numbers of its own."""

    def at_once(self, step, draw, shape, *, uniform):
        generator = torch.Generator().manual_seed(10_000 * self.seed + 10 * (step + 1) + 7 * draw + uniform)
        fill = torch.rand if uniform else torch.randn
        return fill((len(self.indices), *shape), generator=generator, dtype=self.dtype)

    monkeypatch.setattr(Noise, "_drawn", at_once)


def test_the_mean_of_a_gaussian_nears_the_tilted_one_as_candidates_grow(quick_noise):
    # q(x) exp(x/α) has the mean 1.5 + 1/α; the variance stays.
    sampler = DDPM(100, variance="large")
    found = {m: generated([SVDD(first, m, alpha=2.0)], sampler, 2000, GAUSSIAN).x for m in (1, 2, 16)}
    means = {m: float(x.mean()) for m, x in found.items()}
    assert means[1] == pytest.approx(1.5, abs=0.06)
    assert means[1] + 0.15 < means[2] < means[16] - 0.15
    assert means[16] == pytest.approx(2.0, abs=0.08)
    assert float(found[16].var()) == pytest.approx(1.0, abs=0.15)


def test_a_flat_reward_leaves_the_distribution(quick_noise):
    x = generated([SVDD(first, 8, alpha=1e6)], DPMSolverPP(60, stochastic=True), 2000, GAUSSIAN).x
    assert float(x.mean()) == pytest.approx(1.5, abs=0.06)
    assert float(x.var()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("sampler", [DDPM(10), DPMSolverPP(10, stochastic=True), SISDE(10, method="heun")], ids=type)
def test_one_candidate_is_the_sampler_alone(sampler):
    alone = generated([SVDD(first, 1)], sampler)
    plain = generated([], sampler)
    assert torch.equal(alone.x, plain.x)
    assert alone.evaluations == plain.evaluations


@pytest.mark.parametrize(
    ("sampler", "wanted"),
    # The last step, to the data, needs no evaluation for the values.
    [(DDPM(10), 4 * 19), (DPMSolverPP(10, stochastic=True), 4 * 19), (SISDE(10, method="heun"), 4 * (19 + 9))],
    ids=lambda each: type(each).__name__,
)
def test_evaluations_are_counted(sampler, wanted):
    assert generated([SVDD(first, 4)], sampler).evaluations == wanted


def test_a_sample_does_not_depend_on_its_batch():
    guided = [SVDD(first, 4)]
    together = generated(guided, DPMSolverPP(10, stochastic=True)).x
    alone = generated(guided, DPMSolverPP(10, stochastic=True), 1, first_index=5).x
    torch.testing.assert_close(together[5:6], alone, rtol=1e-12, atol=1e-12)


def test_each_step_goes_on_from_the_best_candidate():
    """Over each step, all of a sample's candidates are the one whose predicted data had the greatest reward."""
    seen = []

    class Seen(SVDD):
        def after_step(self, state, moment):
            after = super().after_step(state, moment)
            seen.append((state.x, after.x, moment.grid[state.index]))
            return after

    generated([Seen(first, 4, choice="best")], DDPM(6), 2)
    for before, after, level in seen:
        data = before if level.is_clean else MIXTURE.predict(before, level).data
        rows = data[:, 0].view(2, 4).argmax(1) + torch.tensor([0, 4])
        torch.testing.assert_close(after, before[rows].repeat_interleave(4, 0), rtol=0, atol=0)


def test_draws_follow_the_softmax():
    values = torch.tensor([[0.0, 1.0, 2.0]]).expand(3000, 3)
    uniform = (torch.arange(3000, dtype=torch.float64) + 0.5) / 3000
    shares = torch.bincount(drawn(values, 0.7, uniform), minlength=3) / 3000
    torch.testing.assert_close(shares, (values[0] / 0.7).softmax(0), rtol=0, atol=1e-3)
    assert drawn(1000 * values[:1], 1.0, torch.tensor([1 - 2**-24])).tolist() == [2]
    assert best(torch.tensor([[0.0, 3.0, 3.0], [2.0, 1.0, 0.0]])).tolist() == [1, 0]


@pytest.mark.parametrize(
    "sampler", [DDIM(5), DPMSolverPP(5), UniPC(5), EDMHeun(5), SISDE(5, epsilon=0.0), DMCMC(5), TimeShift(DDIM(5))]
)
def test_samplers_without_fresh_noise_are_refused(sampler):
    with pytest.raises(CompositionError) as caught:
        SVDD(first).prepare(MIXTURE, sampler)
    assert type(getattr(sampler, "sampler", sampler)).__name__ in str(caught.value)


def test_samplers_with_fresh_noise_are_taken():
    for sampler in (DDPM(5), DDIM(5, eta=0.5), SISDE(5), EDMHeun(5, s_churn=10.0), TimeShift(DDPM(5))):
        SVDD(first).prepare(MIXTURE, sampler)


@pytest.mark.parametrize("options", [{"candidates": 0}, {"alpha": 0.0}, {"choice": "worst"}], ids=str)
def test_bad_options(options):
    with pytest.raises(ConfigurationError):
        SVDD(first, **options)


def test_a_reward_that_is_not_finite_is_told():
    with pytest.raises(PluginError, match="not finite"):
        generated([SVDD(lambda samples: samples[:, 0] / 0.0, 2)], DDPM(3))


def test_the_reward_is_measured():
    samples = torch.tensor([[1.0, 5.0], [2.0, 5.0]])
    assert SVDD(first).measure(Generated(samples, samples)) == {"reward": 1.5}
