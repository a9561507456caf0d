# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""TFG-Flow: the steps by hand, identities, and the discrete part against the exact rate of a toy."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lightrail.errors import CompositionError, ConfigurationError, PluginError
from lightrail.generation import GaussianMixture, Generated, Guidance, Noise, sample
from lightrail.traits import traits_of
from lightrail_generation.guidance.tfg_flow import TFGFlow, candidate_weights, clipped, next_tokens, weighted_rates
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.dmcmc import DMCMC
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.edm import EDMHeun
from lightrail_generation.samplers.flow import FlowEuler, FlowHeun
from lightrail_generation.samplers.unipc import UniPC
from lightrail_generation.time_grids.uniform import Uniform

FLOW = GaussianMixture(path="flow")
SLOPE = torch.tensor([1.0, -2.0], dtype=torch.float64)


def linear(samples):
    return samples.double() @ SLOPE


def curved(samples):
    return -(samples.double() - 0.5).square().sum(-1)


def drawn(chain, sampler=None, mixture=FLOW, indices=range(5), **options):
    sampler = sampler or FlowEuler(6)
    return sample(mixture, sampler, sampler.grid(mixture.path, Uniform()), indices, seed=4, guidance=chain, **options)


def test_the_flow_by_hand():
    rho, mu, n, clip = 0.05, 0.2, 2, 0.7
    grid = FlowEuler(3).grid(FLOW.path, Uniform())
    x = start = Noise(4, range(5), (2,), torch.float64).normal(-1)
    for here, there in itertools.pairwise(grid):
        for _ in range(n):
            leaf = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(curved(FLOW.predict(leaf, here).data).sum(), leaf)
            x = x + rho * g * torch.clamp(clip / g.square().mean(1, keepdim=True).sqrt(), max=1)
        data = FLOW.predict(x, here).data
        for _ in range(n):
            g = -2 * (data - 0.5)
            data = data + mu * g * torch.clamp(clip / g.square().mean(1, keepdim=True).sqrt(), max=1)
        if there.is_clean:
            x = data
            break
        x = x + (here.t - there.t) * (data - x) / here.t
    guidance = TFGFlow(curved, rho=rho, mu=mu, iterations=n, gamma=0.0, clip=clip)
    guided = drawn([guidance], FlowEuler(3))
    torch.testing.assert_close(guided.start, start)
    torch.testing.assert_close(guided.x, x, rtol=1e-9, atol=1e-9)
    assert guided.evaluations == 3 * (1 + n)


@pytest.mark.parametrize("sampler", [FlowEuler(6), FlowHeun(6), DDIM(6), DPMSolverPP(6), UniPC(6), EDMHeun(6)])
def test_without_steps_nothing_changes(sampler):
    for mixture in (FLOW, GaussianMixture()):
        off, plain = drawn([TFGFlow(curved, rho=0.0, mu=0.0)], sampler, mixture), drawn([], sampler, mixture)
        assert torch.equal(off.x, plain.x)
        assert off.evaluations == plain.evaluations


@pytest.mark.parametrize("sampler", [FlowEuler(6), FlowHeun(6), DPMSolverPP(6), UniPC(6), EDMHeun(6)])
def test_it_raises_the_reward_of_every_sample_which_does_not_depend_on_its_batch(sampler):
    for mixture in (FLOW, GaussianMixture()):
        guidance = TFGFlow(linear, iterations=2)
        together, plain = drawn([guidance], sampler, mixture), drawn([], sampler, mixture)
        assert bool((linear(together.x) > linear(plain.x) + 0.2).all())
        alone = drawn([guidance], sampler, mixture, [3])
        torch.testing.assert_close(alone.x[0], together.x[3], rtol=1e-11, atol=1e-11)
        assert together.evaluations == plain.evaluations + 2 * 6


def test_smoothing_averages_over_noise_and_leaves_a_linear_reward_alone():
    plain = drawn([TFGFlow(linear, gamma=0.0)])
    smooth = drawn([TFGFlow(linear, gamma=0.5, copies=3)])
    torch.testing.assert_close(smooth.x, plain.x, rtol=1e-11, atol=1e-11)
    assert not torch.allclose(drawn([TFGFlow(curved, gamma=0.5, copies=1)]).x, drawn([TFGFlow(curved, gamma=0.0)]).x)
    seen = []

    def counting(samples):
        seen.append(len(samples))
        return linear(samples)

    drawn([TFGFlow(counting, iterations=1, copies=3)], FlowEuler(2))
    assert len(seen) == 3 * (2 + 2)


def test_a_gradient_is_shortened_for_each_sample():
    gradient = torch.tensor([[3.0, 4.0], [0.1, 0.2], [0.0, 0.0]])
    found = clipped(gradient, 0.5)
    torch.testing.assert_close(found[0].square().mean().sqrt(), torch.tensor(0.5))
    assert torch.equal(found[1:], gradient[1:])


def test_other_guidance_still_finds_the_graph():
    class Keeps(Guidance):
        needs_gradient = True

        def after_step(self, state, moment):
            _, gradient = moment.gradient(lambda prediction: prediction.data.square().sum(-1))
            assert bool((gradient != 0).any())
            return state

    drawn([TFGFlow(curved), Keeps()], DDIM(3), GaussianMixture())


# The discrete part: two tokens a, b of two words each, masked independently.

