"""Soft value-based decoding: of several next states the one with the better outlook is kept, without a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from lightrail.errors import CompositionError
from lightrail.generation import Denoiser, Generated, Guidance, Moment, Sampler, State
from lightrail.options import at_least, one_of, positive
from lightrail.traits import SamplingClaim, Traits
from lightrail_generation.guidance.judges import Reward

__all__ = ["SVDD", "best", "drawn"]


def drawn(values: Tensor, alpha: float, uniform: Tensor) -> Tensor:
    """A candidate drawn with p_j ∝ exp(v_j/α), ``[N]``.

    Args:
        values: v, ``[N, M]``.
        alpha: α, above 0.
        uniform: Numbers in [0, 1), ``[N]``.

    Example:
        >>> drawn(torch.tensor([[0.0, 1.0]]), 1e-3, torch.tensor([0.3])).tolist()
        [1]
    """
    sums = (values.double() / alpha).softmax(1).cumsum(1)
    wanted = (uniform.double() * sums[:, -1])[:, None]
    return torch.searchsorted(sums, wanted, right=True)[:, 0].clamp(max=values.shape[1] - 1)


def best(values: Tensor) -> Tensor:
    """The candidate of the greatest value, the first of equals, ``[N]``."""
    return values.argmax(1)


class SVDD(Guidance):
    """Draws several next states at each step and goes on from one, by the reward of the data behind each.

    x_t^1, …, x_t^M ~ p(x_t | x_s);  v_j = r(D(x_t^j));  x_t = x_t^j with probability ∝ exp(v_j/α)

    As M grows the samples are those of q(x) exp(r(x)/α), as far as r(D(x)) is the soft value α log E[exp(r/α) | x];
    for a linear reward of Gaussian data it is. The reward is a black box, and samples do not compete with one another.

    Args:
        function: r: a callable from samples ``[B, …]`` in the user's units to ``[B]``, or its dotted path; no gradient
            is needed.
        candidates: M, states that are tried for each sample, at least 1; 1 is the sampler alone. 10 to 20 in the paper.
        alpha: α above 0, in the units of the reward: the smaller, the greedier.
        choice: ``softmax`` draws by exp(v/α); ``best`` takes the greatest value, the limit α → 0.

    Raises:
        ConfigurationError: An option is out of range.
        CompositionError: The sampler draws no fresh noise, so that the candidates would be one.

    Deviations:
        The released code takes the greatest value (``choice=best``); the paper draws. Values are by the predicted data
        (the paper's posterior mean), not by a network trained for them. A candidate's prediction is asked for its value
        and, after the choice, by the sampler again: 2 M evaluations a step, where M would do; a step to the data asks
        none for its value, as the samples are there.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail_generation.samplers.ddpm import DDPM
        >>> from lightrail_generation.time_grids.uniform import Uniform
        >>> mixture, sampler = GaussianMixture(), DDPM(steps=10)
        >>> guidance = SVDD(lambda samples: samples[:, 0], candidates=4)
        >>> grid = sampler.grid(mixture.path, Uniform())
        >>> sample(mixture, sampler, grid, range(4), guidance=[guidance]).evaluations
        76

    Reference:
        X. Li, Y. Zhao, C. Wang, G. Scalia, G. Eraslan, S. Nair, T. Biancalani, S. Ji, A. Regev, S. Levine and M. Uehara
        (2024), Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based Decoding,
        arXiv 2408.08252, algorithm 1 and SVDD-PM.
    """

    traits: ClassVar[Traits] = Traits(
        rule="x_t = x_t^j of M candidates with probability ∝ exp(r(D(x_t^j))/α)",
        paper="X. Li, Y. Zhao, C. Wang, G. Scalia, G. Eraslan, S. Nair, T. Biancalani, S. Ji, A. Regev, S. Levine, "
        "M. Uehara, 2024, Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based "
        "Decoding, arXiv 2408.08252",
        is_stochastic=True,
        example={"function": "lightrail_generation.guidance.reward.brightness", "candidates": 4},
        sampling_claims=(
            SamplingClaim(
                "without a gradient, samples have a higher reward than those of the sampler alone",
                metric="reward",
                overrides=(
                    "denoiser=gaussian_mixture",
                    "+sampler=ddpm",
                    "sampler.steps=50",
                    "+guidance=[svdd]",
                    "guidance.svdd.function=lightrail_generation.guidance.reward.brightness",
                    "generate.count=200",
                ),
            ),
        ),
    )

    def __init__(
        self,
        function: str | Callable[[Tensor], Tensor],
        candidates: int = 10,
        alpha: float = 0.1,
        choice: str = "softmax",
    ) -> None:
        at_least(1, candidates=candidates)
        positive(alpha=alpha)
        one_of(("softmax", "best"), choice=choice)
        self.reward = Reward(function)
        self.candidates = candidates
        self.alpha = alpha
        self.choice = choice

    def prepare(self, denoiser: Denoiser, sampler: Sampler) -> None:
        card, name = sampler.card, type(sampler.solver).__name__
        if not card.is_stochastic or not card.descends:
            raise CompositionError(
                f"svdd cannot try several next states with {name}",
                found=f"{name} under its options",
                allowed="samplers that go down the grid with fresh noise: ddpm, ddim with eta above 0, dpm_solver_pp "
                "with stochastic=true, si_sde, edm_euler or edm_heun with s_churn above 0",
                remedy="Choose +sampler=ddpm.",
            )

    def after_step(self, state: State, moment: Moment) -> State:
        count = self.candidates
        if count == 1:
            return state
        level = moment.grid[state.index]
        data = state.x if level.is_clean else moment.predict(state.x, level, moment.condition).data
        values = self.reward.needs_no_gradient(moment.denoiser.decode(data)).view(-1, count)
        chosen = best(values) if self.choice == "best" else drawn(values, self.alpha, moment.uniform()[::count])
        rows = chosen + count * torch.arange(len(values), device=chosen.device)
        return moment.resample(state, rows.repeat_interleave(count))

    def measure(self, generated: Generated) -> dict[str, float]:
        """The mean reward."""
        return {"reward": float(self.reward.needs_no_gradient(generated.samples).double().mean())}
