# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""STSL: the trace on a mixture and on a Gaussian, its inner steps, what it costs, and DPS as a special case."""

from __future__ import annotations

import pytest
import torch

from lightrail.errors import ConfigurationError
from lightrail.generation import Evaluator, GaussianMixture, Grid, Noise, Observed, State, sample
from lightrail_generation.guidance.dps import DPS
from lightrail_generation.guidance.stsl import STSL, trace_estimate
from lightrail_generation.measurements.inpaint import Inpaint
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.edm import EDMHeun
from lightrail_generation.samplers.unipc import UniPC
from lightrail_generation.time_grids.uniform import Uniform

MIXTURE = GaussianMixture()
SECOND = Inpaint(hidden=[0])
SECOND.prepare((2,))


def observed(count):
    return Observed(SECOND, torch.full((count, 1), 0.7, dtype=torch.float64))


def drawn(guidance, sampler=None, indices=range(6)):
    sampler = sampler or DDIM(10)
    grid = sampler.grid(MIXTURE.path, Uniform())
    return sample(MIXTURE, sampler, grid, indices, seed=2, guidance=guidance, observed=observed(len(indices)))


def exact_trace(x, level):
    x = x.clone().requires_grad_()
    (score,) = torch.autograd.grad(MIXTURE.log_density(x[None], level.t).sum(), x, create_graph=True)
    return sum(torch.autograd.grad(score[i], x, retain_graph=True)[0][i] for i in range(2))


def test_the_estimate_of_the_trace_is_unbiased():
    level, x = MIXTURE.path.level(0.4), torch.tensor([0.3, -0.4], dtype=torch.float64)
    z = torch.randn(100_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    many = x.expand(100_000, 2)
    score = MIXTURE.predict(many, level).score
    found = trace_estimate(score, MIXTURE.predict(many + 0.01 * z, level).score, z, 0.01)
    allowed = 5 * float(found.std()) / 100_000**0.5
    assert float(found.mean()) == pytest.approx(float(exact_trace(x, level)), abs=allowed)


@pytest.mark.parametrize("reach", [0.1, 1.0, 3.0])
def test_for_a_gaussian_it_is_exact_however_far_it_reaches(reach):
    normal, level = GaussianMixture(means=[[0.5, 0.0]], weights=[1.0], variances=[0.3]), MIXTURE.path.level(0.4)
    x, z = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    found = trace_estimate(normal.predict(x, level).score, normal.predict(x + reach * z, level).score, z, reach)
    assert float(found) == pytest.approx(-5 / (level.alpha**2 * 0.3 + level.sigma**2), rel=1e-10)


@pytest.mark.parametrize("sampler", [DDIM(10), UniPC(10), EDMHeun(10)])
def test_one_inner_step_without_the_trace_is_dps(sampler):
    ours, theirs = drawn([STSL(0.3, eta=0, inner=1)], sampler), drawn([DPS(0.3)], sampler)
    torch.testing.assert_close(ours.x, theirs.x, rtol=1e-12, atol=1e-12)
    assert ours.evaluations == theirs.evaluations


def test_nothing_weighs_nothing():
    found = drawn([STSL(0, eta=0)])
    torch.testing.assert_close(found.x, drawn([]).x, rtol=1e-12, atol=1e-12)
    assert found.evaluations == 10


def test_two_inner_steps_by_hand():
    path = MIXTURE.path
    grid, noise = Grid(path, (path.level(0.6), path.level(0.4))), Noise(0, range(3), (2,), torch.float64)
    evaluator = Evaluator(MIXTURE, guidance=[STSL(0.3, eta=0.1, inner=2)], grid=grid, noise=noise, observed=observed(3))
    start = noise.normal(-1)
    state = evaluator.after_step(DDIM(1).step(State(start, noise), evaluator, grid))

    def gradient(x, level, draw):
        x, z = x.clone().requires_grad_(), noise.normal(0, 1000 + draw)
        here, shifted = MIXTURE.predict(x, level), MIXTURE.predict(x + z, level)
        loss = 0.3 * (0.7 - here.data[:, 1]).abs() + 0.1 / 2 * (z * (shifted.score - here.score)).sum(1)
        return torch.autograd.grad(loss.sum(), x)[0]

    x = DDIM(1).step(State(start, noise), Evaluator(MIXTURE), grid).x - gradient(start, grid[0], 0)
    x = x - gradient(x, grid[1], 1)
    torch.testing.assert_close(state.x, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("options", "wanted"), [({"eta": 0}, 10 + 9 * 2), ({}, 20 + 9 * 4), ({"inner": 1}, 20)])
def test_each_evaluation_is_counted(options, wanted):
    assert drawn([STSL(0.1, **{"inner": 3, **options})]).evaluations == wanted


def test_more_inner_steps_come_nearer_to_what_was_measured():
    off = [float((drawn([STSL(0.05, inner=n)]).x[:, 1] - 0.7).abs().mean()) for n in (1, 4)]
    assert off[1] < 0.75 * off[0]


def test_a_sample_is_the_same_in_any_batch():
    together, alone = drawn([STSL(0.1)]), drawn([STSL(0.1)], indices=[4])
    torch.testing.assert_close(alone.x[0], together.x[4], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"eta": -1}, {"inner": 0}, {"reach": 0}, {"zeta": -1}])
def test_options_out_of_range(options):
    with pytest.raises(ConfigurationError):
        STSL(**options)
