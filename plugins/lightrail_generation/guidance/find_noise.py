"""FIND: the distribution of the starting noise, learned for a reward by policy optimisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightrail.generation import Denoiser, Generated, Guidance, Moment, Sampler, State
from lightrail.options import at_least, between, non_negative
from lightrail.traits import SamplingClaim, Traits
from lightrail_generation.guidance.judges import Reward
from lightrail_generation.guidance.starting_noise import refuse_other_noise

__all__ = ["Calibration", "FindNoise", "Policy", "clipped_step"]

# Of an action that was bad and became likelier the ratio is not clipped; beyond this it would overflow.
LARGEST_LOG_RATIO = 20.0


@dataclass(frozen=True)
class Policy:
    """N(μ, σ²) of the starting noise, an independent normal for each element, one a population.

    Args:
        mean: μ, ``[G, 1, *shape]``, in units of the noise.
        log_std: log σ, ``[G, 1, *shape]``.
    """

    mean: Tensor
    log_std: Tensor

    def sampled(self, z: Tensor) -> Tensor:
        """μ + σ z, for standard normal z ``[G, K, *shape]``."""
        return self.mean + self.log_std.exp() * z

    def log_ratio(self, actions: Tensor, old: Policy) -> Tensor:
        """log p(a)/p_old(a) of each element."""
        ours, theirs = ((actions - each.mean) / each.log_std.exp() for each in (self, old))
        return (theirs.square() - ours.square()) / 2 + old.log_std - self.log_std

    def divergence(self) -> Tensor:
        """KL(N(μ, σ²) ‖ N(0, 1)) = ½ Σ (μ² + σ² − 1 − log σ²), in nats, ``[G]``."""
        terms = self.mean.square() + torch.expm1(2 * self.log_std) - 2 * self.log_std
        return terms.flatten(1).sum(1) / 2

    def scaled(self, share: Tensor) -> Policy:
        """With μ and log σ multiplied, ``[G]``."""
        factor = share.view(-1, *[1] * (self.mean.ndim - 1))
        return Policy(factor * self.mean, factor * self.log_std)

    def within(self, bound: float) -> Policy:
        """The nearest to it on the way to N(0, 1), in μ and log σ, whose divergence is at most ``bound``."""
        is_far = self.divergence() > bound
        if not bool(is_far.any()):
            return self
        low, high = torch.zeros_like(is_far, dtype=self.mean.dtype), torch.ones_like(is_far, dtype=self.mean.dtype)
        for _ in range(50):
            middle = (low + high) / 2
            is_outside = self.scaled(middle).divergence() > bound
            low, high = torch.where(is_outside, low, middle), torch.where(is_outside, middle, high)
        return self.scaled(torch.where(is_far, low, 1.0))


def clipped_step(
    policy: Policy,
    old: Policy,
    actions: Tensor,
    advantages: Tensor,
    clip: float,
    rate: float,
    per_element: bool = False,
) -> Policy:
    """A step along the natural gradient of the clipped objective.

    J = mean_k min(r_k A_k, clip(r_k, 1 − c, 1 + c) A_k),  r_k = p(a_k)/p_old(a_k)

    μ ← μ + η mean_k(w_k A_k r_k (a_k − μ)),  log σ ← log σ + η/2 mean_k(w_k A_k r_k ((a_k − μ)²/σ² − 1)),

    w_k is 0 where the clipped ratio is the smaller and 1 elsewhere.

    Args:
        policy: What is moved.
        old: Where the actions were drawn from.
        actions: a, ``[G, K, *shape]``.
        advantages: A, ``[G, K]``.
        clip: c.
        rate: η.
        per_element: Whether r is the geometric mean over the elements in place of their product.

    Example:
        >>> noise = Policy(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
        >>> step = clipped_step(noise, noise, torch.tensor([[[1.0], [-1.0]]]), torch.tensor([[1.0, -1.0]]), 0.2, 0.1)
        >>> round(float(step.mean), 6), float(step.log_std)
        (0.1, 0.0)
    """
    logs = policy.log_ratio(actions, old).flatten(2)
    ratio = (logs.mean(2) if per_element else logs.sum(2)).clamp(max=LARGEST_LOG_RATIO).exp()
    is_clipped = torch.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip)
    weights = torch.where(is_clipped, 0.0, advantages * ratio).view(*ratio.shape, *[1] * (actions.ndim - 2))
    offsets = actions - policy.mean
    spread = (offsets / policy.log_std.exp()).square() - 1
    mean = policy.mean + rate * (weights * offsets).mean(1, keepdim=True)
    log_std = policy.log_std + rate / 2 * (weights * spread).mean(1, keepdim=True)
    return Policy(mean, log_std)


class Calibration:
    """Advantages (r − m)/s with a running mean m and standard deviation s of the rewards of each population.

    Args:
        decay: β, in [0, 1): the weight that earlier rewards keep; m ← β m + (1 − β) r̄, without the bias of its start.

    Example:
        >>> Calibration(0.9)(torch.tensor([[1.0, 3.0]])).tolist()
        [[-1.0, 1.0]]
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._weight = 0.0
        self._mean: Tensor | float = 0.0
        self._square: Tensor | float = 0.0

    def __call__(self, rewards: Tensor) -> Tensor:
        """``[G, K]`` to ``[G, K]``; zeros where all rewards were equal."""
        share = 1 - self.decay
        self._weight = self.decay * self._weight + share
        self._mean = self.decay * self._mean + share * rewards.mean(1, keepdim=True)
        self._square = self.decay * self._square + share * rewards.square().mean(1, keepdim=True)
        mean, square = self._mean / self._weight, self._square / self._weight
        variance = square - mean.square()
        varies = variance > 1e-10 * square
        return torch.where(varies, (rewards - mean) / torch.where(varies, variance, 1.0).sqrt(), 0.0)


class FindNoise(Guidance):
    """Learns a normal distribution of the starting noise under which samples have a higher reward, a black box.

    x_T = σ_T (μ + σ z);  μ and log σ climb  J = E min(r A, clip(r, 1 − c, 1 + c) A),
    r = p(x_T)/p_old(x_T),  A = (R − running mean)/(running standard deviation),  KL(N(μ, σ²) ‖ N(0, 1)) ≤ κ

    The whole sampler is one step of a decision process: it is run ``iterations`` times on noise of the distribution so
    far, and once more, from the samples' own noise, on that which was learned. ``particles`` samples, one after the
    other, share a distribution, so that generate.count must be a multiple of them. The more noise a sampler adds on its
    way, the less the start decides: with ``ddpm`` nothing is gained.

    Args:
        function: R, from samples in the user's units to one number each, the higher the better; or its dotted path.
            It needs no gradient.
        particles: Samples that learn one distribution together, at least 1; about 8 or more for a steady direction.
        iterations: Runs of the sampler from which is learned, at least 0; 0 is the sampler alone.
        epochs: Steps on the rewards of each run, at least 1; from the second on the ratio is clipped.
        rate: η, of a step along the natural gradient, at least 0; 0 is the sampler alone.
        clip: c, above 0 and below 1.
        kl: κ, in nats, at least 0, over all elements together: μ can move by no more than √(2κ) in norm.
        decay: β of the running mean and standard deviation of the rewards, in [0, 1).
        per_element: Whether r is the geometric mean over elements, as in the published code: with many elements it is
            clipped far later.

    Raises:
        ConfigurationError: An option is out of range, or the reward cannot be called.
        CompositionError: The model does not start from Gaussian noise.

    Deviations:
        The paper's baseline is a small network that predicts the expected reward of the distribution; here it is the
        running mean. Its divergence is a penalty of weight 0.01, here a bound. The published code draws one sample an
        iteration, takes the ratio to N(0, 1) throughout, as a geometric mean over elements, and steps by AdamW for 150
        iterations. Here the ratio is to the distribution that was sampled, and steps are along the natural gradient.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail_generation.samplers.ddim import DDIM
        >>> from lightrail_generation.time_grids.uniform_lambda import UniformLambda
        >>> mixture, sampler = GaussianMixture(), DDIM(steps=10)
        >>> guidance = FindNoise(lambda samples: samples[:, 0], particles=4, iterations=5)
        >>> grid = sampler.grid(mixture.path, UniformLambda())
        >>> sample(mixture, sampler, grid, range(8), guidance=[guidance]).evaluations
        60

    Reference:
        C. Chen, L. Yang, X. Yang, L. Chen, G. He, C. Wang and Y. Li (2024), FIND: Fine-tuning Initial Noise
        Distribution with Policy Optimization for Diffusion Models, arXiv 2407.19453.
    """

    traits: ClassVar[Traits] = Traits(
        rule="(μ, σ) ← ascent of E min(r A, clip(r, 1 ± c) A), x_T ~ N(μ, σ²)",
        paper="C. Chen, L. Yang, X. Yang, L. Chen, G. He, C. Wang, Y. Li, 2024, FIND: Fine-tuning Initial Noise "
        "Distribution with Policy Optimization for Diffusion Models, arXiv 2407.19453",
        is_stochastic=True,
        needs_predictions=("noise",),
        example={"function": "torch.trapezoid", "particles": 2, "iterations": 2},
        sampling_claims=(
            SamplingClaim(
                "samples from the learned noise have a higher reward than those from standard normal noise",
                metric="reward",
                # The mean of the two coordinates.
                overrides=(
                    "denoiser=gaussian_mixture",
                    "+sampler=dpm_solver_pp",
                    "+guidance=[find_noise]",
                    "guidance.find_noise.function=torch.trapezoid",
                    "generate.count=64",
                ),
            ),
        ),
    )

    def __init__(
        self,
        function: str | Callable[[Tensor], Tensor],
        particles: int = 8,
        iterations: int = 10,
        epochs: int = 4,
        rate: float = 0.1,
        clip: float = 0.2,
        kl: float = 2.0,
        decay: float = 0.9,
        per_element: bool = False,
    ) -> None:
        at_least(1, particles=particles, epochs=epochs)
        at_least(0, iterations=iterations)
        non_negative(rate=rate, kl=kl)
        between(0, 1, closed="neither", clip=clip)
        between(0, 1, decay=decay)
        self.reward = Reward(function)
        self.population = particles
        self.iterations = iterations
        self.epochs = epochs
        self.rate = rate
        self.clip = clip
        self.kl = kl
        self.decay = decay
        self.per_element = per_element

    def prepare(self, denoiser: Denoiser, sampler: Sampler) -> None:
        refuse_other_noise(self, denoiser)

    def around(self, run: Callable[[Tensor], State], start: Tensor, moment: Moment) -> State:
        if not self.iterations or not self.rate:
            return run(start)
        scale = moment.denoiser.path.starting_scale(moment.grid[0])
        z = self._grouped(start.double() / scale)
        none = torch.zeros_like(z[:, :1])
        policy, calibration = Policy(none, none), Calibration(self.decay)

        def played(actions: Tensor) -> State:
            return run((scale * actions).flatten(0, 1).to(start.dtype))

        for iteration in range(self.iterations):
            # Of the step of the starting noise, so that no sampler draws the same on its way.
            fresh = moment.noise.normal(-1, moment.first_draw + iteration)
            actions = policy.sampled(self._grouped(fresh.double()))
            samples = moment.denoiser.decode(played(actions).x)
            rewards = self.reward.needs_no_gradient(samples).double().to(start.device)
            policy = self._learned(policy, actions, calibration(self._grouped(rewards)))
        return played(policy.sampled(z))

    def _learned(self, old: Policy, actions: Tensor, advantages: Tensor) -> Policy:
        policy = old
        for _ in range(self.epochs):
            policy = clipped_step(policy, old, actions, advantages, self.clip, self.rate, self.per_element)
            policy = policy.within(self.kl)
        return policy

    def _grouped(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (-1, self.population))

    def measure(self, generated: Generated) -> dict[str, float]:
        return {"reward": float(self.reward.needs_no_gradient(generated.samples).double().mean())}
