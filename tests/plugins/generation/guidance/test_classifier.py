# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""Classifier guidance: Bayes' rule with the exact classifier, at every level and with every kind of sampler."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightrail.errors import CompositionError, ConfigurationError, PluginError
from lightrail.generation import GaussianMixture, Generated, Guidance, Noise, Prediction, sample
from lightrail.traits import traits_of
from lightrail_generation.guidance.classifier import ClassifierGuidance, with_score
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.dmcmc import DMCMC
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.edm import EDMHeun
from lightrail_generation.samplers.flow import FlowHeun
from lightrail_generation.samplers.unipc import UniPC
from lightrail_generation.time_grids.uniform_lambda import UniformLambda

TWO = {"means": [[1.0, 0.5], [-1.0, -0.3]], "weights": [0.6, 0.4], "variances": [0.25, 0.16]}
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def posterior(mixture):
    """The exact classifier of noisy states: log w_k + log N(x; α m_k, (α² v_k + σ²) I)."""

    def logits(x, t):
        level = mixture.path.levels(t, x.ndim)
        variances = level.alpha**2 * mixture.variances + level.sigma**2
        squares = (x[:, None] - level.alpha[:, :, None] * mixture.means).square().sum(-1)
        return mixture.weights.log() - squares / (2 * variances) - variances.log()

    return logits


def clean(samples):
    """A classifier of clean data: right or left."""
    return torch.stack((samples[:, 0], -samples[:, 0]), 1)


def drawn(guidance, sampler=None, mixture=None, indices=range(6), condition=None, start=None, **options):
    mixture, sampler = mixture or GaussianMixture(**TWO), sampler or DDIM(12)
    grid = sampler.grid(mixture.path, UniformLambda(start=start))
    chain = guidance if isinstance(guidance, list) else [guidance]
    return sample(mixture, sampler, grid, indices, seed=3, condition=condition, guidance=chain, **options)


SAMPLERS = {
    "ddim": DDIM(8),
    "stochastic": DDIM(8, eta=1.0),
    "multistep": DPMSolverPP(8, order=2),
    "corrector": UniPC(8),
    "two evaluations": EDMHeun(8),
    "flow": FlowHeun(8),
    "a level a sample": DMCMC(6),
}


