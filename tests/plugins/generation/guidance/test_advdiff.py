# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""AdvDiff: pushes by hand, restarts per sample, attack success against the scales."""

from __future__ import annotations

import pytest
import torch

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import GaussianMixture, Generated, Guidance, sample
from lightrail.traits import traits_of
from lightrail_generation.guidance.advdiff import AdvDiff, runner_up
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.dmcmc import DMCMC
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.edm import EDMHeun
from lightrail_generation.samplers.pndm import FPNDM, PLMS, SPNDM
from lightrail_generation.samplers.unipc import UniPC
from lightrail_generation.time_grids.uniform_lambda import UniformLambda
from lightrail_generation.wrappers.time_shift import TimeShift

MIXTURE = GaussianMixture()


def three(samples):
    """A classifier of the mixture's components."""
    return -4 * (samples[:, None] - MIXTURE.means).square().sum(-1)


def drawn(chain, sampler, indices=range(8), labels=None, **options):
    condition = {"label": torch.tensor([i % 3 for i in indices] if labels is None else labels)}
    grid = sampler.grid(MIXTURE.path, UniformLambda())
    return sample(MIXTURE, sampler, grid, indices, seed=5, condition=condition, guidance=chain, **options)


def test_the_target_is_the_likeliest_wrong_class():
    logits = torch.tensor([[1.0, 5.0, 3.0], [1.0, 5.0, 3.0], [9.0, -9.0, -8.0]])
    assert runner_up(logits, torch.tensor([1, 2, 0])).tolist() == [2, 1, 2]


def test_the_push_of_the_last_steps_by_hand():
    moves = []

    class Looks(Guidance):
        def after_step(self, state, moment):
            moves.append((moment.index, moment.memory.pop("before", None), state.x))
            return state

    class Before(Guidance):
        def after_step(self, state, moment):
            befores.append((moment.index, state.x))
            return state

    befores = []
    drawn([Before(), AdvDiff(function=three, scale=0.3, start_scale=0.0), Looks()], DDIM(10), [0, 1])
    labels = torch.tensor([0, 1])
    moved = []
    for (index, x), (_, _, after) in zip(befores, moves, strict=True):
        if torch.equal(x, after):
            continue
        moved.append(index)
        leaf = x.clone().requires_grad_()
        logits = three(leaf)
        target = logits.detach().clone()
        target[torch.arange(2), labels] = -torch.inf
        values = logits.log_softmax(-1)[torch.arange(2), target.argmax(1)]
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        torch.testing.assert_close(after, x + 0.3 * gradient, rtol=1e-12, atol=1e-12)
    # The last fifth of ten steps, without the last of all.
    assert moved == [7, 8]


def test_a_restart_by_hand():
    plain = drawn([], DDIM(6), [0], [0])
    leaf = plain.x.clone().requires_grad_()
    assert int(three(leaf).argmax()) == 0
    second = int(three(leaf)[0, 1:].argmax()) + 1
    (gradient,) = torch.autograd.grad(three(leaf).log_softmax(-1)[0, second], leaf)
    wanted = drawn([], DDIM(6), [0], [0], start=plain.start + 0.1 * gradient)
    attack = AdvDiff(function=three, scale=0.0, start_scale=0.1, runs=2)
    found = drawn([attack], DDIM(6), [0], [0])
    torch.testing.assert_close(found.x, wanted.x, rtol=1e-12, atol=1e-12)
    assert found.evaluations == 12


@pytest.mark.parametrize("sampler", [DDIM(10), DPMSolverPP(10), UniPC(10), EDMHeun(10), PLMS(10)])
def test_without_pushes_nothing_changes(sampler):
    attack = AdvDiff(function=three, scale=0.0, start_scale=0.0)
    guided, plain = drawn([attack], sampler), drawn([], sampler)
    assert torch.equal(guided.x, plain.x)
    assert guided.evaluations == plain.evaluations


@pytest.mark.parametrize("sampler", [DPMSolverPP(10), EDMHeun(10)])
def test_a_sample_keeps_its_first_success_and_does_not_depend_on_its_batch(sampler):
    runs = []

    class Counts(Guidance):
        def around(self, run, start, moment):
            runs.append(run(start))
            return runs[-1]

    attack = AdvDiff(function=three, scale=0.0, start_scale=0.04, runs=6)
    labels = [0, 1, 2, 0, 1, 2, 0, 1]
    together = drawn([attack, Counts()], sampler, range(8), labels).x
    ends = torch.stack([state.x for state in runs])
    wrong = torch.stack([three(x).argmax(1) != torch.tensor(labels) for x in ends])
    assert 1 < len(runs) <= 6
    assert len(set(wrong.long().argmax(0).tolist())) > 1
    for i in range(8):
        first = int(wrong[:, i].long().argmax()) if bool(wrong[:, i].any()) else len(runs) - 1
        assert torch.equal(together[i], ends[first, i])
        alone = drawn([attack], sampler, [i], [labels[i]]).x
        torch.testing.assert_close(alone[0], together[i], rtol=1e-10, atol=1e-10)


def test_it_stops_as_soon_as_all_are_deceived_and_counts_every_run():
    fooled = AdvDiff(function=lambda x: three(x) * 0 + torch.tensor([0.0, 1.0, 0.0]), label=0, runs=5)
    assert drawn([fooled], DDIM(10)).evaluations == 10
    stubborn = AdvDiff(function=lambda x: three(x) * 0 + torch.tensor([1.0, 0.0, 0.0]), label=0, runs=5)
    assert drawn([stubborn], DDIM(10)).evaluations == 50


def test_success_grows_with_the_scales():
    rates = []
    for scale, start_scale, runs in ((0.0, 0.0, 1), (0.05, 0.0, 1), (0.3, 0.0, 1), (0.05, 0.3, 4)):
        attack = AdvDiff(function=three, scale=scale, start_scale=start_scale, runs=runs)
        found = drawn([attack], DPMSolverPP(10), range(60))
        condition = {"label": torch.tensor([i % 3 for i in range(60)])}
        rates.append(attack.measure(Generated(found.x, found.start, condition))["deceived"])
    assert rates[0] < rates[1] < rates[2]
    assert rates[3] > rates[1]
    assert rates[2] > 0.8


def test_what_cannot_work_is_refused():
    for options, named in (
        ({"scale": -1.0}, "scale"),
        ({"start_scale": -1.0}, "start_scale"),
        ({"runs": 0}, "runs"),
        ({"share": 0.0}, "share"),
        ({"label": -2}, "label"),
    ):
        with pytest.raises(ConfigurationError, match=named):
            AdvDiff(**{"function": three, **options})
    for sampler in (DMCMC(6), TimeShift(DMCMC(6)), FPNDM(8), SPNDM(8), PLMS(8, warmup="heun")):
        with pytest.raises(CompositionError, match="cannot go on"):
            AdvDiff(function=three).prepare(MIXTURE, sampler)
    AdvDiff(function=three).prepare(MIXTURE, PLMS(8))
    with pytest.raises(CompositionError, match="no other class"):
        drawn([AdvDiff(function=lambda x: x[:, :1], label=0)], DDIM(4))
    with pytest.raises(CompositionError, match="no other class"):
        drawn([AdvDiff(function=three, label=7)], DDIM(4))
    assert AdvDiff(function=three).measure(Generated(torch.zeros(2, 2), torch.zeros(2, 2))) == {}


def test_the_example_of_its_card():
    found = drawn([AdvDiff(**traits_of(AdvDiff).example)], DDIM(3))
    assert bool(found.x.isfinite().all())
