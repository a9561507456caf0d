# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""FIND: the learned noise against the analytic direction and its bound, the clipped step against autograd."""

from __future__ import annotations

import math

import pytest
import torch

from lightrail.errors import CompositionError, ConfigurationError, PluginError
from lightrail.generation import GaussianMixture, sample
from lightrail_generation.guidance.find_noise import Calibration, FindNoise, Policy, clipped_step
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.edm import EDMHeun
from lightrail_generation.samplers.flow import FlowHeun
from lightrail_generation.samplers.unipc import UniPC
from lightrail_generation.time_grids.uniform_lambda import UniformLambda

NORMAL = GaussianMixture(means=[[0.5, -0.2]], weights=[1.0], variances=[0.3])
MIXTURE = GaussianMixture()


def first(samples):
    return samples[:, 0]


def drawn(guidance, sampler=None, mixture=NORMAL, indices=range(16), **given):
    sampler = sampler or DDIM(6)
    grid = sampler.grid(mixture.path, UniformLambda())
    return sample(mixture, sampler, grid, indices, seed=1, guidance=guidance, **given)


def policy_of(mean, log_std=(0.0, 0.0)):
    return Policy(torch.tensor([[mean]], dtype=torch.float64), torch.tensor([[log_std]], dtype=torch.float64))


def starts_of(guidance, **given):
    """The states that each run of the sampler began with."""
    seen = []

    class Sees(DDIM):
        def start(self, x, noise, grid):
            seen.append(x)
            return super().start(x, noise, grid)

    drawn([guidance], Sees(6), **given)
    return seen


def test_the_mean_moves_in_the_analytic_direction_as_far_as_the_bound_lets_it():
    # x_0 is linear in x_T, and r = x_0[0] in z[0] alone: under KL ≤ κ the best is μ = (√(2κ), 0), σ = 1.
    guidance = FindNoise(first, particles=16, iterations=25, kl=1.0)
    plain, found = drawn([]), starts_of(guidance)[-1]
    moved = (found - plain.start).mean(0)
    assert float(moved[0]) == pytest.approx(math.sqrt(2), rel=0.1)
    assert abs(float(moved[1])) < 0.2


def test_a_harmful_direction_is_left_and_the_sign_of_the_reward_decides():
    up, down = (drawn([FindNoise(lambda x, s=s: s * x[:, 0])]).x[:, 0].mean() for s in (1, -1))
    assert float(down) < float(drawn([]).x[:, 0].mean()) - 0.2 < float(up) - 0.4


def test_the_standard_deviation_falls_where_the_reward_has_a_maximum():
    def near(samples):
        return -(samples - NORMAL.means[0]).square().sum(1)

    guidance = FindNoise(near, particles=32, iterations=20, kl=3.0)
    found, plain = drawn([guidance], indices=range(32)).x, drawn([], indices=range(32)).x
    assert float(found.std(0).max()) < 0.5 * float(plain.std(0).min())


