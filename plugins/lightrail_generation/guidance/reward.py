"""Guidance by a reward: samples of p(x) exp(w r(x))."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from lightrail.generation import Generated, Moment, Prediction
from lightrail.traits import Traits
from lightrail_generation.guidance.classifier import LikelihoodGuidance, gradient_through
from lightrail_generation.guidance.judges import Reward

__all__ = ["RewardGuidance", "brightness"]


def brightness(samples: Tensor) -> Tensor:
    """The mean of a sample's numbers, ``[B]``: the simplest reward.

    Example:
        >>> brightness(torch.tensor([[1.0, 3.0], [0.0, 1.0]])).tolist()
        [2.0, 0.5]
    """
    return samples.flatten(1).mean(1)


class RewardGuidance(LikelihoodGuidance):
    """Steers samples by the gradient of a reward of the predicted data, through the network.

    s' = ∇ log p(x) + w ∇_x r(decode(D(x))), that is D' = D + w (σ²/α) ∇_x r and ε' = ε − w σ ∇_x r

    What is aimed at is p(x) exp(w r(x)). The exact guidance is ∇ log E[exp(w r(x_0)) | x]; w times the reward of the
    mean stands for the logarithm, which is exact where the data are Gaussian and the reward is linear, and else right
    to first order in w.

    Args:
        function: A callable from samples in the user's units to one number a sample, the higher the better, or its
            dotted path; a gradient must go through it. ``lightrail_generation.guidance.reward.brightness`` is one.
        scale: w, at least 0; 0 leaves the samples alone.
        max_rho: The noise σ/α above which it does not act, above 0. There the gradient falls as α/σ², and a network's
            error in it, times σ²/α, does not. ``None`` for everywhere but α = 0, for exact models.

    Raises:
        ConfigurationError: An option is out of range, or the reward cannot be called.
        CompositionError: The model has no score.
        PluginError: What the reward answers is not finite, or not one number a sample.

    Deviations:
        The paper repeats each step with fresh noise and may search for better data too; only its forward guidance is
        here. A sampler's later evaluations within a step keep no graph: there it costs one evaluation more, of the
        network under the samples' own condition.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail_generation.samplers.ddim import DDIM
        >>> from lightrail_generation.time_grids.uniform_lambda import UniformLambda
        >>> mixture, sampler = GaussianMixture(), DDIM(steps=20)
        >>> grid, guidance = sampler.grid(mixture.path, UniformLambda()), RewardGuidance(brightness, scale=4)
        >>> plain, guided = (sample(mixture, sampler, grid, range(50), guidance=each).x for each in ([], [guidance]))
        >>> bool(guided.mean() > plain.mean() + 0.3)
        True

    Reference:
        A. Bansal, H.-M. Chu, A. Schwarzschild, S. Sengupta, M. Goldblum, J. Geiping and T. Goldstein (2023),
        Universal Guidance for Diffusion Models, arXiv 2302.07121, section 3.1.
    """

    traits: ClassVar[Traits] = Traits(
        rule="s' = ∇ log p(x) + w ∇ r(decode(D(x)))",
        paper="A. Bansal, H.-M. Chu, A. Schwarzschild, S. Sengupta, M. Goldblum, J. Geiping, T. Goldstein, 2023, "
        "Universal Guidance for Diffusion Models, arXiv 2302.07121",
        example={"function": "lightrail_generation.guidance.reward.brightness"},
    )

    def __init__(
        self, function: str | Callable[[Tensor], Tensor], scale: float = 1.0, max_rho: float | None = 10.0
    ) -> None:
        super().__init__(scale, max_rho)
        self.reward = Reward(function)
        self.needs_every_gradient = scale != 0

    def log_gradient(self, prediction: Prediction, moment: Moment) -> Tensor:
        decode = moment.denoiser.decode
        return gradient_through(prediction, moment, lambda data: self.reward(decode(data)))

    @torch.no_grad()
    def measure(self, generated: Generated) -> dict[str, float]:
        """``reward``: the mean of r over the samples."""
        return {"reward": float(self.reward(generated.samples).mean())}
