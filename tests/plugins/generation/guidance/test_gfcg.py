# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""GFCG: its reference and scale by hand, no-ops, accuracy that rises with the scale, and what does not fit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import GaussianMixture, Generated, sample
from lightrail_generation.guidance.cfg import CFG
from lightrail_generation.guidance.gfcg import GFCG, reference_and_doubt
from lightrail_generation.guidance.mixture_classifier import MixtureClassifier
from lightrail_generation.guidance.saturation import saturation
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.edm import EDMHeun
from lightrail_generation.samplers.unipc import UniPC
from lightrail_generation.time_grids.uniform import Uniform

CLASSIFIER = MixtureClassifier()
# Components that overlap, so that a class is easily mistaken.
VARIANCES = (1.0, 0.9, 1.2)
MIXTURE, JUDGE = GaussianMixture(variances=VARIANCES), MixtureClassifier(variances=VARIANCES)
LABELS = {"label": torch.tensor([0, 1, 2, 1])}


def drawn(sampler, guidance, model=MIXTURE, labels=LABELS, indices=range(4)):
    for each in guidance:
        each.prepare(model, sampler)
    grid = sampler.grid(model.path, Uniform())
    return sample(model, sampler, grid, indices, seed=1, condition=labels, guidance=guidance)


def judged(guidance, count=300):
    """The share of samples that are of the wanted class, and how far out all of them lie."""
    labels = {"label": torch.arange(count) % 3}
    x = drawn(DDIM(12), guidance, labels=labels, indices=range(count)).x
    return GFCG(function=JUDGE).measure(Generated(x, x, labels))["judged_accuracy"], saturation(x)


def accuracy(guidance):
    return judged(guidance)[0]


def test_the_reference_is_the_likeliest_other_class():
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6], [0.0, 1.0, 0.0]]).log()
    reference, doubt = reference_and_doubt(logits, torch.tensor([0, 1, 1]))
    assert reference[:2].tolist() == [1, 2]
    torch.testing.assert_close(doubt, torch.tensor([0.5, 0.7, 0.0]))


