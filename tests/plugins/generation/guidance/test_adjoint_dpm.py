# pyright: reportArgumentType=false
"""AdjointDPM: the adjoint equation against autograd through the solver, and ascent in the starting noise."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lightrail.errors import CompositionError, ConfigurationError, PluginError
from lightrail.generation import GaussianMixture, Grid, sample
from lightrail_generation.guidance.adjoint_dpm import AdjointDPM, adjoint_gradient
from lightrail_generation.guidance.adjoint_equation import knots_of, solved
from lightrail_generation.guidance.starting_noise import near_shell
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.edm import EDMHeun
from lightrail_generation.samplers.flow import FlowHeun
from lightrail_generation.samplers.unipc import UniPC
from lightrail_generation.time_grids.uniform_lambda import UniformLambda
from lightrail_generation.wrappers.time_shift import TimeShift

MIXTURE = GaussianMixture()
NORMAL = GaussianMixture(means=[[0.5, -0.2]], weights=[1.0], variances=[0.3])


def reward(samples):
    return samples[:, 0] + 0.3 * samples[:, 1] ** 2


def grid_of(sampler, mixture=MIXTURE, times=None):
    return sampler.grid(mixture.path, times or UniformLambda())


def drawn(guidance, sampler=None, mixture=MIXTURE, indices=range(4), **given):
    sampler = sampler or DDIM(10)
    return sample(mixture, sampler, grid_of(sampler, mixture), indices, seed=1, guidance=guidance, **given)


def noise_of(mixture, condition=None):
    return lambda x, level: mixture.predict(x, level, condition).noise


def rk4_in_rho(noise, x, levels, path):
    """d(x/α)/dρ = ε by the classical rule, written out."""
    y = x / levels[0].alpha
    for here, there in itertools.pairwise(levels):
        h, middle = there.rho - here.rho, path.level_at_lam(-math.log((here.rho + there.rho) / 2))
        k1 = noise(here.alpha * y, here)
        k2 = noise(middle.alpha * (y + h / 2 * k1), middle)
        k3 = noise(middle.alpha * (y + h / 2 * k2), middle)
        k4 = noise(there.alpha * (y + h * k3), there)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return levels[-1].alpha * y


def through_the_solver(mixture, levels, start):
    x = start.clone().requires_grad_()
    end = rk4_in_rho(noise_of(mixture), x, levels, mixture.path)
    (gradient,) = torch.autograd.grad(reward(end).sum(), x)
    return end.detach(), gradient


def slope_at(end):
    x = end.clone().requires_grad_()
    return torch.autograd.grad(reward(x).sum(), x)[0]


def starts(mixture, level, count=3):
    z = torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return z * mixture.path.starting_scale(level)


@pytest.mark.parametrize(("name", "steps"), [("linear", 80), ("edm", 50), ("flow", 110)])
def test_the_adjoint_gradient_is_that_of_autograd_through_the_solver(name, steps):
    mixture = GaussianMixture(path=name)
    grid = grid_of(DDIM(4), mixture)
    levels = knots_of(grid, steps)
    start = starts(mixture, grid[0])
    end, wanted = through_the_solver(mixture, levels, start)
    torch.testing.assert_close(solved(noise_of(mixture), start, levels, mixture.path, "rk4"), end, rtol=1e-9, atol=1e-9)
    (found,) = adjoint_gradient(noise_of(mixture), end, slope_at(end), levels, mixture.path, "rk4")
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_both_ways_by_adams_are_of_fourth_order():
    levels = knots_of(grid_of(DDIM(4)), 100)
    start = starts(MIXTURE, levels[0])
    end, wanted = through_the_solver(MIXTURE, levels, start)
    errors, gradients = [], []
    for steps in (40, 80):
        knots = knots_of(grid_of(DDIM(4)), steps)
        found = solved(noise_of(MIXTURE), start, knots, MIXTURE.path)
        errors.append(float((found - end).abs().max()))
        (gradient,) = adjoint_gradient(noise_of(MIXTURE), found, slope_at(found), knots, MIXTURE.path)
        gradients.append(float((gradient - wanted).abs().max()))
    for pair in (errors, gradients):
        assert 3.4 < math.log2(pair[0] / pair[1]) < 5
    assert gradients[1] < 1e-3


def test_few_steps_stay_stable():
    levels = knots_of(grid_of(DDIM(4)), 15)
    start = starts(MIXTURE, levels[0])
    _, wanted = through_the_solver(MIXTURE, knots_of(grid_of(DDIM(4)), 100), start)
    end = solved(noise_of(MIXTURE), start, levels, MIXTURE.path)
    (found,) = adjoint_gradient(noise_of(MIXTURE), end, slope_at(end), levels, MIXTURE.path)
    assert float((found - wanted).abs().max()) < 0.2 * float(wanted.abs().max())


def test_of_a_normal_it_is_the_exact_ratio_of_standard_deviations():
    # x_0 = α_0 m + √((α_0² v + σ_0²)/(α_T² v + σ_T²)) (x_T − α_T m)
    levels = knots_of(grid_of(DDIM(4), NORMAL), 55)
    first, last = levels[0], levels[-1]
    spread = [level.alpha**2 * 0.3 + level.sigma**2 for level in (first, last)]
    end = starts(NORMAL, last)
    (found,) = adjoint_gradient(noise_of(NORMAL), end, torch.ones_like(end), levels, NORMAL.path, "rk4")
    torch.testing.assert_close(found, torch.full_like(end, math.sqrt(spread[1] / spread[0])), rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["adams", "rk4"])
def test_what_steers_the_samples_has_a_gradient_too(method):
    path = MIXTURE.path
    levels = knots_of(grid_of(DDIM(4)), 70 if method == "adams" else 30)
    start, c = starts(MIXTURE, levels[0]), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def noise(x, level):
        return MIXTURE.predict(x, level).noise * c + 0.1 * c**2

    with torch.no_grad():
        end = solved(noise, start, levels, path, method)
    (_, found) = adjoint_gradient(noise, end, slope_at(end), levels, path, method, steered_by=[c])
    (wanted,) = torch.autograd.grad(reward(rk4_in_rho(noise, start, levels, path)).sum(), c)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=0)


def test_no_graph_grows_with_the_steps():
    seen = []

    def noise(x, level):
        seen.append((x.is_leaf, x.requires_grad))
        return MIXTURE.predict(x, level).noise

    levels = knots_of(grid_of(DDIM(4)), 12)
    end = starts(MIXTURE, levels[-1])
    (found,) = adjoint_gradient(noise, end, slope_at(end), levels, MIXTURE.path)
    assert not found.requires_grad
    assert seen == [(True, True)] * (12 + 9)


def test_knots_are_at_equal_distances_and_begin_where_something_is_left_of_the_data():
    mixture = GaussianMixture(path="flow")
    sampler = FlowHeun(4)
    knots = knots_of(sampler.grid(mixture.path, UniformLambda()), 7)
    gaps = [there.lam - here.lam for here, there in itertools.pairwise(knots)]
    assert max(gaps) - min(gaps) < 1e-9
    assert knots[0].alpha >= 2.0**-12 * (1 - 1e-9)
    assert knots[-1].t == mixture.path.t_min
    # A grid that ends with noise is followed to its end.
    short = Grid(mixture.path, tuple(mixture.path.level(t) for t in (0.9, 0.5, 0.2)))
    assert [knots_of(short, 3)[i].t for i in (0, -1)] == [0.9, 0.2]


@pytest.mark.parametrize("sampler", [DDIM(10), DPMSolverPP(8), UniPC(6), TimeShift(DDIM(6)), EDMHeun(6)])
def test_the_reward_rises_with_every_sampler(sampler):
    plain = drawn([], sampler)
    found = drawn([AdjointDPM(reward, iterations=2, rate=0.2, steps=10)], sampler)
    assert bool((reward(found.x) > reward(plain.x) + 0.05).all())


@pytest.mark.parametrize(("name", "sampler"), [("edm", EDMHeun(6)), ("flow", FlowHeun(8)), ("ddpm", UniPC(6))])
def test_the_reward_rises_on_every_path(name, sampler):
    mixture = GaussianMixture(path=name)
    guidance = AdjointDPM(reward, iterations=2, rate=0.2, steps=15)
    found, plain = (drawn(each, sampler, mixture, range(6)) for each in ([guidance], []))
    assert float((reward(found.x) - reward(plain.x)).mean()) > 0.1


def test_it_stays_near_the_shell_and_moves_by_the_rate():
    starting = []

    def moved(**options):
        class Sees(DDIM):
            def start(self, x, noise, grid):
                starting.append(x)
                return super().start(x, noise, grid)

        plain = drawn([], Sees(10))
        drawn([AdjointDPM(lambda samples: 5 * samples[:, 0], steps=15, **options)], Sees(10))
        return plain.start, starting[-1]

    start, found = moved(iterations=1, rate=0.1, shell=10)
    torch.testing.assert_close((found - start).square().mean(1).sqrt(), torch.full((4,), 0.1).double())
    start, found = moved(iterations=8, rate=0.5, shell=0.5)
    far = (start.norm(dim=1) - math.sqrt(2)).abs().clamp(min=0.5)
    assert bool(((found.norm(dim=1) - math.sqrt(2)).abs() <= far + 1e-9).all())
    assert float(found[:, 0].min()) > float(start[:, 0].min())


def test_the_reward_of_the_differentiated_flow_never_falls():
    rewards = []

    def steep(samples):
        found = -(samples - 0.1).square().sum(1)
        rewards.append(found.detach())
        return found

    drawn([AdjointDPM(steep, iterations=10, rate=1.0, steps=10, shell=10)])
    best = torch.stack(rewards).cummax(0).values
    # Steps of 1 overshoot a maximum; half of a half of it come near.
    assert bool((torch.stack(rewards)[1:] < best[:-1]).any())
    assert float(best[-1].min()) > -0.1 > float(best[0].max())


def test_without_steps_it_is_the_sampler_alone():
    plain = drawn([])
    for options in ({"iterations": 0}, {"rate": 0.0}):
        found = drawn([AdjointDPM(reward, **options)])
        torch.testing.assert_close(found.x, plain.x, rtol=0, atol=0)
        assert found.evaluations == plain.evaluations == 10
    flat = drawn([AdjointDPM(lambda samples: 0 * samples[:, 0])])
    torch.testing.assert_close(flat.x, plain.x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("method", "flow"), [("adams", 12 + 9), ("rk4", 4 * 12)])
def test_evaluations_are_counted(method, flow):
    found = drawn([AdjointDPM(reward, iterations=3, steps=12, method=method)])
    assert found.evaluations == (2 * 3 + 1) * flow + 3 + 1 + 10


def test_a_sample_does_not_depend_on_its_batch():
    guidance = AdjointDPM(reward, iterations=3, steps=10)
    together = drawn([guidance], indices=range(5))
    torch.testing.assert_close(drawn([guidance], indices=[3]).x[0], together.x[3], rtol=1e-10, atol=1e-10)


def test_it_follows_the_condition():
    label = {"label": torch.tensor([0, 2, 1, 1])}
    found, plain = (drawn(each, condition=label).x for each in ([AdjointDPM(reward, iterations=3)], []))
    assert bool((reward(found) > reward(plain)).all())


def test_the_sphere():
    z, start = torch.tensor([[6.0, 8.0], [0.3, 0.4], [0.0, 0.0]]), torch.ones(3, 2)
    radii = near_shell(z, start, 0.5).norm(dim=1)
    torch.testing.assert_close(radii, torch.tensor([math.sqrt(2) + 0.5, math.sqrt(2) - 0.5, 0.0]))
    # A start that was outside may stay there.
    assert float(near_shell(z[:1], 5 * start[:1], 0.5).norm()) == pytest.approx(5 * math.sqrt(2))


@pytest.mark.parametrize(
    "options", [{"iterations": -1}, {"rate": -0.1}, {"steps": 0}, {"method": "euler"}, {"shell": -1.0}]
)
def test_an_option_out_of_range(options):
    with pytest.raises(ConfigurationError):
        AdjointDPM(reward, **options)


def test_what_cannot_work_is_refused():
    class Opaque(GaussianMixture):
        @torch.no_grad()
        def output(self, x, t, condition):
            return super().output(x, t, condition)

    class OtherNoise(GaussianMixture):
        gives = ("flow",)

    guidance = AdjointDPM(reward, iterations=1)
    guidance.prepare(MIXTURE, TimeShift(DDIM(4)))
    for sampler in (DDIM(4, eta=0.5), DPMSolverPP(4, stochastic=True), TimeShift(DDIM(4, eta=1.0))):
        with pytest.raises(CompositionError, match="adds other noise"):
            guidance.prepare(MIXTURE, sampler)
    with pytest.raises(CompositionError, match="Gaussian starting noise"):
        guidance.prepare(OtherNoise(), DDIM(4))
    with pytest.raises(CompositionError, match="model cannot be differentiated"):
        drawn([guidance], mixture=Opaque())
    with pytest.raises(PluginError, match="reward cannot be differentiated"):
        drawn([AdjointDPM(lambda samples: samples.detach()[:, 0])])
