# pyright: reportArgumentType=false
"""What samples are judged by: answers are checked, and a gradient goes through them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightrail.errors import CompositionError, ConfigurationError, PluginError, UserError
from lightrail.generation import GaussianMixture
from lightrail_generation.guidance.judges import Classifier, Reward, denoiser_of_run


class Mean(nn.Module):
    def forward(self, samples):
        return samples.flatten(1).mean(1)


def in_four_parts(error: UserError) -> bool:
    return all((error.what, error.found, error.allowed, error.remedy))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_reward_that_is_not_finite_is_named_with_how_many_samples_it_is_of(bad):
    reward = Reward(lambda samples: torch.where(samples[:, 0] > 0, samples[:, 0], bad))
    assert reward(torch.ones(3, 2)).tolist() == [1, 1, 1]
    with pytest.raises(PluginError, match="the reward gives numbers that are not finite") as caught:
        reward(torch.tensor([[1.0], [-1.0], [-2.0]]))
    assert caught.value.found == "2 of 3 samples"
    assert in_four_parts(caught.value)


@pytest.mark.parametrize(
    "answer", [lambda x: x.mean(), lambda x: x, lambda x: x[:1, 0], lambda x: x[:, 0].tolist(), lambda x: None]
)
def test_a_reward_answers_one_number_a_sample(answer):
    with pytest.raises(PluginError, match="does not answer for each sample") as caught:
        Reward(answer)(torch.ones(3, 2))
    assert in_four_parts(caught.value)


def test_a_reward_may_be_a_path_a_class_or_an_object():
    samples = torch.tensor([[1.0, 3.0]])
    for function in ("lightrail_generation.guidance.reward.brightness", Mean, Mean()):
        assert Reward(function)(samples).tolist() == [2.0]
    with pytest.raises(ConfigurationError, match="the reward cannot be called") as caught:
        Reward(3)
    assert in_four_parts(caught.value)
    with pytest.raises(UserError):
        Reward("nowhere.at_all")


def test_a_gradient_goes_through_a_reward_unless_it_is_a_black_box():
    reward, samples = Reward(Mean()), torch.ones(2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(reward(samples).sum(), samples)
    assert torch.equal(gradient, torch.full((2, 4), 0.25))
    assert not reward.needs_no_gradient(samples).requires_grad


def test_the_log_probability_of_a_class():
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    classifier = Classifier(function=lambda samples: logits)
    found = classifier.log_probability(torch.zeros(2, 1), torch.tensor([2, 1]))
    torch.testing.assert_close(found, torch.stack([logits[0].log_softmax(0)[2], logits[1].log_softmax(0)[1]]))
    with pytest.raises(CompositionError, match="does not know the class") as caught:
        classifier.log_probability(torch.zeros(2, 1), torch.tensor([0, 3]))
    assert caught.value.found == "class 3, and 3 classes"


def test_a_classifiers_answers_are_checked():
    for answer, named in ((lambda x: x[:, 0], "each sample"), (lambda x: x / 0, "not finite")):
        with pytest.raises(PluginError, match=named) as caught:
            Classifier(function=answer)(torch.ones(3, 2))
        assert "the classifier" in caught.value.what
        assert in_four_parts(caught.value)


def test_a_classifier_of_a_run_is_frozen_and_sees_its_own_type():
    network = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5))
    classifier = Classifier(run="folder", load_run=lambda run: SimpleNamespace(task=network))
    samples = torch.ones(4, 2, dtype=torch.float64, requires_grad=True)
    assert classifier(samples).dtype == torch.float32
    assert not network.training
    assert not any(each.requires_grad for each in network.parameters())
    (gradient,) = torch.autograd.grad(classifier.log_probability(samples, torch.tensor([0, 1, 2, 0])).sum(), samples)
    assert gradient.dtype == torch.float64


def test_exactly_one_classifier():
    for options in ({}, {"run": "folder", "function": Mean()}):
        with pytest.raises(ConfigurationError) as caught:
            Classifier(**options)
        assert in_four_parts(caught.value)


def test_the_denoiser_of_another_run():
    class Task:
        def denoiser(self):
            mixture = GaussianMixture()
            mixture.attach = lambda data, folder: seen.append((data, folder))
            return mixture

    seen = []

    def load(run):
        return SimpleNamespace(
            task=Task() if run == "good" else object(), data="data", folder="here", checkpoint="last"
        )

    assert isinstance(denoiser_of_run("good", load), GaussianMixture)
    assert seen == [("data", "here")]
    with pytest.raises(CompositionError, match="does not generate") as caught:
        denoiser_of_run("bad", load)
    assert in_four_parts(caught.value)
