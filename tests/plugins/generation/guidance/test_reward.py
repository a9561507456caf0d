# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""Guidance by a reward: the exactly tilted Gaussian, and what is refused."""

from __future__ import annotations

import pytest
import torch

from lightrail.errors import CompositionError, ConfigurationError, PluginError
from lightrail.generation import GaussianMixture, Generated, sample
from lightrail.traits import traits_of
from lightrail_generation.guidance.reward import RewardGuidance
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.edm import EDMHeun
from lightrail_generation.samplers.unipc import UniPC
from lightrail_generation.time_grids.uniform_lambda import UniformLambda

MEAN, VARIANCE, SLOPE = torch.tensor([0.4, -0.7], dtype=torch.float64), 0.3, torch.tensor([1.0, 2.0]).double()


def gaussian(mean=MEAN, **options):
    return GaussianMixture(means=[mean.tolist()], weights=[1.0], variances=[VARIANCE], **options)


def linear(samples):
    return samples.double() @ SLOPE


def drawn(guidance, sampler, denoiser, indices=range(6)):
    chain = [] if guidance is None else [guidance]
    return sample(denoiser, sampler, sampler.grid(denoiser.path, UniformLambda()), indices, seed=2, guidance=chain)


@pytest.mark.parametrize("path", ["linear", "cosine", "edm", "flow"])
@pytest.mark.parametrize("sampler", [DDIM(8), DDIM(8, eta=1.0), DPMSolverPP(8), UniPC(8), EDMHeun(8)])
@pytest.mark.parametrize("w", [0.1, 1.5])
def test_a_linear_reward_tilts_a_gaussian_exactly(path, sampler, w):
    # p(x) exp(w b·x) for N(m, v I) is N(m + w v b, v I): guided samples are those of that model.
    guidance = RewardGuidance(linear, scale=w, max_rho=None)
    guided = drawn(guidance, sampler, gaussian(path=path))
    wanted = drawn(None, sampler, gaussian(MEAN + w * VARIANCE * SLOPE, path=path))
    torch.testing.assert_close(guided.x, wanted.x, rtol=1e-9, atol=1e-9)


def test_of_a_mixture_the_tilt_is_right_to_first_order():
    mixture, sampler, w = GaussianMixture(), DPMSolverPP(40), 0.05
    guided, plain = (
        drawn(each, sampler, mixture, range(3000)).x for each in (RewardGuidance(linear, scale=w, max_rho=None), None)
    )
    _, covariance = mixture.moments()
    shift = (guided - plain).mean(0)
    torch.testing.assert_close(shift / w, covariance @ SLOPE, rtol=0.1, atol=0.05)


def test_nothing_added_is_nothing_changed_and_evaluations_are_counted():
    mixture = GaussianMixture()
    for sampler in (UniPC(8), EDMHeun(8)):
        plain = drawn(None, sampler, mixture)
        off = drawn(RewardGuidance(linear, scale=0.0), sampler, mixture)
        assert torch.equal(off.x, plain.x)
        assert off.evaluations == plain.evaluations
    guidance = RewardGuidance(linear, max_rho=None)
    assert drawn(guidance, UniPC(8), mixture).evaluations == 8
    assert drawn(guidance, EDMHeun(8), mixture).evaluations == 15


class Near:
    """Prefers points near x on the first axis."""

    def __init__(self, x):
        self.x = x

    def __call__(self, samples):
        return -(samples[:, 0] - self.x).square()


@pytest.mark.parametrize(
    "words",
    [
        [f"guidance.reward.function._target_={__name__}.Near", "guidance.reward.function.x=2.0"],
        ["guidance.reward.function=lightrail_generation.guidance.reward.brightness"],
    ],
    ids=["built", "named"],
)
def test_a_reward_is_given_on_the_command_line(tmp_path, words):
    from lightrail.generation.execution import generate

    common = ["denoiser=gaussian_mixture", "+sampler=ddim", "sampler.steps=10", "logger=[]", f"run.root={tmp_path}"]
    summary = generate([*common, "+guidance=[reward]", *words], show_progress=False).summary
    assert summary["metrics"]["reward"] > summary["unguided"]["metrics"]["reward"] + 0.3


def test_samples_do_not_depend_on_their_batch():
    guidance = RewardGuidance(linear, scale=0.5)
    for sampler in (DPMSolverPP(8), EDMHeun(8)):
        together = drawn(guidance, sampler, GaussianMixture()).x
        alone = drawn(guidance, sampler, GaussianMixture(), [3]).x
        torch.testing.assert_close(alone[0], together[3], rtol=1e-12, atol=1e-12)


def test_the_reward_is_of_samples_in_the_users_units():
    class InOtherUnits(GaussianMixture):
        def decode(self, x):
            return 10 * x

    denoiser = InOtherUnits(means=[MEAN.tolist()], weights=[1.0], variances=[VARIANCE])
    guided = drawn(RewardGuidance(linear, scale=0.1, max_rho=None), DDIM(8), denoiser)
    wanted = drawn(RewardGuidance(linear, scale=1.0, max_rho=None), DDIM(8), gaussian())
    torch.testing.assert_close(guided.x, wanted.x, rtol=1e-12, atol=1e-12)
    measured = RewardGuidance(linear).measure(Generated(torch.ones(4, 2), torch.ones(4, 2)))
    assert measured == {"reward": pytest.approx(3.0)}


def test_what_cannot_work_is_refused():
    for options, named in (({"scale": -0.1}, "scale"), ({"max_rho": -1.0}, "max_rho"), ({"function": 1.0}, "reward")):
        with pytest.raises(ConfigurationError, match=named):
            RewardGuidance(**{"function": linear, **options})
    with pytest.raises(PluginError, match="not finite") as caught:
        drawn(RewardGuidance(lambda x: linear(x) * torch.nan), DDIM(4), gaussian())
    assert "the reward" in caught.value.what
    mixture = gaussian()
    mixture.gives = ("flow",)
    with pytest.raises(CompositionError, match="does not have"):
        RewardGuidance(linear).prepare(mixture, DDIM(4))


def test_the_example_of_its_card():
    guidance = RewardGuidance(**traits_of(RewardGuidance).example)
    assert bool(drawn(guidance, DDIM(8), GaussianMixture()).x.isfinite().all())
