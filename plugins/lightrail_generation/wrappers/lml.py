"""Levenberg–Marquardt–Langevin: a preconditioned update."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightrail.errors import CompositionError
from lightrail.generation import Grid, Predict, Sampler, SamplerWrapper, State
from lightrail.options import between, one_of, positive
from lightrail.traits import Traits

__all__ = ["LML", "damped"]


def damped(n: Tensor, m: Tensor, damping: float) -> Tensor:
    """d = n − m ⟨m, n⟩/(λ + |m|²), then as long as n is: n with what lies along m taken back, one sample at a time.

    For m = n all of d is along n, so that the result is n.

    Args:
        n: The update, ``[B, …]``.
        m: Its running mean.
        damping: λ, in units of |n|².
    """
    flat, mean = n.flatten(1), m.flatten(1)
    share = (flat * mean).sum(1, keepdim=True) / (damping + mean.square().sum(1, keepdim=True))
    d = flat - share * mean
    length = torch.linalg.vector_norm(d, dim=1, keepdim=True)
    scale = torch.linalg.vector_norm(flat, dim=1, keepdim=True) / length
    return torch.where(length > 0, d * scale, flat).view_as(n)


class LML(SamplerWrapper):
    """Turns each update away from the mean of the updates so far, at the same length. Experimental.

    x_t = a x_s + d |n|/|d|,  d = n − m ⟨m, n⟩/(λ + |m|²),  m = κ m_before + (1 − κ) n,
    for the sampler's own x_t = a x_s + n with a = σ_t/σ_s (or α_t/α_s)

    It stands for a Levenberg–Marquardt step with a Hessian of rank one.

    Args:
        sampler: The one to put it around.
        kappa: κ, in [0, 1): how slowly the mean m follows.
        damping: λ, above 0, in units of |n|²; the larger, the less is changed.
        linear: Which linear part is taken out: ``data`` (σ_t/σ_s, n a sum of data predictions, as for DDIM and
            DPM-Solver++) or ``noise`` (α_t/α_s, n a sum of noise predictions, as for DPM-Solver).

    Raises:
        ConfigurationError: An option is out of range.
        CompositionError: The states are in half precision, in which d is nothing but rounding.

    Deviations:
        With κ = 0, as the published scripts run it, m = n and the method is the identity in exact arithmetic: the
        length that the damping takes is given back. What the published code then does is rounding error, 1 to 30% of
        an update in single precision at λ = 0.001 and all of it in half precision. Here κ = 0 leaves the sampler
        exactly as it is, and otherwise d is worked out in double precision. With κ = 0.2 and so small a λ, d is
        nearly at right angles to n. No gain is claimed. Noise that a stochastic sampler draws counts as part of n.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail_generation.samplers.ddim import DDIM
        >>> from lightrail_generation.time_grids.uniform import Uniform
        >>> mixture, sampler = GaussianMixture(), LML(DDIM(steps=10), kappa=0.2, damping=10.0)
        >>> sample(mixture, sampler, sampler.grid(mixture.path, Uniform()), range(4)).evaluations
        10

    Reference:
        F. Wang et al. (2025), Unleashing High-Quality Image Generation in Diffusion Sampling Using Second-Order
        Levenberg-Marquardt-Langevin, arXiv 2505.24222.
    """

    traits: ClassVar[Traits] = Traits(
        rule="d = n − m ⟨m, n⟩/(λ + |m|²), at the length of n",
        paper="F. Wang et al., 2025, Unleashing High-Quality Image Generation in Diffusion Sampling Using Second-Order "
        "Levenberg-Marquardt-Langevin, arXiv 2505.24222",
        example={"kappa": 0.2, "damping": 100.0},
    )

    def __init__(self, sampler: Sampler, kappa: float = 0.0, damping: float = 0.001, linear: str = "data") -> None:
        super().__init__(sampler)
        between(0, 1, kappa=kappa)
        positive(damping=damping)
        one_of(("data", "noise"), linear=linear)
        self.kappa = kappa
        self.damping = damping
        self.linear = linear

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        if state.x.dtype in (torch.float16, torch.bfloat16):
            raise CompositionError(
                "lml cannot work on states in half precision",
                found=f"states of type {state.x.dtype}",
                allowed="float32 or float64",
                remedy="Generate in single precision, or leave sampler_wrapper=lml out.",
            )
        after = self.sampler.step(state, predict, grid)
        if not self.kappa:
            return after
        here, there = grid[state.index], grid[state.index + 1]
        a = there.sigma / here.sigma if self.linear == "data" else there.alpha / here.alpha
        kept = a * state.x.double()
        n = after.x.double() - kept
        mean = state.memory.get("lml_mean")
        m = n if mean is None else torch.lerp(n, mean, self.kappa)
        x = after.x if mean is None else (kept + damped(n, m, self.damping)).to(after.x.dtype)
        return State(x, after.noise, after.index, after.history, {**after.memory, "lml_mean": m})
