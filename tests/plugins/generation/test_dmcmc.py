"""DMCMC: its moves, its two ways to tell a level, the levels of its chain, and the way down from each sample's own."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import Denoiser, Evaluator, GaussianMixture, Noise, State, sample
from lightrail_generation.samplers import dmcmc
from lightrail_generation.samplers.dmcmc import DMCMC, drawn_level, langevin, log_rhos_at, places_of, residual_level
from lightrail_generation.time_grids.karras import Karras
from lightrail_generation.time_grids.uniform_lambda import UniformLambda

MIXTURE = GaussianMixture(path="edm")


class Wide(Denoiser):
    """N(0, v I) in many dimensions."""

    form, dtype = "data", torch.float64

    def __init__(self, n, variance):
        self.path, self.shape, self.variance = MIXTURE.path, (n,), variance

    def output(self, x, t, condition):
        level = self.path.levels(t, x.ndim)
        return level.alpha * self.variance / (level.alpha**2 * self.variance + level.sigma**2) * x


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def test_a_short_move_is_the_papers_langevin_step():
    y, data, z, rho = normal(4, 3), normal(4, 3, seed=1), normal(4, 3, seed=2), torch.full((4,), 0.7).double()
    gaps = []
    for eta in (1e-3, 1e-4):
        published = y - eta / 2 * (y - data) / 0.7**2 + math.sqrt(eta) * z
        found, spread = langevin(y, data, rho, eta, z)
        gaps.append(float((found - published).abs().max()))
        assert float(spread[0]) == pytest.approx(math.sqrt(eta), rel=1e-2)
    assert gaps[0] < 1e-4
    assert gaps[1] < gaps[0] / 20  # they differ by η^{3/2}


def test_a_move_leaves_a_single_points_noise_as_it_is():
    z = normal(100_000, 1)
    for eta in (0.01, 0.8, 100.0):
        y, _ = langevin(0.5 * normal(100_000, 1, seed=3), torch.zeros(1), torch.tensor([0.5]).double(), eta, z)
        assert float(y.std()) == pytest.approx(0.5, rel=0.01)


def test_levels_are_drawn_in_proportion():
    logs = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log().expand(60_000, 3)
    drawn = drawn_level(logs, torch.rand(60_000, generator=generator(), dtype=torch.float64))
    assert torch.allclose(torch.bincount(drawn).double() / 60_000, logs[0].exp(), atol=0.01)
    assert int(drawn_level(logs[:1], torch.tensor([1.0 - 1e-16])).max()) == 2


@pytest.mark.parametrize("variance", [1e-4, 0.25])
@pytest.mark.parametrize("rho", [0.3, 1.0])
def test_the_residual_tells_the_level_in_many_dimensions(variance, rho):
    model, count, n = Wide(2048, variance), 16, 2048
    clean = math.sqrt(variance) * normal(count, n)
    z = normal(count, n, seed=5)
    y = clean + rho * z
    for guess, off in ((rho, 0.03), (1.1 * rho, 0.08)):
        data = model.predict(y, model.path.level(guess)).data
        found = residual_level(y, data, clean, z, torch.full((count,), rho))
        assert float(found.log().mean()) == pytest.approx(math.log(rho), abs=off)
        assert float(found.log().std()) < 0.08
    # Without the divergence broad data would be taken for far less noise.
    plain = (y - data).square().mean(1).sqrt() / rho
    expected = guess**2 / (variance + guess**2) * math.sqrt(1 + variance / rho**2)
    assert float(plain.mean()) == pytest.approx(expected, rel=0.03)
    assert variance < 0.01 or expected < 0.95


def chain_levels(sampler, mixture, count, times):
    """ρ of the state that each chain ends at."""
    sampler.prepare(mixture)
    grid = sampler.grid(mixture.path, times)
    noise = Noise(0, range(count), mixture.shape, mixture.dtype)
    start = mixture.start(noise, grid[0])
    state = sampler.step(State(start, noise), Evaluator(mixture), grid)
    knots = torch.tensor([-level.lam for level in grid if not level.is_clean], dtype=torch.float64)
    return log_rhos_at(state.memory["places"], knots), knots


def level_shares(eta):
    """How often each of eight levels is met, relative to an eighth."""
    sampler = DMCMC(12, 1, 24, eta=eta, classifier="posterior", rho_min=0.2, rho_max=3.0, levels=8)
    found, _ = chain_levels(sampler, MIXTURE, 2000, Karras())
    places = (found - math.log(0.2)) / math.log(15) * 7
    assert torch.allclose(places, places.round(), atol=1e-6)
    return torch.bincount(places.round().long(), minlength=8).double() / 250


def test_with_the_exact_posterior_all_levels_are_as_likely():
    shares = level_shares(0.8)
    assert float((shares - 1).abs().max()) < 0.2  # three standard deviations are 0.18
    assert float(shares[:4].mean() - shares[4:].mean()) == pytest.approx(0, abs=0.13)


def test_moves_longer_than_the_bound_would_favour_little_noise(monkeypatch):
    monkeypatch.setattr(dmcmc, "LONGEST", 1e9)
    shares = level_shares(100.0)
    assert float(shares[:4].mean() - shares[4:].mean()) > 0.2


@pytest.mark.parametrize("classifier", ["posterior", "residual"])
def test_the_state_of_least_noise_is_taken(classifier):
    means = []
    for transitions in (1, 8):
        sampler = DMCMC(4, transitions, 4, classifier=classifier, rho_min=0.1, rho_max=3.0, levels=12)
        means.append(float(chain_levels(sampler, MIXTURE, 256, Karras())[0].mean()))
    assert means[1] < means[0] - 0.3


def covariance_of(mixture, transitions, burn_in, count=3000):
    sampler = DMCMC(12, transitions, burn_in, classifier="posterior", rho_min=0.1, rho_max=3.0, levels=16)
    sampler.prepare(mixture)
    x = sample(mixture, sampler, sampler.grid(mixture.path, Karras()), range(count)).x
    return x, torch.cov(x.T)


@pytest.mark.parametrize("path", ["edm", "linear"])
def test_the_samples_are_the_mixtures(path):
    mixture = GaussianMixture(path=path)
    x, covariance = covariance_of(mixture, 1, 12)
    mean, expected = mixture.moments()
    assert torch.allclose(x.mean(0), mean, atol=0.07)
    assert torch.allclose(covariance, expected, atol=0.1)
    nearest = (x[:, None] - mixture.means).square().sum(-1).argmin(1)
    truth = (mixture.draw(Noise(0, range(3000), (2,)))[:, None] - mixture.means).square().sum(-1).argmin(1)
    found, wanted = (torch.bincount(each, minlength=3) / 3000 for each in (nearest, truth))
    assert torch.allclose(found, wanted, atol=0.04)


def test_the_state_of_least_noise_lies_further_out_than_its_level_says():
    expected = MIXTURE.moments()[1].trace()
    assert float(covariance_of(MIXTURE, 8, 12)[1].trace() / expected) > 1.08


def test_in_many_dimensions_the_residual_chain_comes_to_the_distribution():
    model = Wide(2048, 0.3)
    sampler = DMCMC(20, 5, 10)
    x = sample(model, sampler, sampler.grid(model.path, Karras()), range(8)).x
    assert float(x.var()) == pytest.approx(0.3, rel=0.08)


def test_places_are_where_levels_lie():
    knots = torch.tensor([3.0, 1.0, 0.0, -4.0]).double()
    levels = torch.tensor([3.0, 2.0, 1.0, 0.25, -1.0, -4.0]).double()
    places = places_of(levels, knots)
    assert torch.allclose(places, torch.tensor([0, 0.5, 1, 1.75, 2.25, 3]).double())
    assert torch.allclose(log_rhos_at(places, knots), levels)


def heun(y, rhos):
    """Heun's method in ρ, one level for all, Euler's in the last step."""
    for here, there in itertools.pairwise(rhos):
        slope = (y - MIXTURE.predict(y, MIXTURE.path.level(here)).data) / here
        ahead = y + (there - here) * slope
        if there == 0:
            return ahead
        again = (ahead - MIXTURE.predict(ahead, MIXTURE.path.level(there)).data) / there
        y = y + (there - here) * (slope + again) / 2
    return y


@pytest.mark.parametrize("place", [0.0, 2.5])
def test_each_sample_descends_from_its_own_level_along_the_grid(place):
    sampler = DMCMC(6)
    grid = sampler.grid(MIXTURE.path, Karras())
    knots = torch.tensor([-level.lam for level in grid if not level.is_clean], dtype=torch.float64)
    places = torch.tensor([place, 1.0, 5.0]).double()
    rhos = log_rhos_at(places, knots).exp()
    y = MIXTURE.means + rhos[:, None] * normal(3, 2)
    found = y
    for index in range(6):
        found, _ = sampler._descended(found, places, index, MIXTURE.predict, grid, knots, torch.float64)
    own = [math.exp(float(log_rhos_at(torch.tensor([place + (5 - place) * i / 5]), knots)[0])) for i in range(6)]
    expected = heun(y[:1], [*own, 0.0])
    assert torch.allclose(found[:1], expected, atol=1e-10)
    if place == 0:
        assert own == pytest.approx([level.sigma for level in grid][:-1])


@pytest.mark.parametrize("end", ["zero", "minimum", "denoise"])
def test_evaluations_are_counted_and_none_is_at_the_data(end):
    sampler = DMCMC(4, 3, 2)
    grid = sampler.grid(MIXTURE.path, UniformLambda(end=end))
    drawn = sample(MIXTURE, sampler, grid, range(3))
    assert drawn.evaluations == sampler.evaluations(grid) == {"zero": 19, "minimum": 21, "denoise": 22}[end]
    assert bool(drawn.x.isfinite().all())


def test_a_chain_does_not_depend_on_the_others():
    sampler = DMCMC(4, 3, 3)
    grid = sampler.grid(MIXTURE.path, Karras())
    together = sample(MIXTURE, sampler, grid, range(6), seed=2).x
    assert torch.allclose(sample(MIXTURE, sampler, grid, [4], seed=2).x, together[4:5], atol=1e-9)


def test_the_posterior_needs_a_density_and_the_model():
    sampler = DMCMC(4, classifier="posterior")
    with pytest.raises(CompositionError, match="density"):
        sampler.prepare(Wide(4, 1.0))
    with pytest.raises(CompositionError, match="shown"):
        sample(MIXTURE, sampler, sampler.grid(MIXTURE.path, Karras()), range(2))


def test_bounds_outside_the_grid_are_refused():
    sampler = DMCMC(4, rho_min=100.0)
    with pytest.raises(ConfigurationError, match="chain"):
        sample(MIXTURE, sampler, sampler.grid(MIXTURE.path, Karras()), range(2))


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 1},
        {"transitions": 0},
        {"burn_in": -1},
        {"eta": 0},
        {"beginning": 0},
        {"classifier": "network"},
        {"rho_min": -1},
        {"rho_max": 0},
        {"levels": 1},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        DMCMC(**options)