def test_the_divergence_is_that_of_torch_and_bounded():
    policy = policy_of((0.7, -1.2), (0.3, -0.9))
    ours = torch.distributions.Normal(policy.mean, policy.log_std.exp())
    wanted = torch.distributions.kl_divergence(ours, torch.distributions.Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(policy.divergence(), wanted[None].double())
    torch.testing.assert_close(policy.within(0.4).divergence(), torch.tensor([0.4], dtype=torch.float64))
    torch.testing.assert_close(policy.within(9.0).mean, policy.mean, rtol=0, atol=0)
    assert float(policy.within(0.0).mean.abs().max()) < 1e-9
    torch.testing.assert_close(drawn([FindNoise(first, kl=0.0)]).x, drawn([]).x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("per_element", [False, True])
def test_the_step_is_the_natural_gradient_of_the_clipped_objective(per_element):
    generator = torch.Generator().manual_seed(0)
    old = policy_of((0.3, -0.4), (0.1, -0.2))
    actions = old.sampled(torch.randn(1, 12, 2, generator=generator, dtype=torch.float64))
    advantages = torch.randn(1, 12, generator=generator, dtype=torch.float64)
    leaf = Policy(*(each.clone().requires_grad_() for each in (old.mean + 0.15, old.log_std - 0.1)))
    logs = [
        torch.distributions.Normal(each.mean, each.log_std.exp()).log_prob(actions).flatten(2) for each in (leaf, old)
    ]
    log_ratio = logs[0] - logs[1]
    ratio = (log_ratio.mean(2) if per_element else log_ratio.sum(2)).exp()
    objective = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    of_mean, of_std = torch.autograd.grad(objective, (leaf.mean, leaf.log_std))
    assert bool(((ratio < 0.8) & (advantages < 0)).any())
    # Fisher's matrix of a normal is 1/σ² for μ and 2 for log σ; the 1/n of the geometric mean is left to the rate.
    count = 2 if per_element else 1
    moved = clipped_step(leaf, old, actions, advantages, 0.2, 0.05, per_element)
    variance = (2 * leaf.log_std).exp()
    torch.testing.assert_close(moved.mean, leaf.mean + 0.05 * count * variance * of_mean)
    torch.testing.assert_close(moved.log_std, leaf.log_std + 0.05 * count * of_std / 2)


def test_a_good_action_that_became_likely_enough_moves_nothing():
    old, actions = policy_of((0.0, 0.0)), torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    there = policy_of((0.5, 0.0))
    good, bad = (torch.tensor([[each]], dtype=torch.float64) for each in (1.0, -1.0))
    torch.testing.assert_close(clipped_step(there, old, actions, good, 0.2, 1.0).mean, there.mean, rtol=0, atol=0)
    # A bad one is left all the same: r = exp(1/2 − 1/8).
    moved = clipped_step(there, old, actions, bad, 0.2, 0.1).mean[0, 0, 0]
    assert float(moved) == pytest.approx(0.5 - 0.1 * math.exp(0.375) * 0.5)
    far = clipped_step(policy_of((99.0, 0.0)), old, 90 * actions, bad, 0.2, 0.1)
    assert bool(far.mean.isfinite().all())


def test_rewards_are_calibrated_by_a_running_mean_and_deviation():
    calibration = Calibration(0.5)
    rewards = torch.tensor([[0.0, 2.0], [10.0, 10.0]], dtype=torch.float64)
    torch.testing.assert_close(calibration(rewards), torch.tensor([[-1.0, 1.0], [0.0, 0.0]]).double())
    # Weights 1/3 and 2/3: mean 3, mean square (2 + 2·20)/3 = 14 for 2 and 6.
    found = calibration(torch.tensor([[2.0, 6.0], [10.0, 10.0]], dtype=torch.float64))
    wanted = torch.tensor([[-1.0, 3.0], [0.0, 0.0]]).double() / math.sqrt(5)
    torch.testing.assert_close(found, wanted)


def test_neither_the_scale_nor_the_offset_of_the_reward_matters():
    plain = drawn([FindNoise(first, iterations=4)]).x
    other = drawn([FindNoise(lambda samples: 1000 * samples[:, 0] - 77, iterations=4)]).x
    torch.testing.assert_close(other, plain, rtol=1e-6, atol=1e-6)


def test_without_learning_it_is_the_sampler_alone():
    plain = drawn([])
    for options in ({"iterations": 0}, {"rate": 0.0}):
        found = drawn([FindNoise(first, **options)])
        torch.testing.assert_close(found.x, plain.x, rtol=0, atol=0)
        assert found.evaluations == plain.evaluations
    flat = drawn([FindNoise(lambda samples: torch.ones(len(samples)))])
    torch.testing.assert_close(flat.x, plain.x, rtol=1e-12, atol=1e-12)


def test_each_run_is_counted_and_draws_its_own_noise():
    assert drawn([FindNoise(first, iterations=3)]).evaluations == 4 * 6
    seen = starts_of(FindNoise(first, iterations=3, rate=1e-9))
    assert len(seen) == 4
    for i, one in enumerate(seen):
        for other in seen[:i]:
            assert float((one - other).abs().min()) > 1e-4
    torch.testing.assert_close(seen[-1], drawn([]).start, rtol=1e-6, atol=1e-6)


def test_a_population_learns_alone():
    guidance = FindNoise(first, particles=4, iterations=3)
    together = drawn([guidance])
    torch.testing.assert_close(drawn([guidance], indices=range(8, 12)).x, together.x[8:12], rtol=1e-10, atol=1e-10)
    shifts = (together.x - drawn([]).x).view(4, 4, 2).mean(1)
    assert float((shifts[0] - shifts[1]).abs().max()) > 1e-3
    with pytest.raises(CompositionError, match="whole populations of 4"):
        drawn([guidance], indices=range(6))


def test_it_learns_for_each_condition():
    label = {"label": torch.tensor([0] * 8 + [2] * 8)}
    found, plain = (drawn(each, mixture=MIXTURE, condition=label).x for each in ([FindNoise(first)], []))
    gains = (found - plain)[:, 0].view(2, 8).mean(1)
    assert float(gains.min()) > 0.2


@pytest.mark.parametrize("sampler", [DPMSolverPP(6), UniPC(6), EDMHeun(6), DDIM(6, eta=0.5)])
def test_the_reward_rises_with_every_sampler(sampler):
    guidance = FindNoise(first, particles=16, kl=3.0)
    gain = (drawn([guidance], sampler).x - drawn([], sampler).x)[:, 0].mean()
    assert float(gain) > 0.2


@pytest.mark.parametrize(("name", "sampler"), [("edm", EDMHeun(6)), ("flow", FlowHeun(6))])
def test_the_reward_rises_on_every_path(name, sampler):
    mixture = GaussianMixture(means=[[0.5, -0.2]], weights=[1.0], variances=[0.3], path=name)
    found, plain = (drawn(each, sampler, mixture).x for each in ([FindNoise(first, particles=16)], []))
    assert float((found - plain)[:, 0].mean()) > 0.3


def test_the_reward_is_a_black_box():
    def of_numpy(samples):
        return torch.from_numpy(samples.numpy()[:, 0].round(2))

    assert float(drawn([FindNoise(of_numpy)]).x[:, 0].mean()) > float(drawn([]).x[:, 0].mean()) + 0.2
    with pytest.raises(PluginError, match="does not answer for each sample"):
        drawn([FindNoise(lambda samples: samples)])


@pytest.mark.parametrize(
    "options",
    [
        {"particles": 0},
        {"iterations": -1},
        {"epochs": 0},
        {"rate": -1.0},
        {"clip": 0.0},
        {"clip": 1.0},
        {"kl": -0.1},
        {"decay": 1.0},
        {"function": "no.such.reward"},
    ],
)
def test_an_option_out_of_range(options):
    with pytest.raises((ConfigurationError, PluginError)):
        FindNoise(**{"function": first, **options})


def test_a_model_of_other_noise_is_refused():
    class OtherNoise(GaussianMixture):
        gives = ("flow",)

    with pytest.raises(CompositionError, match="Gaussian starting noise"):
        FindNoise(first).prepare(OtherNoise(), DDIM(4))