@pytest.mark.parametrize("path", ["linear", "flow", "edm"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_exact_classifier_of_noisy_states_gives_the_conditional_model(name, path):
    mixture = GaussianMixture(**TWO, path=path)
    guidance = ClassifierGuidance(function=posterior(mixture), label=1, on="state", max_rho=None)
    start = None if name != "flow" else 0.99 * mixture.path.t_max  # at α = 0 the state says nothing of the data
    guided = drawn(guidance, SAMPLERS[name], mixture, start=start)
    condition = {"label": torch.ones(6, dtype=torch.long)}
    wanted = drawn([], SAMPLERS[name], mixture, condition=condition, start=start)
    torch.testing.assert_close(guided.x, wanted.x, **TIGHT)
    assert guided.evaluations == wanted.evaluations


@pytest.mark.parametrize("t", [0.999, 0.7, 0.3, 0.05, 1e-3])
def test_every_form_of_the_guided_prediction_is_the_conditional_one(t):
    mixture = GaussianMixture(**TWO)
    level, x = mixture.path.level(t), Noise(0, range(5), (2,), torch.float64).normal(0).requires_grad_()
    log_p = posterior(mixture)(x, torch.full((5,), t, dtype=torch.float64)).log_softmax(-1)[:, 0]
    (gradient,) = torch.autograd.grad(log_p.sum(), x)
    guided = with_score(mixture.predict(x, level), gradient, 1.0)
    wanted = mixture.predict(x, level, {"label": torch.zeros(5, dtype=torch.long)})
    for form in ("data", "noise", "velocity", "flow", "score"):
        torch.testing.assert_close(guided.get(form), wanted.get(form), rtol=1e-9, atol=1e-9)


def test_one_step_by_hand_through_the_network():
    mixture = GaussianMixture(**TWO)
    level, x = mixture.path.level(0.5), torch.tensor([[0.3, -0.2]], dtype=torch.float64, requires_grad=True)
    data = mixture.predict(x, level).data
    (gradient,) = torch.autograd.grad(clean(data).log_softmax(-1)[0, 0], x)
    wanted = data + 2.5 * level.sigma**2 / level.alpha * gradient
    guidance = ClassifierGuidance(function=clean, label=0, scale=2.5)
    seen = []

    class Looks(Guidance):
        def correct(self, prediction, moment):
            seen.append(prediction)
            return prediction

    sampler = DDIM(1)
    grid = sampler.grid(mixture.path, UniformLambda(start=0.5))
    sample(mixture, sampler, grid, [0], start=x.detach(), guidance=[guidance, Looks()])
    torch.testing.assert_close(seen[0].data, wanted, **TIGHT)
    torch.testing.assert_close(level.alpha * seen[0].data + level.sigma * seen[0].noise, x, **TIGHT)


@pytest.mark.parametrize("on", ["data", "state"])
def test_a_scale_of_nothing_leaves_the_samples_alone(on):
    function = clean if on == "data" else posterior(GaussianMixture(**TWO))
    guided = drawn(ClassifierGuidance(function=function, label=0, on=on, scale=0.0), EDMHeun(8))
    plain = drawn([], EDMHeun(8))
    assert torch.equal(guided.x, plain.x)
    assert guided.evaluations == plain.evaluations


def test_evaluations_are_counted():
    through = ClassifierGuidance(function=clean, label=0, max_rho=None)
    assert drawn(through, DDIM(8)).evaluations == 8
    assert drawn(through, UniPC(8)).evaluations == 8
    assert drawn(through, EDMHeun(8)).evaluations == drawn([], EDMHeun(8)).evaluations


def test_where_there_is_too_much_noise_it_does_not_act():
    mixture, sampler = GaussianMixture(**TWO), DDIM(8)
    seen = []

    class Looks(ClassifierGuidance):
        def mix(self, named, moment):
            seen.append(moment.level.rho)
            return super().mix(named, moment)

    drawn(Looks(function=clean, label=0, max_rho=2.0), sampler, mixture)
    levels = [level.rho for level in sampler.grid(mixture.path, UniformLambda())]
    assert seen == [rho for rho in levels if 0 < rho <= 2.0]
    prediction = mixture.predict(torch.ones(2, 2).double(), mixture.path.levels(torch.tensor([0.9, 0.1]), 2))
    moved = with_score(prediction, torch.ones(2, 2).double(), 1.0, max_rho=2.0)
    assert torch.equal(moved.data[0], prediction.data[0])
    assert not torch.equal(moved.data[1], prediction.data[1])


def test_the_label_is_the_samples_own_and_they_do_not_depend_on_each_other():
    condition = {"label": torch.tensor([0, 1, 0, 1, 1, 0])}
    mixture = GaussianMixture(means=[[0.0, 0.0]] * 2, weights=[1, 1], variances=[1.0, 1.0])
    guidance = ClassifierGuidance(function=clean, scale=4.0)
    for sampler in (DPMSolverPP(8, order=2), EDMHeun(8)):
        together = drawn(guidance, sampler, mixture, condition=condition).x
        assert (together[:, 0] > 0).long().tolist() == [1, 0, 1, 0, 0, 1]
        alone = drawn(guidance, sampler, mixture, indices=[4], condition={"label": torch.tensor([1])}).x
        torch.testing.assert_close(alone[0], together[4], rtol=1e-12, atol=1e-12)


def test_more_scale_more_of_the_class():
    found = []
    for scale in (0.0, 1.0, 3.0):
        guidance = ClassifierGuidance(function=clean, label=1, scale=scale)
        samples = drawn(guidance, DPMSolverPP(10), indices=range(64)).x
        found.append(guidance.measure(Generated(samples, samples)))
    assert all(a["class_accuracy"] < b["class_accuracy"] for a, b in itertools.pairwise(found))
    assert all(a["class_log_probability"] < b["class_log_probability"] for a, b in itertools.pairwise(found))


def test_the_measure_of_a_classifier_of_noisy_states():
    mixture = GaussianMixture(**TWO)
    guidance = ClassifierGuidance(function=posterior(mixture), label=1, on="state")
    samples = mixture.means.repeat(2, 1)
    assert guidance.measure(Generated(samples, samples)) == {}
    guidance.prepare(mixture, DDIM(4))
    assert guidance.measure(Generated(samples, samples))["class_accuracy"] == 0.5
    labelled = ClassifierGuidance(function=clean)
    assert labelled.measure(Generated(samples, samples)) == {}
    assert labelled.measure(Generated(samples, samples, {"label": torch.tensor([0, 1, 0, 1])}))["class_accuracy"] == 1


def test_a_runs_classifier_and_single_precision():
    network = nn.Linear(2, 2)

    def load(run):
        assert run == "mine"
        return SimpleNamespace(task=network)

    guidance = ClassifierGuidance(run="mine", label=1, scale=2.0, load_run=load)
    mixture = GaussianMixture(**TWO, dtype="float32", form="noise")
    x = drawn(guidance, DPMSolverPP(8), mixture).x
    assert x.dtype == torch.float32
    assert bool(x.isfinite().all())
    half = drawn(guidance, DDIM(8), GaussianMixture(**TWO, dtype="bfloat16")).x
    assert half.dtype == torch.bfloat16
    assert bool(half.isfinite().all())


def test_with_other_guidance_in_the_chain_the_graph_stays():
    class Keeps(Guidance):
        needs_gradient = True

        def after_step(self, state, moment):
            _, gradient = moment.gradient(lambda prediction: prediction.data.square().sum(-1))
            assert bool((gradient != 0).any())
            return state

    drawn([ClassifierGuidance(function=clean, label=0), Keeps()], DDIM(4))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"scale": -1.0}, "scale"),
        ({"on": "noise"}, "on"),
        ({"max_rho": 0.0}, "max_rho"),
        ({"label": -1}, "label"),
        ({"run": "other"}, "which classifier"),
        ({"function": 3}, "cannot be called"),
    ],
)
def test_options_out_of_range(options, named):
    with pytest.raises(ConfigurationError, match=named):
        ClassifierGuidance(**{"function": clean, **options})
    with pytest.raises(ConfigurationError, match="there is no classifier"):
        ClassifierGuidance()
    with pytest.raises(ConfigurationError, match="never seen noise"):
        ClassifierGuidance(run="other", on="state")


def test_what_cannot_be_guided_is_refused():
    with pytest.raises(CompositionError, match="not told which class"):
        drawn(ClassifierGuidance(function=clean))
    with pytest.raises(CompositionError, match="does not know the class"):
        drawn(ClassifierGuidance(function=clean, label=2))
    with pytest.raises(PluginError, match="not finite"):
        drawn(ClassifierGuidance(function=lambda x: clean(x) / 0, label=0))
    mixture = GaussianMixture(**TWO)
    mixture.gives = ("data", "flow")
    with pytest.raises(CompositionError, match="does not have"):
        ClassifierGuidance(function=clean, label=0).prepare(mixture, DDIM(4))
    mixture = GaussianMixture(**TWO)
    mixture.classes = 0
    with pytest.raises(CompositionError, match="not told which class"):
        ClassifierGuidance(function=clean).prepare(mixture, DDIM(4))


def test_the_example_of_its_card():
    guidance = ClassifierGuidance(**traits_of(ClassifierGuidance).example)
    x = drawn(guidance, mixture=GaussianMixture()).x
    assert bool(x.isfinite().all())
    assert isinstance(GaussianMixture().predict(x, GaussianMixture().path.level(0.5)), Prediction)
