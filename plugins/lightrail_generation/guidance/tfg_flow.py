"""TFG-Flow: guidance by a reward alone, of the continuous and of the discrete part of a flow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightrail.generation import Denoiser, Generated, Guidance, Level, Moment, Prediction, Sampler, State
from lightrail.generation.guidance import Run
from lightrail.options import at_least, non_negative, positive
from lightrail.traits import Traits
from lightrail_generation.guidance.advdiff import refuse_unmovable
from lightrail_generation.guidance.judges import Reward

__all__ = ["TFGFlow", "candidate_weights", "clipped", "next_tokens", "weighted_rates"]


def clipped(gradient: Tensor, limit: float) -> Tensor:
    """The gradient, shortened for each sample so that the root mean square of its entries is at most ``limit``.

    Example:
        >>> clipped(torch.tensor([[3.0, 3.0], [0.5, 0.5]]), 1.0).tolist()
        [[1.0, 1.0], [0.5, 0.5]]
    """
    size = gradient.flatten(1).square().mean(1).sqrt().view(-1, *[1] * (gradient.ndim - 1))
    return gradient * (limit / size.clamp(min=limit))


def candidate_weights(losses: Tensor, temperature: float) -> Tensor:
    """w_k = exp(−f_k/τ) / Σ_j exp(−f_j/τ) of K candidates, ``[B, K]``.

    Args:
        losses: f of each candidate, ``[B, K]``.
        temperature: τ, above 0; ∞ for equal weights.
    """
    return (-losses / temperature).softmax(-1)


def weighted_rates(tokens: Tensor, candidates: Tensor, weights: Tensor, t: Tensor, size: int, mask: int) -> Tensor:
    """R(x_t, b) = Σ_k w_k R(x_t, b | x_0 = candidate k): the rates at which masked tokens become others, ``[B, n, V]``.

    Where a token is masked with probability t, R(mask, b | x_0) is 1/t for b = x_0. With candidates drawn from
    p(x_0 | x_t) and weights of ``exp(−f/τ)`` it is, as K grows, the rate of the flow of p(x_0) exp(−f/τ).

    Args:
        tokens: x_t, ``[B, n]``.
        candidates: Data that are likely behind them, ``[B, K, n]``.
        weights: Of the candidates, ``[B, K]``.
        t: The share of masked tokens, in (0, 1], ``[B]``; 1 is all noise.
        size: V, how many tokens there are.
        mask: Which of them is the mask.

    Example:
        >>> rates = weighted_rates(torch.tensor([[2]]), torch.tensor([[[0], [1]]]), torch.tensor([[0.75, 0.25]]),
        ...                        torch.tensor([0.5]), size=3, mask=2)
        >>> rates.tolist()
        [[[1.5, 0.5, 0.0]]]
    """
    mean = torch.einsum("bk,bknv->bnv", weights, F.one_hot(candidates, size).to(weights.dtype))
    return mean * (tokens == mask)[..., None] / t.view(-1, 1, 1)


def next_tokens(tokens: Tensor, rates: Tensor, h: float, uniform: Tensor) -> Tensor:
    """One Euler step of the jumps: a token becomes b with probability h R(b), and else stays.

    Args:
        tokens: ``[B, n]``.
        rates: ``[B, n, V]``; h times their sum should not exceed 1, and is cut there.
        h: The step, above 0.
        uniform: Numbers in [0, 1), ``[B, n]``.

    Example:
        >>> rates = torch.tensor([[[1.0, 1.0, 0.0]] * 3])
        >>> next_tokens(torch.tensor([[2, 2, 2]]), rates, 0.4, torch.tensor([[0.3, 0.5, 0.9]])).tolist()
        [[0, 1, 2]]
    """
    reached = (h * rates).cumsum(-1)
    found = (uniform[..., None] >= reached).sum(-1)
    return torch.where(found < rates.shape[-1], found, tokens)


class TFGFlow(Guidance):
    """Steers samples by a reward without training, by steps of the states through the network and of the data alone.

    Before each step, ``iterations`` times x ← x + ρ c(∇_x f(D(x))); then ``iterations`` times D ← D + μ c(∇_D f(D)).

    f is the mean of the reward over data D + γ σ ε with fresh noise, and c shortens a gradient whose entries have a
    root mean square above ``clip``. A solver then goes on with the moved states and data; on a flow with Euler's
    method that is the method's velocity (x − D)/t. It works on any noise path.

    This steers the continuous part of a model. The discrete part of the method is here too, as functions of tokens
    (:func:`candidate_weights`, :func:`weighted_rates`, :func:`next_tokens`), which no model of lightrail uses yet.

    Args:
        function: A callable from samples in the user's units to one number a sample, the higher the better, or its
            dotted path; a gradient must go through it.
        rho: ρ, the length of the steps of the states, at least 0; 0 for none.
        mu: μ, of the steps of the data, at least 0; 0 for none.
        iterations: How many of each, at least 1. Each step of the states costs one evaluation.
        gamma: γ, how much noise smooths the reward, at least 0, as a share of that in the states.
        copies: How many noisy copies of the data the reward is averaged over, at least 1; one is enough where γ = 0.
        clip: The largest root mean square of a gradient's entries, above 0.

    Raises:
        ConfigurationError: An option is out of range, or the reward cannot be called.
        CompositionError: The sampler cannot go on from a moved state.
        PluginError: What the reward answers is not finite, or not one number a sample.

    Deviations:
        The published code divides a gradient by its mean square where that exceeds 1, rather than by the root, and
        takes the data from before the last step of the states; here gradients have the length that is named, and the
        data are those of the states as moved. Repeating a step with fresh noise is left out. The network is asked under
        the samples' own condition, without other guidance, for the steps of the states. Predictions of a moved state's
        past are forgotten, so that a multistep sampler is of first order.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail_generation.guidance.reward import brightness
        >>> from lightrail_generation.samplers.flow import FlowEuler
        >>> from lightrail_generation.time_grids.uniform import Uniform
        >>> mixture, sampler = GaussianMixture(path="flow"), FlowEuler(steps=10)
        >>> grid = sampler.grid(mixture.path, Uniform())
        >>> plain = sample(mixture, sampler, grid, range(9))
        >>> guided = sample(mixture, sampler, grid, range(9), guidance=[TFGFlow(brightness)])
        >>> guided.evaluations, bool(guided.x.mean() > plain.x.mean() + 0.3)
        (50, True)

    Reference:
        H. Lin, S. Li, H. Ye, Y. Yang, S. Ermon, Y. Liang and J. Ma (2025), TFG-Flow: Training-free Guidance in
        Multimodal Generative Flow, International Conference on Learning Representations.
    """

    traits: ClassVar[Traits] = Traits(
        rule="x ← x + ρ c(∇_x f(D(x))), D ← D + μ c(∇_D f(D))",
        paper="H. Lin, S. Li, H. Ye, Y. Yang, S. Ermon, Y. Liang, J. Ma, 2025, TFG-Flow: Training-free Guidance in "
        "Multimodal Generative Flow",
        is_stochastic=True,
        example={"function": "lightrail_generation.guidance.reward.brightness", "iterations": 2},
    )

    def __init__(
        self,
        function: str | Callable[[Tensor], Tensor],
        rho: float = 0.1,
        mu: float = 0.1,
        iterations: int = 4,
        gamma: float = 0.1,
        copies: int = 4,
        clip: float = 1.0,
    ) -> None:
        non_negative(rho=rho, mu=mu, gamma=gamma)
        at_least(1, iterations=iterations, copies=copies)
        positive(clip=clip)
        self.reward = Reward(function)
        self.rho = rho
        self.mu = mu
        self.iterations = iterations
        self.gamma = gamma
        self.copies = copies if gamma else 1
        self.clip = clip

    def prepare(self, denoiser: Denoiser, sampler: Sampler) -> None:
        refuse_unmovable(sampler, "TFGFlow")

    def around(self, run: Run, start: Tensor, moment: Moment) -> State:
        return run(self._climbed(start, moment.grid[0], moment, 0) if self.rho else start)

    def after_step(self, state: State, moment: Moment) -> State:
        level = moment.grid[state.index]
        if not self.rho or level.is_clean:
            return state
        x = self._climbed(state.x, level, moment, 1)
        return dataclasses.replace(state, x=x, history=())

    def correct(self, prediction: Prediction, moment: Moment) -> Prediction:
        if not self.mu:
            return prediction
        data = prediction.data.detach()
        for i in range(self.iterations):
            with torch.enable_grad():
                leaf = data.requires_grad_()
                values = self._smoothed(leaf, moment.level, moment, 2 * self.iterations + i)
                (gradient,) = torch.autograd.grad(values.sum(), leaf)
            data = data.detach() + self.mu * clipped(gradient, self.clip)
        # As a step from where the network left them, so that other guidance still finds the graph.
        return prediction.with_data(prediction.data + (data - prediction.data.detach()))

    def _climbed(self, x: Tensor, level: Level, moment: Moment, place: int) -> Tensor:
        """States after all steps through the network."""
        for i in range(self.iterations):
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                data = moment.predict(leaf, level, moment.condition).data
                values = self._smoothed(data, level, moment, place * self.iterations + i)
                (gradient,) = torch.autograd.grad(values.sum(), leaf)
            x = x + self.rho * clipped(gradient, self.clip)
        return x

    def _smoothed(self, data: Tensor, level: Level, moment: Moment, draw: int) -> Tensor:
        """f(D), ``[B]``."""
        decode = moment.denoiser.decode
        if not self.gamma:
            return self.reward(decode(data))
        total = torch.zeros(len(data), dtype=data.dtype, device=data.device)
        for copy in range(self.copies):
            noise = (self.gamma * level.sigma * moment.normal(draw * self.copies + copy)).to(data.dtype)
            total = total + self.reward(decode(data + noise))
        return total / self.copies

    @torch.no_grad()
    def measure(self, generated: Generated) -> dict[str, float]:
        """``reward``: the mean reward of the samples."""
        return {"reward": float(self.reward(generated.samples).mean())}
