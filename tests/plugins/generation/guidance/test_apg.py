# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""APG: its parts, by hand; classifier-free guidance as its limit; bounded updates; momentum that lasts one run."""

from __future__ import annotations

import math

import pytest
import torch

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import GaussianMixture, Generated, Moment, Noise, Prediction, sample
from lightrail_generation.guidance.apg import APG, clipped, projected, with_momentum
from lightrail_generation.guidance.cfg import CFG
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.edm import EDMHeun
from lightrail_generation.samplers.unipc import UniPC
from lightrail_generation.time_grids.uniform import Uniform

MIXTURE = GaussianMixture()
LABELS = {"label": torch.tensor([0, 1, 2, 1])}
GENERATOR = torch.Generator().manual_seed(0)
X, C, U = torch.randn(3, 4, 2, 3, 3, generator=GENERATOR, dtype=torch.float64)
GRID = DDIM(4).grid(MIXTURE.path, Uniform())
PLAIN = {"eta": 1.0, "momentum": 0.0, "norm_threshold": None}


def drawn(sampler, guidance, labels=LABELS, indices=range(4), seed=1):
    grid = sampler.grid(MIXTURE.path, Uniform())
    return sample(MIXTURE, sampler, grid, indices, seed=seed, condition=labels, guidance=guidance)


def at(index=0, level=GRID[1], memory=None, x=X):
    noise = Noise(0, range(len(x)), tuple(x.shape[1:]), x.dtype)
    memory = {} if memory is None else memory
    return Moment(MIXTURE, {"label": torch.zeros(len(x))}, GRID, index, noise, x, level, memory)


def mixed(guidance, moment=None, cond=C, uncond=U):
    moment = moment or at()
    named = {name: Prediction(X, GRID[1], "data", each) for name, each in (("cond", cond), ("uncond", uncond))}
    return guidance.mix(named, moment).data


def dot(a, b):
    return (a * b).flatten(1).sum(1)


def norm(a):
    return a.flatten(1).norm(dim=1)


@pytest.mark.parametrize("sampler", [DDIM(6), DPMSolverPP(6), UniPC(6), EDMHeun(6), DDIM(6, eta=0.5)])
def test_with_the_whole_update_it_is_classifier_free_guidance(sampler):
    wanted, found = drawn(sampler, [CFG(4.0)]), drawn(sampler, [APG(4.0, **PLAIN)])
    torch.testing.assert_close(found.x, wanted.x, rtol=1e-10, atol=1e-10)
    assert found.evaluations == wanted.evaluations


@pytest.mark.parametrize("sampler", [DDIM(6), DPMSolverPP(6)])
def test_scale_one_is_unguided_and_asks_nothing_more(sampler):
    plain, guided = drawn(sampler, []), drawn(sampler, [APG(1.0)])
    torch.testing.assert_close(guided.x, plain.x, rtol=1e-12, atol=1e-12)
    assert guided.evaluations == plain.evaluations


def test_by_hand():
    # D_c = (2, 0), D_u = (−1, −4): d = (3, 4), of norm 5, clipped to (0.6, 0.8); along D_c (0.6, 0), across (0, 0.8).
    cond, uncond = torch.tensor([[2.0, 0.0]]).double(), torch.tensor([[-1.0, -4.0]]).double()
    x = torch.zeros(1, 2, dtype=torch.float64)
    named = {name: Prediction(x, GRID[1], "data", each) for name, each in (("cond", cond), ("uncond", uncond))}
    found = APG(4.0, eta=0.5, norm_threshold=1.0, momentum=0.0).mix(named, at(x=x)).data
    torch.testing.assert_close(found, torch.tensor([[2.9, 2.4]]).double())


def test_the_update_is_at_right_angles_to_the_prediction_and_bounded():
    update = mixed(APG(8.0, norm_threshold=0.5)) - C
    torch.testing.assert_close(dot(update, C), torch.zeros(4).double(), rtol=0, atol=1e-12)
    assert bool((norm(update) <= 7 * 0.5 * (1 + 1e-12)).all())
    d = C - U
    unbounded = mixed(APG(8.0, norm_threshold=None)) - C
    along, across = projected(d, C)
    torch.testing.assert_close(unbounded, 7 * across)
    torch.testing.assert_close(along + across, d)
    torch.testing.assert_close(dot(across, along), torch.zeros(4).double(), rtol=0, atol=1e-12)


