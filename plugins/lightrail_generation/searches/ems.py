"""EMS: the statistics of a model that DPM-Solver-v3 reads."""

from __future__ import annotations

import copy
import math
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import Evaluator, Grid, Level, Noise
from lightrail.generation.fine_solution import fine_solution
from lightrail.generation.search import Artefact, Report, Search, SearchProblem, silent
from lightrail.options import at_least, one_of
from lightrail.traits import Traits
from lightrail_generation.samplers.dpm_solver_v3 import DPMSolverV3
from lightrail_generation.samplers.model_statistics import ModelStatistics

__all__ = ["EMS", "regression", "statistics_of"]


def regression(f: Tensor, rate: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(s, b) that minimise E (f' − s f − b)²: s = Cov(f, f')/Var f, b = E f' − s E f.

    Args:
        f: Values.
        rate: f' at each.
        dims: Over which the expectation is taken.

    Example:
        >>> f = torch.arange(4.0)
        >>> s, b = regression(f, 2 * f + 1, (0,))
        >>> float(s), float(b)
        (2.0, 1.0)
    """
    mean, mean_rate = f.mean(dims), rate.mean(dims)
    variance = f.square().mean(dims) - mean.square()
    covariance = (f * rate).mean(dims) - mean * mean_rate
    # Where f does not vary there is nothing to follow.
    is_flat = variance <= 1e-12 * f.square().mean(dims)
    s = torch.where(is_flat, 0.0, covariance / torch.where(is_flat, 1.0, variance))
    return s, mean_rate - s * mean


def statistics_of(
    scaled: Tensor, data: Tensor, slope: Tensor, lam: Tensor, per_element: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """l, s and b over λ, from solutions of the probability flow.

    l = E diag(σ ∂ε/∂x) = 1 − α E diag(∂D/∂x) leaves the remainder f = (1 − l) x/α − D least of the state; s and b
    follow df/dλ along the solutions.

    Args:
        scaled: x/α at each λ, ``[M, N, …]``.
        data: D there.
        slope: α diag(∂D/∂x), or an estimate of it, there.
        lam: Rising, ``[M]``.
        per_element: Whether each element has its own, or all of them share.

    Returns:
        ``[M]`` each, or ``[M, *shape]``.
    """
    dims = (0,) if per_element else tuple(range(data.ndim - 1))
    l = 1 - slope.mean([d + 1 for d in dims])  # noqa: E741
    spread = l.reshape(*l.shape[:1], 1, *(l.shape[1:] or [1] * (data.ndim - 2)))
    pairs = []
    for index in range(len(lam)):
        first = min(max(index - 1, 0), len(lam) - 3)
        near = slice(first, first + 3)
        f = (1 - spread[near]) * scaled[near].double() - data[near].double()
        (rate,) = torch.gradient(f, spacing=(lam[near],), dim=0, edge_order=2)
        pairs.append(regression(f[index - first], rate[index - first], dims))
    return l, torch.stack([s for s, _ in pairs]), torch.stack([b for _, b in pairs])


class EMS(Search):
    """Measures l, s and b of a model over λ, along fine solutions of its probability flow.

    l = E diag(σ ∂ε/∂x), f = (σ ε − l x)/α, and s and b minimise E (df/dλ − s f − b)².

    Args:
        points: Values of λ, at equal distances, at least 3.
        samples: Solutions, at least 2; the more, the less noise, for ``per=element`` hundreds.
        per: ``element``, statistics for each element of a state, or ``scalar``, shared by all.
        jacobian: ``hutchinson``, the diagonal estimated with random signs at one backward pass each, or ``exact``, at
            one for every element of a state.
        probes: Random signs for each sample, at least 1.
        held_out: Other samples, for the scores in the table, at least 2.

    Raises:
        ConfigurationError: An option is out of range.
        CompositionError: The model cannot be differentiated, or tells no data.

    Deviations:
        df/dλ is taken by differences along the solutions where the paper differentiates the network; they agree as
        ``points`` grows. The states are those of solutions.

    Example:
        >>> EMS(points=60).per
        'element'

    Reference:
        K. Zheng, C. Lu, J. Chen and J. Zhu (2023), DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model
        Statistics, arXiv 2310.13268, section 3 and appendix C.1.1.
    """

    traits: ClassVar[Traits] = Traits(
        rule="l = E diag(σ ∂ε/∂x); s, b = argmin E (df/dλ − s f − b)²",
        paper="K. Zheng, C. Lu, J. Chen, J. Zhu, 2023, DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical "
        "Model Statistics, arXiv 2310.13268",
        needs_predictions=("data",),
        example={"points": 12, "samples": 8, "held_out": 8},
    )

    replaces: ClassVar[tuple[str, ...]] = ("sampler",)

    def __init__(
        self,
        points: int = 120,
        samples: int = 256,
        per: str = "element",
        jacobian: str = "hutchinson",
        probes: int = 1,
        held_out: int = 256,
    ) -> None:
        at_least(3, points=points)
        at_least(2, samples=samples, held_out=held_out)
        at_least(1, probes=probes)
        one_of(("scalar", "element"), per=per)
        one_of(("exact", "hutchinson"), jacobian=jacobian)
        self.points = points
        self.samples = samples
        self.per = per
        self.jacobian = jacobian
        self.probes = probes
        self.held_out = held_out

    def search(self, problem: SearchProblem, report: Report = silent) -> Artefact:
        _refuse_without_data(problem)
        levels = self._levels(problem.grid)
        batches = [self._followed(problem, batch, levels) for batch in _batches(self.samples, problem.batch_size)]
        scaled, data = (torch.cat(parts, dim=1) for parts in zip(*batches, strict=True))
        slopes = []
        for index, level in enumerate(levels):
            slopes.append(self._slope(problem, scaled[index] * level.alpha, level))
            report(index + 1, len(levels))
        lam = torch.tensor([level.lam for level in levels], dtype=torch.float64)
        found = statistics_of(scaled, data, torch.stack(slopes), lam, self.per == "element")
        held_out = range(self.samples, self.samples + self.held_out)
        solver = _with_statistics(problem, ModelStatistics(lam.numpy(), *(each.numpy() for each in found)))
        after = problem.scores(held_out, sampler=solver)
        values = {"lam": lam, **dict(zip(("l", "s", "b"), found, strict=True)), "solver": solver.settings()}
        return Artefact("ems", problem.key(), values, problem.scores(held_out), after)

    def _levels(self, grid: Grid) -> list[Level]:
        path = grid.path
        first = grid[0] if math.isfinite(grid[0].lam) else path.level(path.t_finite)
        last = path.level(path.t_min) if grid[-1].is_clean else grid[-1]
        if not last.lam > first.lam:
            raise ConfigurationError(
                "there is nothing between the ends of the time grid",
                found=f"from t={first.t:g} to t={last.t:g}",
                allowed="a grid from noise to data",
                remedy="Leave time_grid.start out.",
            )
        inner = np.linspace(first.lam, last.lam, self.points)[1:-1]
        return [first, *(path.level_at_lam(float(lam)) for lam in inner), last]

    @torch.no_grad()
    def _followed(self, problem: SearchProblem, indices: list[int], levels: list[Level]) -> tuple[Tensor, Tensor]:
        """x/α and D at each level, ``[M, B, …]``, on the CPU."""
        grid = Grid(problem.grid.path, tuple(levels))
        predict = problem.predictor(indices, grid)
        states = fine_solution(predict, problem.starts(indices, grid), grid.path, levels, len(levels))
        data = torch.stack([predict(x, level).data.cpu() for x, level in zip(states, levels, strict=True)])
        scaled = torch.stack([(x / level.alpha).cpu() for x, level in zip(states, levels, strict=True)])
        return scaled, data

    def _slope(self, problem: SearchProblem, x: Tensor, level: Level) -> Tensor:
        """α diag(∂D/∂x) of each sample, ``[N, …]``, or an estimate of it without bias."""
        found = []
        for batch in _batches(len(x), problem.batch_size):
            state = x[batch].to(problem.denoiser.device, problem.denoiser.dtype)
            predict = problem.predictor(batch)
            found.append(self._diagonal(predict, state, level, problem.noise(batch)).double().cpu() * level.alpha)
        return torch.cat(found)

    def _diagonal(self, predict: Evaluator, x: Tensor, level: Level, noise: Noise) -> Tensor:
        with torch.enable_grad():
            state = x.detach().requires_grad_()
            data = predict(state, level).data
            if not data.requires_grad:
                raise _opaque(predict)
            if self.jacobian == "exact":
                flat, rows = data.flatten(1), []
                for element in range(flat.shape[1]):
                    (row,) = torch.autograd.grad(flat[:, element].sum(), state, retain_graph=True)
                    rows.append(row.flatten(1)[:, element])
                return torch.stack(rows, dim=1).view_as(x)
            total = torch.zeros_like(x)
            for probe in range(self.probes):
                # The same signs at every level: noise in l that jumped between levels would swamp df/dλ.
                signs = torch.where(noise.normal(0, probe) < 0, -1.0, 1.0).to(x.dtype)
                (row,) = torch.autograd.grad((data * signs).sum(), state, retain_graph=True)
                total += signs * row
            return total / self.probes

    def words(self, artefact: Artefact, path: str) -> list[str]:
        settings = artefact.values["solver"].items()
        options = [f"sampler.{name}={str(value).lower()}" for name, value in settings]
        return ["+sampler=dpm_solver_v3", *options, f"sampler.statistics={path}"]


def _batches(count: int, size: int) -> list[list[int]]:
    return [list(range(first, min(first + size, count))) for first in range(0, count, size)]


def _with_statistics(problem: SearchProblem, statistics: ModelStatistics) -> DPMSolverV3:
    held = problem.sampler
    solver = copy.copy(held) if isinstance(held, DPMSolverV3) else DPMSolverV3(steps=problem.grid.steps)
    solver.statistics = statistics
    return solver


def _refuse_without_data(problem: SearchProblem) -> None:
    if "data" not in problem.denoiser.gives:
        raise CompositionError(
            "the statistics are those of a data or noise prediction, which this model cannot give",
            found=f"a model that gives {', '.join(problem.denoiser.gives)}",
            allowed="a model that gives data",
            remedy="Choose another search: autodiffusion fits the times of any solver.",
        )


def _opaque(predict: Evaluator) -> CompositionError:
    return CompositionError(
        f"{type(predict.denoiser).__name__} cannot be differentiated",
        found="a prediction without a gradient",
        allowed="a model that autograd can follow",
        remedy="Let its output() run without torch.no_grad(), or choose another search.",
    )
