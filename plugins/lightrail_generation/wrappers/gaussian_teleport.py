"""Gaussian teleportation: the noisiest part of the flow in one jump."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from lightrail.errors import CompositionError
from lightrail.generation import (
    Denoiser,
    Grid,
    Level,
    Noise,
    NoisePath,
    Predict,
    Sampler,
    SamplerWrapper,
    State,
    TimeGrid,
)
from lightrail.options import at_least, positive
from lightrail.traits import Traits

__all__ = ["GaussianTeleport", "principal", "teleport"]


def principal(covariance: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The largest eigenvalues ``[k]`` with their directions ``[n, k]``, and the mean of the other eigenvalues."""
    values, directions = torch.linalg.eigh(covariance.double())
    values = values.clamp(min=0)
    kept = min(rank, len(values))
    rest = float(values[: len(values) - kept].mean()) if kept < len(values) else 0.0
    return values[len(values) - kept :], directions[:, len(values) - kept :], rest


def teleport(
    x: Tensor, mean: Tensor, values: Tensor, directions: Tensor, rest: float, here: Level, there: Level
) -> Tensor:
    """The exact flow of Gaussian data: each principal direction is scaled by its own standard deviation's ratio.

    x_t = α_t m + Σ_k √((σ_t² + α_t² l_k)/(σ_s² + α_s² l_k)) u_k u_kᵀ (x_s − α_s m)

    Args:
        x: States ``[B, …]`` at ``here``.
        mean: m, ``[n]``.
        values: l, the data's variances along the directions, ``[k]``.
        directions: u, orthonormal, ``[n, k]``.
        rest: The variance along all other directions.
        here: Where they are; α = 0 is allowed.
        there: Where they go.
    """

    def ratio(variances: Tensor | float) -> Tensor | float:
        return ((there.sigma**2 + there.alpha**2 * variances) / (here.sigma**2 + here.alpha**2 * variances)) ** 0.5

    offsets = x.flatten(1).double() - here.alpha * mean
    along = offsets @ directions
    others = ratio(rest)
    moved = others * offsets + (along * (ratio(values) - others)) @ directions.T + there.alpha * mean
    return moved.view_as(x).to(x.dtype)


class GaussianTeleport(SamplerWrapper):
    """Jumps from the noise to a level at which the data still look Gaussian, by a formula, and samples on from there.

    x_t = α_t m + Σ_k √((σ_t² + α_t² l_k)/(σ_s² + α_s² l_k)) u_k u_kᵀ (x_s − α_s m),
    with m and Σ_k l_k u_k u_kᵀ the mean and covariance of the data

    At high noise a network's score is nearly that of such a Gaussian. The jump costs no evaluation, and all the
    sampler's steps go to what is left. It is one more step of the grid, the first.

    Args:
        sampler: The one that goes on.
        denoiser: The model, whose data's moments are taken; given by the platform.
        rho: The ρ = σ/α to jump to, above 0: where the data's spread is small beside it. At or above the level that
            sampling starts from, nothing is done.
        rank: How many principal directions are kept, at least 1; along all others the mean of their variances is
            taken.

    Raises:
        ConfigurationError: An option is out of range.
        CompositionError: The model does not know its data, or the time grid cannot start at ``rho``.

    Deviations:
        The paper takes the data to have no variance outside the kept directions; here it is that of the remainder.
        The moments are those of all the data: under a label or guidance the jump must be shorter.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail_generation.samplers.ddim import DDIM
        >>> from lightrail_generation.time_grids.uniform_lambda import UniformLambda
        >>> mixture = GaussianMixture()
        >>> sampler = GaussianTeleport(DDIM(steps=10), mixture, rho=6.0)
        >>> grid = sampler.grid(mixture.path, UniformLambda())
        >>> grid.steps, sample(mixture, sampler, grid, range(4)).evaluations
        (11, 10)

    Reference:
        B. Wang and J. J. Vastola (2024), The Unreasonable Effectiveness of Gaussian Score Approximation for Diffusion
        Models and its Applications, arXiv 2412.09726, analytical teleportation.
    """

    traits: ClassVar[Traits] = Traits(
        rule="x_t = α_t m + Σ √((σ_t² + α_t² l_k)/(σ_s² + α_s² l_k)) u_k u_kᵀ (x_s − α_s m)",
        paper="B. Wang, J. J. Vastola, 2024, The Unreasonable Effectiveness of Gaussian Score Approximation for "
        "Diffusion Models and its Applications, arXiv 2412.09726",
        example={"rho": 10.0},
    )

    def __init__(self, sampler: Sampler, denoiser: Denoiser, rho: float = 10.0, rank: int = 256) -> None:
        super().__init__(sampler)
        positive(rho=rho)
        at_least(1, rank=rank)
        self.denoiser = denoiser
        self.rho = rho
        self.rank = rank
        self._fitted: tuple[Tensor, Tensor, Tensor, float] | None = None

    @property
    def gaussian(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """The mean, the variances, their directions and the variance along all others; worked out once."""
        if self._fitted is None:
            mean, covariance = self.denoiser.moments()
            self._fitted = (mean.double(), *principal(covariance, self.rank))
        return self._fitted

    def prepare(self, denoiser: Denoiser) -> None:
        """Fits the Gaussian, so that a model without moments is refused before anything is sampled."""
        self.denoiser, self._fitted = denoiser, None
        _ = self.gaussian
        super().prepare(denoiser)

    def grid(self, path: NoisePath, times: TimeGrid) -> Grid:
        plain = self.sampler.grid(path, times)
        if not plain[0].rho > self.rho:
            return plain
        shorter = copy.copy(times)
        shorter.start = float(path.t_of_lam(-torch.tensor(self.rho, dtype=torch.float64).log()))
        rest = self.sampler.grid(path, shorter)
        if not rest[0].rho < plain[0].rho:
            raise CompositionError(
                "gaussian_teleport needs a time grid that can start later",
                found=f"{type(times).__name__}, which starts at ρ={rest[0].rho:.4g} wherever it is asked to",
                allowed="a time grid that is spaced anew from time_grid.start on, such as uniform_lambda or karras",
                remedy="Choose another time_grid, or leave sampler_wrapper=gaussian_teleport out.",
            )
        return Grid(path, (plain[0], *rest.levels), rest.denoises_last)

    def start(self, x: Tensor, noise: Noise, grid: Grid) -> State:
        return State(x, noise) if self._jumps(grid) else self.sampler.start(x, noise, grid)

    def _jumps(self, grid: Grid) -> bool:
        return grid[0].rho > self.rho * (1 + 1e-9)

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        if not self._jumps(grid):
            return self.sampler.step(state, predict, grid)
        if state.index == 0:
            return self._jumped(state, grid)
        after = self.sampler.step(replace(state, index=state.index - 1), predict, _rest(grid))
        return replace(after, index=after.index + 1)

    def _jumped(self, state: State, grid: Grid) -> State:
        *tensors, rest = self.gaussian
        mean, values, directions = (each.to(state.x.device) for each in tensors)
        x = teleport(state.x, mean, values, directions, rest, grid[0], grid[1])
        return replace(self.sampler.start(x, state.noise, _rest(grid)), index=1)

    def evaluations(self, grid: Grid) -> int | None:
        return self.sampler.evaluations(_rest(grid) if self._jumps(grid) else grid)


def _rest(grid: Grid) -> Grid:
    return Grid(grid.path, grid.levels[1:], grid.denoises_last)