def test_clipping_is_of_each_sample():
    d = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    torch.testing.assert_close(clipped(d, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


def test_the_part_along_nothing_is_nothing():
    along, across = projected(torch.ones(1, 3), torch.zeros(1, 3))
    assert not bool(along.any())
    assert torch.equal(across, torch.ones(1, 3).double())


def test_momentum_is_the_sum_of_the_steps_before():
    memory = {}
    first = with_momentum(C, -0.5, at(0, memory=memory))
    assert torch.equal(first, C)
    second = with_momentum(U, -0.5, at(1, memory=memory))
    torch.testing.assert_close(second, U - 0.5 * C)
    third = with_momentum(X, -0.5, at(2, memory=memory))
    torch.testing.assert_close(third, X - 0.5 * U + 0.25 * C)


def test_within_a_step_the_momentum_is_that_of_the_step_before():
    memory = {}
    with_momentum(C, -0.5, at(0, memory=memory))
    for _ in range(2):
        torch.testing.assert_close(with_momentum(U, -0.5, at(1, memory=memory)), U - 0.5 * C)
    torch.testing.assert_close(with_momentum(X, -0.5, at(2, memory=memory)), X - 0.5 * (U - 0.5 * C))


def test_momentum_keeps_no_graph_and_lasts_one_run():
    memory = {}
    with_momentum(C.clone().requires_grad_(), -0.5, at(0, memory=memory))
    assert not memory["running"].requires_grad
    guidance = APG(4.0, momentum=-0.5, norm_threshold=None)
    torch.testing.assert_close(drawn(DDIM(6), [guidance]).x, drawn(DDIM(6), [guidance]).x, rtol=0, atol=0)
    without = drawn(DDIM(6), [APG(4.0, momentum=0.0, norm_threshold=None)]).x
    assert float((drawn(DDIM(6), [guidance]).x - without).abs().max()) > 1e-3


def test_momentum_along_a_run_by_hand():
    guidance, sampler = APG(3.0, momentum=-0.5, norm_threshold=1.0), DDIM(5)
    grid = sampler.grid(MIXTURE.path, Uniform())
    found = drawn(sampler, [guidance])
    x, m = found.start, torch.zeros(4, 2, dtype=torch.float64)
    for here, there in zip(grid.levels, grid.levels[1:], strict=False):
        c, u = (MIXTURE.predict(x, here, each).data for each in (LABELS, None))
        m = c - u - 0.5 * m
        d = m * (1 / norm(m)).clamp(max=1)[:, None]
        across = d - dot(d, c)[:, None] * c / dot(c, c)[:, None]
        data = c + 2 * across
        x = there.alpha * data + there.sigma * (x - here.alpha * data) / here.sigma
    torch.testing.assert_close(found.x, x, rtol=1e-9, atol=1e-9)


def test_alone_and_beside_others():
    together = drawn(DPMSolverPP(6), [APG(5.0, norm_threshold=0.3)])
    alone = drawn(DPMSolverPP(6), [APG(5.0, norm_threshold=0.3)], {"label": torch.tensor([2])}, [2])
    torch.testing.assert_close(alone.x[0], together.x[2], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sampler", [DDIM(6), DPMSolverPP(6), EDMHeun(6)])
def test_two_evaluations_for_each(sampler):
    assert drawn(sampler, [APG(4.0)]).evaluations == 2 * drawn(sampler, []).evaluations


def test_it_saturates_less_than_classifier_free_guidance():
    found = {}
    for w in (4.0, 16.0):
        for guidance in (CFG(w), APG(w)):
            x = drawn(DDIM(20), [guidance]).x
            found[type(guidance), w] = guidance.measure(Generated(x, x))["saturation"]
    for w in (4.0, 16.0):
        assert found[APG, w] < found[CFG, w]
    assert found[CFG, 16.0] / found[CFG, 4.0] > 1.5


def test_the_interval():
    sampler = DDIM(8)
    found = drawn(sampler, [APG(3.0, rho_low=0.3, rho_high=2.0)])
    levels = sampler.grid(MIXTURE.path, Uniform()).levels[:-1]
    assert found.evaluations == 8 + sum(0.3 < level.rho <= 2.0 for level in levels)


def test_half_precision():
    mixture = GaussianMixture(dtype="bfloat16")
    sampler = DPMSolverPP(8)
    grid = sampler.grid(mixture.path, Uniform())
    found = sample(mixture, sampler, grid, range(4), condition=LABELS, guidance=[APG(8.0)]).x
    assert found.dtype == torch.bfloat16
    assert bool(found.isfinite().all())


def test_without_a_condition_there_is_nothing_to_compare():
    with pytest.raises(CompositionError, match="apg"):
        drawn(DDIM(4), [APG(2.0)], labels=None)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": -1.0},
        {"eta": -0.1},
        {"norm_threshold": 0.0},
        {"norm_threshold": math.nan},
        {"momentum": 1.0},
        {"momentum": -1.0},
        {"rho_low": 1.0, "rho_high": 0.5},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(ConfigurationError):
        APG(**options)
