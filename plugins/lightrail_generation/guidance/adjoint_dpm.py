"""AdjointDPM: the gradient of a reward at the starting noise, by the adjoint equation of the probability flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightrail.errors import PluginError
from lightrail.generation import Denoiser, Generated, Guidance, Level, Moment, Sampler, State
from lightrail.options import at_least, non_negative, one_of
from lightrail.traits import SamplingClaim, Traits
from lightrail_generation.guidance.adjoint_equation import METHODS, adjoint_gradient, knots_of, opaque, solved
from lightrail_generation.guidance.judges import Reward
from lightrail_generation.guidance.starting_noise import near_shell, refuse_other_noise, refuse_stochastic

__all__ = ["AdjointDPM", "adjoint_gradient"]


class AdjointDPM(Guidance):
    """Climbs a differentiable reward of the sample in the starting noise, then lets the sampler run from there.

    z ← S(z + η ∂r/∂z / rms(∂r/∂z)),  z = x_T/σ_T,  with ∂r/∂x_T of the adjoint equation

    d(x/α)/dρ = ε,  da/dρ = −(∂ε/∂(x/α))ᵀ a,  ρ = σ/α,

    which needs the memory of one evaluation, however many steps there are. S keeps |z| near that of noise. A step that
    does not raise the reward is taken back and the next is half as long.

    Args:
        function: r, differentiable: from samples in the user's units to one number each; or its dotted path.
        iterations: Steps of ascent, at least 0; 0 is the sampler alone.
        rate: η, at least 0: how far a step moves an element, in root mean square; noise has 1. 0 is the sampler alone.
        steps: K, of the flow that is differentiated, at equal distances in λ, at least 1. It is not the sampler's.
        method: ``adams``, explicit, of order 4; or ``rk4`` in ρ, four times as dear and closer.
        shell: How far |z| may be from √n, at least 0, n the elements of a state; noise is within 0.71 of it. A start
            that is farther away may stay as far.

    The flow takes F = K + 9 evaluations with ``adams`` (whose first three steps are by ``rk4``, K ≥ 4) and 4 K with
    ``rk4``, and as many on the way back: n iterations take (2 n + 1) F + n + 1, and then those of the sampler.

    Raises:
        ConfigurationError: An option is out of range, or the reward cannot be called.
        CompositionError: The sampler adds noise of its own, or the model knows no noise or cannot be differentiated.
        PluginError: The reward cannot be differentiated.

    Deviations:
        The gradient is that of the model under its condition alone, without what other guidance in the chain does. The
        paper also descends in embeddings and weights; :func:`adjoint_gradient` gives the gradient of an embedding, but
        a sampler's condition is not guidance's to change. The published code steps in ρ by ``torchdiffeq``, at levels
        rounded to training steps; here the multistep polynomial is in λ, because steps in ρ grow on the way back. The
        normalised step, its halving and the shell are not the paper's.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail_generation.samplers.ddim import DDIM
        >>> from lightrail_generation.time_grids.uniform_lambda import UniformLambda
        >>> mixture, sampler = GaussianMixture(), DDIM(steps=10)
        >>> guidance = AdjointDPM(lambda samples: samples[:, 0], iterations=3, steps=12)
        >>> grid = sampler.grid(mixture.path, UniformLambda())
        >>> sample(mixture, sampler, grid, range(4), guidance=[guidance]).evaluations
        161

    Reference:
        J. Pan, J. H. Liew, V. Y. F. Tan, J. Feng and H. Yan (2023), AdjointDPM: Adjoint Sensitivity Method for Gradient
        Backpropagation of Diffusion Probabilistic Models, arXiv 2307.10711.
    """

    traits: ClassVar[Traits] = Traits(
        rule="x_T ← S(x_T + η ∂r/∂x_T), da/dρ = −(∂ε/∂y)ᵀ a",
        paper="J. Pan, J. H. Liew, V. Y. F. Tan, J. Feng, H. Yan, 2023, AdjointDPM: Adjoint Sensitivity Method for "
        "Gradient Backpropagation of Diffusion Probabilistic Models, arXiv 2307.10711",
        needs_predictions=("noise",),
        example={"function": "torch.trapezoid", "iterations": 2, "steps": 8},
        sampling_claims=(
            SamplingClaim(
                "samples from the optimised starting noise have a higher reward than those from the noise as drawn",
                metric="reward",
                # The mean of the two coordinates.
                overrides=(
                    "denoiser=gaussian_mixture",
                    "+sampler=dpm_solver_pp",
                    "+guidance=[adjoint_dpm]",
                    "guidance.adjoint_dpm.function=torch.trapezoid",
                    "generate.count=64",
                ),
            ),
        ),
    )

    def __init__(
        self,
        function: str | Callable[[Tensor], Tensor],
        iterations: int = 10,
        rate: float = 0.1,
        steps: int = 20,
        method: str = "adams",
        shell: float = 1.0,
    ) -> None:
        at_least(0, iterations=iterations)
        at_least(1, steps=steps)
        non_negative(rate=rate, shell=shell)
        one_of(METHODS, method=method)
        self.reward = Reward(function)
        self.iterations = iterations
        self.rate = rate
        self.steps = steps
        self.method = method
        self.shell = shell

    def prepare(self, denoiser: Denoiser, sampler: Sampler) -> None:
        refuse_stochastic(self, sampler)
        refuse_other_noise(self, denoiser)

    def around(self, run: Callable[[Tensor], State], start: Tensor, moment: Moment) -> State:
        if not self.iterations or not self.rate:
            return run(start)
        flow = _Flow(self, moment)
        scale = moment.denoiser.path.starting_scale(moment.grid[0])
        begin = z = start / scale
        step = torch.full_like(flow.row(z), self.rate)
        end, value, slope = flow.end(scale * z)
        ascent = _unit(flow.gradient(end, slope))
        for left in reversed(range(self.iterations)):
            tried = near_shell(z + step * ascent, begin, self.shell)
            end, reached, slope = flow.end(scale * tried)
            is_better = flow.row(z, reached > value)
            z, value = torch.where(is_better, tried, z), torch.where(reached > value, reached, value)
            step = torch.where(is_better, step, step / 2)
            if left:
                ascent = torch.where(is_better, _unit(flow.gradient(end, slope)), ascent)
        return run(scale * z)

    def measure(self, generated: Generated) -> dict[str, float]:
        return {"reward": float(self.reward.needs_no_gradient(generated.samples).double().mean())}


class _Flow:
    """The probability flow of one batch between the knots, and the reward at its end."""

    def __init__(self, guidance: AdjointDPM, moment: Moment) -> None:
        self.moment = moment
        self.reward = guidance.reward
        self.levels = knots_of(moment.grid, guidance.steps)
        self.solver: Any = {"levels": self.levels, "path": moment.grid.path, "method": guidance.method}
        self.denoises = moment.grid[-1].is_clean or moment.grid.denoises_last

    def noise(self, x: Tensor, level: Level) -> Tensor:
        return self.moment.predict(x, level, self.moment.condition).noise

    def end(self, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The state at the last knot, the reward of the sample there ``[B]``, and its gradient."""
        with torch.no_grad():
            end = solved(self.noise, start, **self.solver)
        with torch.enable_grad():
            x = end.detach().requires_grad_()
            data = self.moment.predict(x, self.levels[-1], self.moment.condition).data if self.denoises else x
            reward = self.reward(self.moment.denoiser.decode(data))
            if not data.requires_grad:
                raise opaque()
            if not reward.requires_grad:
                raise _flat()
            (slope,) = torch.autograd.grad(reward.sum(), x)
        return end, reward.detach(), slope

    def gradient(self, end: Tensor, slope: Tensor) -> Tensor:
        return adjoint_gradient(self.noise, end, slope, **self.solver)[0]

    def row(self, like: Tensor, values: Tensor | None = None) -> Tensor:
        """One number a sample, ``[B, 1, …]``."""
        found = like.new_zeros(len(like)) if values is None else values
        return found.view(-1, *[1] * (like.ndim - 1))


def _unit(gradient: Tensor) -> Tensor:
    """With a root mean square of 1 a sample; nothing where there is no gradient."""
    size = gradient.flatten(1).square().mean(1).sqrt().view(-1, *[1] * (gradient.ndim - 1))
    return torch.where(size > 0, gradient / size.clamp(min=torch.finfo(gradient.dtype).tiny), 0.0)


def _flat() -> PluginError:
    return PluginError(
        "the reward cannot be differentiated",
        found="a reward without a gradient with respect to the samples",
        allowed="a reward that autograd can follow",
        remedy="Write it in torch without detach() or numpy, or choose guidance for a black box: find_noise, svdd.",
    )