def test_by_hand():
    sampler, w = DDIM(4), 3.0
    grid = sampler.grid(MIXTURE.path, Uniform())
    found = drawn(sampler, [GFCG(function=JUDGE, scale=w)])
    x, labels = found.start, LABELS["label"]
    for here, there in zip(grid.levels, grid.levels[1:], strict=False):
        wanted = MIXTURE.predict(x, here, LABELS).data
        p = JUDGE(wanted).softmax(1)
        others = p.clone()
        others[torch.arange(4), labels] = -1
        away = MIXTURE.predict(x, here, {"label": others.argmax(1)}).data
        scale = 1 + (w - 1) * (1 - p[torch.arange(4), labels])[:, None]
        data = away + scale * (wanted - away)
        x = there.alpha * data + there.sigma * (x - here.alpha * data) / here.sigma
    torch.testing.assert_close(found.x, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sampler", [DDIM(6), DPMSolverPP(6)])
def test_scale_one_is_unguided_and_asks_nothing_more(sampler):
    plain, guided = drawn(sampler, []), drawn(sampler, [GFCG(function=JUDGE, scale=1.0)])
    torch.testing.assert_close(guided.x, plain.x, rtol=1e-12, atol=1e-12)
    assert guided.evaluations == plain.evaluations


def test_where_the_classifier_is_sure_nothing_changes():
    sure = nn.functional.one_hot(LABELS["label"], 3).double() * 1e4
    for sampler in (DDIM(6), DPMSolverPP(6)):
        guided = drawn(sampler, [GFCG(function=lambda _: sure, scale=5.0)])
        torch.testing.assert_close(guided.x, drawn(sampler, []).x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampler", [DDIM(6), DPMSolverPP(6), UniPC(6), EDMHeun(6)])
def test_two_evaluations_for_each(sampler):
    assert drawn(sampler, [GFCG(function=JUDGE)]).evaluations == 2 * drawn(sampler, []).evaluations


def test_the_accuracy_rises_with_the_scale():
    found = [accuracy([GFCG(function=JUDGE, scale=w)]) for w in (1.0, 2.0, 4.0, 8.0)]
    assert found == sorted(found)
    assert found[-1] > found[0] + 0.1


def test_more_are_of_the_wanted_class_than_with_classifier_free_guidance_that_moves_them_as_far():
    # At one scale this guidance is the gentler, for its own holds only where the classifier gives the class no chance.
    plain, ours, theirs = judged([]), judged([GFCG(function=JUDGE, scale=3.0)]), judged([CFG(2.0)])
    assert ours[0] > theirs[0] + 0.02 > plain[0] + 0.1
    assert ours[1] < theirs[1]


def test_behind_other_guidance_it_starts_from_what_that_made():
    both = accuracy([CFG(2.0), GFCG(function=JUDGE, scale=3.0)])
    assert both >= accuracy([CFG(2.0)])
    found = drawn(DDIM(6), [CFG(2.0), GFCG(function=JUDGE)])
    assert found.evaluations == 3 * 6


def test_no_gradient_goes_through_the_classifier():
    seen = []

    def function(samples):
        seen.append((samples.requires_grad, torch.is_grad_enabled()))
        return JUDGE(samples)

    drawn(DDIM(3), [GFCG(function=function)])
    assert set(seen) == {(False, False)}


def test_the_classifier_sees_samples_in_the_users_units():
    class Shifted(GaussianMixture):
        def decode(self, x):
            return 10 * x + 5

    wanted = drawn(DDIM(6), [GFCG(function=JUDGE)]).x
    found = drawn(DDIM(6), [GFCG(function=lambda x: JUDGE((x - 5) / 10))], Shifted(variances=VARIANCES)).x
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_alone_and_beside_others():
    guidance = GFCG(function=JUDGE)
    together = drawn(DPMSolverPP(6), [guidance])
    alone = drawn(DPMSolverPP(6), [guidance], labels={"label": torch.tensor([2])}, indices=[2])
    torch.testing.assert_close(alone.x[0], together.x[2], rtol=1e-12, atol=1e-12)


def test_outside_its_interval_it_asks_nothing():
    sampler = DDIM(8)
    inside = sum(level.rho <= 1.0 for level in sampler.grid(MIXTURE.path, Uniform()).levels[:-1])
    assert drawn(sampler, [GFCG(function=JUDGE, rho_high=1.0)]).evaluations == 8 + inside


def test_the_classifier_of_a_run():
    task = nn.Linear(2, 3)
    run = SimpleNamespace(task=task)
    guidance = GFCG(run="runs/judge", load_run=lambda _: run)
    assert bool(drawn(DDIM(4), [guidance], GaussianMixture(dtype="float32")).x.isfinite().all())
    assert not task.weight.requires_grad


def test_the_classifier_of_a_mixture_is_exact():
    # Bayes: log p(k | x) + log p(x) = log w_k + log N(x; m_k, v_k).
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mixture = GaussianMixture()
    torch.testing.assert_close(CLASSIFIER(x).logsumexp(1), mixture.log_density(x, 0.0))


def test_what_it_measures():
    x = torch.tensor([[1.0, 0.5], [-1.0, -0.3], [0.2, -1.2], [0.2, -1.2]])
    guidance = GFCG(function=CLASSIFIER)
    assert guidance.measure(Generated(x, x, {"label": torch.tensor([0, 1, 2, 0])})) == {"judged_accuracy": 0.75}
    assert guidance.measure(Generated(x, x)) == {}


def test_a_model_of_one_class():
    model = GaussianMixture(means=[[0.0, 0.0]], weights=[1.0], variances=[1.0])
    with pytest.raises(CompositionError, match="too few"):
        GFCG(function=JUDGE).prepare(model, DDIM(4))


def test_a_classifier_of_other_classes():
    with pytest.raises(CompositionError, match="does not know the classes") as error:
        drawn(DDIM(4), [GFCG(function=lambda samples: torch.zeros(len(samples), 5))])
    assert error.value.found == "5 classes, and the model's 3"


def test_without_a_label():
    with pytest.raises(CompositionError, match="gfcg"):
        drawn(DDIM(4), [GFCG(function=JUDGE)], labels=None)


@pytest.mark.parametrize(
    "options",
    [{}, {"run": "latest", "function": JUDGE}, {"function": JUDGE, "scale": -1.0}, {"function": 3}],
)
def test_options_out_of_range(options):
    with pytest.raises(ConfigurationError):
        GFCG(**options)
