"""Guidance by a likelihood: the score of the samples and of what is wanted of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import Condition, Denoiser, Generated, Guidance, Level, Moment, Prediction, Sampler
from lightrail.options import at_least, non_negative, one_of, positive
from lightrail.traits import Traits
from lightrail_generation.guidance.judges import Classifier, LoadRun

__all__ = ["ClassifierGuidance", "LikelihoodGuidance", "gradient_through", "labels_of", "with_score"]


def with_score(prediction: Prediction, gradient: Tensor, scale: float, max_rho: float = math.inf) -> Prediction:
    """The prediction whose score is s + w g: D' = D + w (σ²/α) g and ε' = ε − w σ g.

    Args:
        prediction: Of the network.
        gradient: g, with respect to the state, ``[B, …]``.
        scale: w.
        max_rho: Where σ/α is above it, nothing is added.

    Example:
        >>> from lightrail.generation import LinearFlow
        >>> there = Prediction(torch.ones(1, 1), LinearFlow().level(0.5), "data", torch.zeros(1, 1))
        >>> moved = with_score(there, torch.ones(1, 1), 3.0)
        >>> float(moved.score - there.score), float(moved.data)
        (3.0, 1.5)
    """
    level, is_each = prediction.level, isinstance(prediction.level.sigma, Tensor)
    acts = torch.as_tensor((level.rho <= max_rho) & (level.rho < math.inf))
    if not is_each and not bool(acts):
        return prediction
    of_data, of_noise = scale * level.sigma * level.rho, scale * level.sigma
    added = gradient.double().where(acts, 0.0) if is_each else gradient
    changed = prediction.with_data(prediction.data + (of_data * added).to(prediction.x.dtype))
    changed.known["noise"] = prediction.noise - (of_noise * added).to(prediction.x.dtype)
    return changed


def gradient_through(prediction: Prediction, moment: Moment, log_h: Callable[[Tensor], Tensor]) -> Tensor:
    """∇_x log h(D(x)), through the network, ``[B, …]``.

    Where an evaluation has kept no graph, the network is asked once more, for this alone.

    Args:
        prediction: D, as guidance earlier in the chain left it.
        moment: Where.
        log_h: From data ``[B, …]``, as states, to one number a sample.
    """
    with torch.enable_grad():
        if not (prediction.x.requires_grad and prediction.data.requires_grad):
            x = moment.x.detach().requires_grad_()
            prediction = moment.predict(x, moment.level, moment.condition)
        (gradient,) = torch.autograd.grad(log_h(prediction.data).sum(), prediction.x, retain_graph=True)
    return gradient


def labels_of(condition: Condition | None, count: int, label: int | None, of: str) -> Tensor:
    """The classes that are wanted, ``[B]``: one for all where it is given, else those of the condition.

    Args:
        condition: What steers the samples.
        count: B.
        label: A class for all of them.
        of: Whose guidance asks.

    Raises:
        CompositionError: Neither is known.
    """
    if label is not None:
        return torch.full((count,), label)
    found = (condition or {}).get("label")
    if not isinstance(found, Tensor):
        raise CompositionError(
            f"{of} is not told which class is wanted",
            found="neither a label of its own nor one of the samples",
            allowed="a class for all samples, or samples of classes",
            remedy="Set label on the guidance, or generate.label where the model knows classes.",
        )
    return found


class LikelihoodGuidance(Guidance, ABC):
    """Adds w ∇ log h to the score wherever a sampler asks, so that p(x) h(x)^w is sampled.

    Subclasses write :meth:`log_gradient`.

    Args:
        scale: w, at least 0; 0 leaves the samples alone.
        max_rho: The noise σ/α above which it does not act; ``None`` for everywhere.
    """

    def __init__(self, scale: float, max_rho: float | None) -> None:
        non_negative(scale=scale)
        positive(max_rho=1.0 if max_rho is None else max_rho)
        self.scale = scale
        self.max_rho = math.inf if max_rho is None else max_rho

    def prepare(self, denoiser: Denoiser, sampler: Sampler) -> None:
        if "score" not in denoiser.gives:
            raise CompositionError(
                f"{type(self).__name__} adds to a score, which this model does not have",
                found=f"a model that gives {', '.join(denoiser.gives)}",
                allowed="a model that gives score: one that learned from independent Gaussian noise",
                remedy="Choose guidance that corrects the data, such as tfg_flow, or another model.",
            )

    def is_active(self, moment: Moment) -> bool:
        rho = moment.level.rho
        return self.scale != 0 and (isinstance(rho, Tensor) or (rho <= self.max_rho and rho < math.inf))

    def mix(self, named: Mapping[str, Prediction], moment: Moment) -> Prediction:
        gradient = self.log_gradient(named["cond"], moment)
        return with_score(named["cond"], gradient, self.scale, self.max_rho)

    @abstractmethod
    def log_gradient(self, prediction: Prediction, moment: Moment) -> Tensor:
        """∇ log h with respect to the state, ``[B, …]``."""


class ClassifierGuidance(LikelihoodGuidance):
    """Steers samples to a class by the gradient of a classifier.

    s' = ∇ log p(x) + w ∇ log p(y | x), that is D' = D + w (σ²/α) ∇ log p(y | x) and ε' = ε − w σ ∇ log p(y | x)

    It acts on every prediction that a sampler asks for, not on the states between steps, so that any sampler solves the
    guided equation to its own order, and what it remembers is guided. With the exact classifier of the noisy states
    and w = 1 that is Bayes' rule: the conditional model.

    Args:
        run: A run that trained a classifier of clean data (a folder, a checkpoint, or ``latest``), or
        function: a callable, or its dotted path: from samples in the user's units to logits ``[B, C]``; with
            ``on=state`` from states x_t and their times ``[B]`` on the path.
        label: The class that is wanted, at least 0; ``None`` for the one that each sample is conditioned on.
        scale: w, at least 0: 0 leaves the samples alone, 1 is Bayes' rule, more is truer to the class and less varied.
        on: What the classifier sees. ``data``: the predicted data, decoded; any classifier of clean data will do, the
            gradient goes back through the network, and p(y | x_t) is taken for p(y | D(x_t)). ``state``: the noisy
            states, which it must have been trained on.
        max_rho: The noise σ/α above which it does not act, above 0. There the gradient falls as α/σ², and a network's
            error in it, times σ²/α, does not. ``None`` for everywhere but α = 0, for exact models.
        load_run: Loads a run.

    Raises:
        ConfigurationError: An option is out of range, the classifier is not clear, or a run's is to see noise.
        CompositionError: The model has no score, no class is wanted, or the classifier does not know it.
        PluginError: What the classifier answers is not finite, or not one row a sample.

    Deviations:
        The paper moves the mean of an ancestral step by Σ ∇ log p, or the noise of a DDIM step; here the score, which
        is the same for the latter. Its classifier sees the noisy states; ``on=data`` is the common use of one that
        was trained on clean data. A sampler's later evaluations within a step keep no graph: there ``on=data`` costs
        one evaluation more, of the network under the samples' own condition.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail_generation.samplers.ddim import DDIM
        >>> from lightrail_generation.time_grids.uniform_lambda import UniformLambda
        >>> mixture, sampler = GaussianMixture(), DDIM(steps=20)
        >>> guidance = ClassifierGuidance(function=lambda x: 4 * torch.stack((x[:, 0], -x[:, 0]), 1), label=0, scale=3)
        >>> found = sample(mixture, sampler, sampler.grid(mixture.path, UniformLambda()), range(9), guidance=[guidance])
        >>> found.evaluations, bool((found.x[:, 0] > 0).double().mean() > 0.9)
        (20, True)

    Reference:
        P. Dhariwal and A. Nichol (2021), Diffusion Models Beat GANs on Image Synthesis, arXiv 2105.05233, section 4,
        algorithms 1 and 2.
    """

    traits: ClassVar[Traits] = Traits(
        rule="s' = ∇ log p(x) + w ∇ log p(y | x)",
        paper="P. Dhariwal, A. Nichol, 2021, Diffusion Models Beat GANs on Image Synthesis, arXiv 2105.05233",
        example={"function": "torch.tanh", "label": 1},
    )

    def __init__(
        self,
        run: str | None = None,
        function: str | Callable[..., Tensor] | None = None,
        label: int | None = None,
        scale: float = 1.0,
        on: str = "data",
        max_rho: float | None = 10.0,
        load_run: LoadRun | None = None,
    ) -> None:
        super().__init__(scale, max_rho)
        one_of(("data", "state"), on=on)
        at_least(0, label=0 if label is None else label)
        if on == "state" and run is not None:
            raise ConfigurationError(
                "the classifier of a run has never seen noise",
                found=f"on=state, run={run}",
                allowed="on=data with a run, or on=state with a function of states and times",
                remedy="Set on=data.",
            )
        self.classifier = Classifier(run, function, load_run)
        self.label = label
        self.on = on
        self.needs_every_gradient = on == "data" and scale != 0
        self._denoiser: Denoiser | None = None

    def prepare(self, denoiser: Denoiser, sampler: Sampler) -> None:
        super().prepare(denoiser, sampler)
        if not denoiser.classes and self.label is None:
            labels_of(None, 0, None, "ClassifierGuidance")
        self._denoiser = denoiser

    def log_gradient(self, prediction: Prediction, moment: Moment) -> Tensor:
        labels = labels_of(moment.condition, len(moment.x), self.label, "ClassifierGuidance")
        if self.on == "data":
            decode = moment.denoiser.decode
            return gradient_through(
                prediction, moment, lambda data: self.classifier.log_probability(decode(data), labels.to(data.device))
            )
        with torch.enable_grad():
            x = moment.x.detach().requires_grad_()
            values = self._at(x, moment.level).log_probability(x, labels.to(x.device))
            (gradient,) = torch.autograd.grad(values.sum(), x)
        return gradient

    def _at(self, x: Tensor, level: Level) -> Classifier:
        """The classifier of states at these levels."""
        times = torch.as_tensor(level.t, dtype=torch.float64, device=x.device).reshape(-1).expand(len(x))
        return Classifier(function=lambda states: self.classifier.function(states, times))  # type: ignore[call-arg]

    @torch.no_grad()
    def measure(self, generated: Generated) -> dict[str, float]:
        """``class_log_probability``: the mean of log p(y | x); ``class_accuracy``: the share taken for the class."""
        samples, classifier = generated.samples, self.classifier
        if self.label is None and "label" not in (generated.condition or {}):
            return {}
        if self.on == "state":
            if self._denoiser is None:
                return {}
            samples = self._denoiser.encode(samples.to(self._denoiser.device))
            classifier = self._at(samples, self._denoiser.path.level(self._denoiser.path.t_min))
        labels = labels_of(generated.condition, len(samples), self.label, "ClassifierGuidance").to(samples.device)
        right = classifier(samples).argmax(1).to(labels.device) == labels
        return {
            "class_log_probability": float(classifier.log_probability(samples, labels).mean()),
            "class_accuracy": float(right.double().mean()),
        }
