"""Denoising Markov chain Monte Carlo."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import Grid, Level, Noise, NoisePath, Predict, Sampler, State
from lightrail.options import at_least, one_of, positive
from lightrail.traits import Traits

if TYPE_CHECKING:
    from lightrail.generation import Denoiser

__all__ = ["DMCMC", "drawn_level", "langevin", "log_rhos_at", "places_of", "residual_level"]

LONGEST = 0.25  # of a move, as h = η/(2ρ²): what it gets wrong of a Gaussian's variance stays below a tenth


def _rows(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def langevin(y: Tensor, data: Tensor, rho: Tensor, eta: float, z: Tensor) -> tuple[Tensor, Tensor]:
    """y' = D + e^{−h} (y − D) + ρ √(1 − e^{−2h}) z with h = η/(2ρ²) ≤ 1/4: y + (η/2) s + √η z for small η.

    Returns:
        y', and the standard deviation of its noise, ``[B]``.
    """
    h = (eta / (2 * rho**2)).clamp(max=LONGEST)
    spread = rho * (-torch.expm1(-2 * h)).sqrt()
    return data + _rows((-h).exp(), y) * (y - data) + _rows(spread, y) * z, spread


def drawn_level(log_densities: Tensor, uniform: Tensor) -> Tensor:
    """A draw of the level's number from p(ρ | y) ∝ p_ρ(y), ``[B]``.

    Args:
        log_densities: log p_ρ(y), ``[B, levels]``.
        uniform: Numbers in [0, 1), ``[B]``.
    """
    cumulative = log_densities.double().softmax(1).cumsum(1)
    return (cumulative < uniform.double()[:, None]).sum(1).clamp(max=log_densities.shape[1] - 1)


def residual_level(y: Tensor, data: Tensor, before: Tensor, z: Tensor, spread: Tensor) -> Tensor:
    """ρ̂ = |y − D|/√(n − div D), where ρ ∂ log p_ρ(y)/∂ρ = |y − D|²/ρ² − (n − div D) is 0.

    By Stein's lemma z·(D(y) − D(y_before))/s is div D on average for the noise s z that y was reached with.

    Args:
        y: States ``[B, …]`` of a chain in x/α.
        data: What the network sees there.
        before: What it saw before the last move.
        z: The noise that the move added.
        spread: s, its standard deviation ``[B]``.
    """
    n = y[0].numel()
    squares = (y - data).flatten(1).double().square().sum(1)
    divergence = (z.flatten(1).double() * (data - before).flatten(1).double()).sum(1) / spread.double()
    # An exact D has a divergence between 0 and n; what is left of n keeps the estimate finite.
    return (squares / (n - divergence.clamp(0, 0.98 * n))).sqrt()


def places_of(log_rhos: Tensor, knots: Tensor) -> Tensor:
    """Where levels lie between the falling knots of a grid, ``[B]``; whole places are the knots."""
    low = (torch.searchsorted(-knots, -log_rhos, right=True) - 1).clamp(0, len(knots) - 2)
    return low + (knots[low] - log_rhos) / (knots[low] - knots[low + 1])


def log_rhos_at(places: Tensor, knots: Tensor) -> Tensor:
    """The levels at places between the knots, ``[B]``."""
    low = places.floor().long().clamp(0, len(knots) - 2)
    share = places - low
    return knots[low] * (1 - share) + knots[low + 1] * share


class DMCMC(Sampler):
    """Walks close to the data on a chain over (x, ρ), and runs the reverse equation only from there.

    y ← y + (η/2) s(y, ρ) + √η z,  ρ ← p(ρ | y),  for y = x/α and ρ = σ/α;  then dy/dρ = ε from (y, ρ) of least ρ

    The chain begins at a sample of the plain integrator, with noise of level ``beginning`` on it. The reverse equation
    is solved by Heun's method (Euler's in the last step), each sample from its own level, with as many steps, spaced
    as the time grid is from there on.

    Args:
        steps: Steps from a level to the data, two evaluations each, one in the last, at least 2.
        transitions: Moves of the chain, of which the state of least noise is taken, at least 1; one evaluation each.
        burn_in: Moves before them, at least 0.
        eta: η, the size of a move in squared units of the data, above 0.
        beginning: The ρ that the chain begins at, above 0.
        classifier: What tells the level: ``residual``, which any model has, or ``posterior``, a draw from the exact
            p(ρ | y), for a model with a ``log_density``.
        rho_min: The least ρ on the chain; ``None`` for that of the grid's last noisy level.
        rho_max: The greatest; ``None`` for that of the grid's first level.
        levels: How many levels, evenly spaced in log ρ, ``posterior`` knows.

    Raises:
        ConfigurationError: An option is out of range.
        CompositionError: ``posterior`` is asked of a model without a density.

    Deviations:
        The paper trains a network to tell the level and takes the most likely one; nobody has such a network for a
        given model. ``residual`` takes one step toward that level from what the denoiser itself says,
        |y − D|/√(n − div D), with the divergence from the noise of the last move: good for many dimensions, rough for
        few. A move holds D and solves for y exactly, which is the paper's rule where η ≪ ρ², and is cut to
        η = ρ²/2 where it would be longer: the paper's rule with its η = 0.8 is unstable below ρ = 0.45 and widens the
        chain's distribution above. The paper carries one chain on from sample to sample; here each sample has a chain
        of its own, so that it does not depend on others, and pays for the plain sample and the burn-in. Taking the
        state of least noise, as the paper does, favours states that look noisier than their level: in few dimensions
        the samples spread too far, unless ``transitions=1``. The paper is for α = 1; by y = x/α any path will do.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail_generation.time_grids.karras import Karras
        >>> mixture, sampler = GaussianMixture(path="edm"), DMCMC(steps=5, transitions=4, burn_in=2)
        >>> sample(mixture, sampler, sampler.grid(mixture.path, Karras()), range(4)).evaluations
        24

    Reference:
        B. Kim and J. C. Ye (2023), Denoising MCMC for Accelerating Diffusion-Based Generative Models, arXiv
        2209.14593, Denoising Langevin Gibbs.
    """

    traits: ClassVar[Traits] = Traits(
        rule="y ← y + (η/2) s(y, ρ) + √η z, ρ ← p(ρ | y); then dy/dρ = ε",
        paper="B. Kim, J. C. Ye, 2023, Denoising MCMC for Accelerating Diffusion-Based Generative Models, arXiv "
        "2209.14593",
        is_stochastic=True,
        descends=False,
        needs_predictions=("data",),
        example={"steps": 5, "transitions": 4, "burn_in": 2},
    )
    grid_name = "karras"
    minimum_steps = 2

    def __init__(
        self,
        steps: int = 10,
        transitions: int = 10,
        burn_in: int = 20,
        eta: float = 0.8,
        beginning: float = 0.5,
        classifier: str = "residual",
        rho_min: float | None = None,
        rho_max: float | None = None,
        levels: int = 1000,
    ) -> None:
        super().__init__(steps)
        at_least(1, transitions=transitions)
        at_least(0, burn_in=burn_in)
        at_least(2, levels=levels)
        positive(eta=eta, beginning=beginning)
        one_of(("residual", "posterior"), classifier=classifier)
        positive(rho_min=1.0 if rho_min is None else rho_min, rho_max=1.0 if rho_max is None else rho_max)
        self.transitions = transitions
        self.burn_in = burn_in
        self.eta = eta
        self.beginning = beginning
        self.classifier = classifier
        self.rho_min = rho_min
        self.rho_max = rho_max
        self.levels = levels
        self._log_density: Callable[[Tensor, float], Tensor] | None = None

    def prepare(self, denoiser: Denoiser) -> None:
        """Takes the model's density, where the levels are to be drawn by it."""
        density = getattr(denoiser, "log_density", None)
        if self.classifier == "posterior" and density is None:
            raise CompositionError(
                f"{type(denoiser).__name__} has no density to draw levels from",
                found="sampler.classifier=posterior",
                allowed="a model with log_density(x, t), such as denoiser=gaussian_mixture",
                remedy="Set sampler.classifier=residual.",
            )
        self._log_density = density

    def step(self, state: State, predict: Predict, grid: Grid) -> State:
        knots = self._knots(grid).to(state.x.device)
        wide = torch.promote_types(state.x.dtype, torch.float32)
        y = state.x.to(wide)
        if state.index:
            places = state.memory["places"]
            y = y / self._level(log_rhos_at(self._moved(places, state.index, knots), knots), y, grid.path).alpha
        else:
            y, log_rhos = self._chain(y / grid[0].alpha, state, predict, grid, knots)
            places = places_of(log_rhos, knots)
        y, alpha = self._descended(y.to(wide), places, state.index, predict, grid, knots, state.x.dtype)
        return state.next((alpha * y).to(state.x.dtype), places=places)

    def _chain(self, y: Tensor, state: State, predict: Predict, grid: Grid, knots: Tensor) -> tuple[Tensor, Tensor]:
        """The state of least noise among the last of the chain, with its log ρ."""
        dtype = state.x.dtype
        low, high = self._bounds(knots)
        top = torch.zeros(len(y), dtype=torch.float64, device=y.device)
        for index in range(grid.steps):
            y, _ = self._descended(y, top, index, predict, grid, knots, dtype)
        log_rhos = torch.full_like(top, math.log(self.beginning)).clamp(low, high)
        data, z, spread = y, state.normal(0).to(y.dtype), log_rhos.exp()
        y = y + _rows(spread, y).to(y.dtype) * z
        best, least = y, torch.full_like(top, math.inf)
        for move in range(self.burn_in + self.transitions):
            before, data = data, self._data(y, log_rhos, predict, grid.path, dtype)
            if self.classifier == "residual":
                log_rhos = residual_level(y, data, before, z, spread).log().clamp(low, high)
            if move >= self.burn_in:
                is_less = log_rhos < least
                best, least = torch.where(_rows(is_less, y), y, best), torch.where(is_less, log_rhos, least)
            z = state.normal(move + 1).to(y.dtype)
            moved, spread = langevin(y, data, log_rhos.exp(), self.eta, z)
            y = moved.to(y.dtype)
            if self.classifier == "posterior":
                log_rhos = self._drawn(y, state.noise, move, grid.path, low, high)
        return best, least

    def _descended(
        self, y: Tensor, places: Tensor, index: int, predict: Predict, grid: Grid, knots: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | float]:
        """One step of Heun's method in ρ, with the α that it ends at; of Euler's, which gives D, where it ends at 0."""
        here = log_rhos_at(self._moved(places, index, knots), knots)
        data = self._data(y, here, predict, grid.path, dtype)
        if grid[index + 1].is_clean:
            return data, 1.0
        there = log_rhos_at(self._moved(places, index + 1, knots), knots)
        ratio = _rows((there - here).exp(), y).to(y.dtype)
        ahead = data + ratio * (y - data)
        slope, next_slope = y - data, (ahead - self._data(ahead, there, predict, grid.path, dtype)) / ratio
        alpha = self._level(there, y, grid.path).alpha
        return y + (ratio - 1) * (slope + next_slope) / 2, alpha

    @staticmethod
    def _moved(places: Tensor, index: int, knots: Tensor) -> Tensor:
        last = len(knots) - 1
        return places + (last - places) * (index / last)

    @staticmethod
    def _level(log_rhos: Tensor, y: Tensor, path: NoisePath) -> Level:
        return path.levels(path.t_of_lam(-log_rhos), y.ndim)

    def _data(self, y: Tensor, log_rhos: Tensor, predict: Predict, path: NoisePath, dtype: torch.dtype) -> Tensor:
        level = self._level(log_rhos, y, path)
        return predict((level.alpha * y).to(dtype), level).data.to(y.dtype)

    def _drawn(self, y: Tensor, noise: Noise, draw: int, path: NoisePath, low: float, high: float) -> Tensor:
        if self._log_density is None:
            raise CompositionError(
                "dmcmc was not shown the model whose density it draws levels from",
                found="sampler.classifier=posterior",
                allowed="a sampler whose prepare(denoiser) was called",
                remedy="Call sampler.prepare(denoiser) before sampling.",
            )
        log_rhos = torch.linspace(high, low, self.levels, dtype=torch.float64, device=y.device)
        times = path.t_of_lam(-log_rhos)
        alphas = path.alpha(times)
        logs = [
            self._log_density(alpha * y, float(t)) + y[0].numel() * alpha.log()  # the density of x/α
            for t, alpha in zip(times, alphas, strict=True)
        ]
        return log_rhos[drawn_level(torch.stack(logs, 1), noise.uniform(0, draw))]

    @staticmethod
    def _knots(grid: Grid) -> Tensor:
        """log ρ of the grid's noisy levels."""
        return torch.tensor([-level.lam for level in grid if not level.is_clean], dtype=torch.float64)

    def _bounds(self, knots: Tensor) -> tuple[float, float]:
        low, high = float(knots[-1]), float(knots[0])
        least = low if self.rho_min is None else max(low, math.log(self.rho_min))
        most = high if self.rho_max is None else min(high, math.log(self.rho_max))
        if least > most:
            raise ConfigurationError(
                "the levels of the chain leave the time grid",
                found=f"rho_min={self.rho_min}, rho_max={self.rho_max}",
                allowed=f"rho_min < rho_max between {math.exp(low):.4g} and {math.exp(high):.4g}",
                remedy="Set sampler.rho_min and sampler.rho_max within that range.",
            )
        return least, most

    def evaluations(self, grid: Grid) -> int:
        descent = 2 * grid.steps - grid[-1].is_clean
        return 2 * descent + self.burn_in + self.transitions + grid.denoises_last