PRIOR = torch.tensor([[0.4, 0.1], [0.2, 0.3]], dtype=torch.float64)  # p(a, b)
LOSS = torch.tensor([[0.0, 1.0], [2.0, 0.5]], dtype=torch.float64)
MASK, SIZE = 2, 3


def exact_rates(tokens, t, temperature):
    """Of the flow of p(x_0) exp(−f/τ), by summing over all data."""
    tilted = PRIOR * torch.exp(-LOSS / temperature)
    seen = torch.ones_like(tilted)
    for place, token in enumerate(tokens):
        if token != MASK:
            keep = torch.nn.functional.one_hot(torch.tensor(token), 2).double()
            seen = seen * (keep[:, None] if place == 0 else keep[None])
    posterior = tilted * seen / (tilted * seen).sum()
    rates = torch.zeros(2, SIZE, dtype=torch.float64)
    rates[0, :2], rates[1, :2] = posterior.sum(1), posterior.sum(0)
    return rates * torch.tensor([[token == MASK] for token in tokens]) / t


@pytest.mark.parametrize("tokens", [(MASK, MASK), (0, MASK), (MASK, 1), (1, 0)])
@pytest.mark.parametrize("temperature", [0.5, math.inf])
def test_weighted_rates_are_the_exact_ones_as_candidates_grow(tokens, temperature):
    t, generator = 0.4, torch.Generator().manual_seed(0)
    errors = []
    for k in (16, 4096):
        seen = exact_rates(tokens, t, math.inf)
        unguided = PRIOR.clone()
        for place, token in enumerate(tokens):
            if token != MASK:
                unguided = unguided * torch.eye(2).double()[token].view(*([-1, 1] if place == 0 else [1, -1]))
        batch = 20
        drawn_pairs = torch.multinomial(unguided.flatten().expand(batch, -1), k, True, generator=generator)
        candidates = torch.stack((drawn_pairs // 2, drawn_pairs % 2), -1)
        losses = LOSS[candidates[..., 0], candidates[..., 1]]
        weights = candidate_weights(losses, temperature)
        rates = weighted_rates(
            torch.tensor([tokens] * batch), candidates, weights, torch.full((batch,), t).double(), SIZE, MASK
        )
        errors.append(float((rates - exact_rates(tokens, t, temperature)).abs().mean()))
        assert bool((rates[..., MASK] == 0).all())
        assert seen.shape == (2, SIZE)
    assert errors[1] < 0.03
    assert errors[1] <= errors[0]


def test_tokens_jump_at_their_rates_and_are_all_known_in_the_end():
    noise = Noise(0, range(4000), (2,), torch.float64)
    tokens = torch.full((4000, 2), MASK)
    steps = 20
    for i in range(steps):
        t = 1 - i / steps
        # The exact posterior in place of candidates: one candidate drawn from it for each sample.
        posterior = torch.stack([exact_rates(tuple(row.tolist()), t, 0.7) for row in tokens.unique(dim=0)])
        _, which = tokens.unique(dim=0, return_inverse=True)
        tokens = next_tokens(tokens, posterior[which], 1 / steps, noise.uniform(i, shape=(2,)))
        assert float((tokens == MASK).double().mean()) == pytest.approx(t - 1 / steps, abs=0.02)
    assert not bool((tokens == MASK).any())
    counts = torch.zeros(2, 2, dtype=torch.float64)
    counts.index_put_((tokens[:, 0], tokens[:, 1]), torch.ones(len(tokens)).double(), accumulate=True)
    tilted = PRIOR * torch.exp(-LOSS / 0.7)
    torch.testing.assert_close(counts / len(tokens), tilted / tilted.sum(), rtol=0, atol=0.03)


def test_a_known_token_never_moves_and_equal_weights_are_the_unguided_rate():
    candidates = torch.tensor([[[0, 1], [1, 1], [0, 0]]])
    weights = candidate_weights(torch.tensor([[5.0, -3.0, 0.0]]), math.inf)
    assert weights.tolist() == [[pytest.approx(1 / 3)] * 3]
    rates = weighted_rates(torch.tensor([[1, MASK]]), candidates, weights, torch.tensor([0.5]), SIZE, MASK)
    torch.testing.assert_close(rates[0], torch.tensor([[0.0, 0.0, 0.0], [2 / 3, 4 / 3, 0.0]]))


def test_what_cannot_work_is_refused():
    for options, named in (
        ({"rho": -1.0}, "rho"),
        ({"mu": -1.0}, "mu"),
        ({"gamma": -1.0}, "gamma"),
        ({"iterations": 0}, "iterations"),
        ({"copies": 0}, "copies"),
        ({"clip": 0.0}, "clip"),
        ({"function": None}, "reward"),
    ):
        with pytest.raises(ConfigurationError, match=named):
            TFGFlow(**{"function": curved, **options})
    with pytest.raises(CompositionError, match="cannot go on"):
        TFGFlow(curved).prepare(FLOW, DMCMC(6))
    TFGFlow(curved).prepare(FLOW, FlowEuler(6))
    with pytest.raises(PluginError, match="not finite"):
        drawn([TFGFlow(lambda x: curved(x) / 0)])


def test_the_example_of_its_card_and_the_measure():
    guidance = TFGFlow(**traits_of(TFGFlow).example)
    found = drawn([guidance], DDIM(4), GaussianMixture(dtype="float32"))
    assert bool(found.x.isfinite().all())
    assert guidance.measure(Generated(found.x, found.start))["reward"] == pytest.approx(float(found.x.mean()))
