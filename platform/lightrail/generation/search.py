"""The contract of an offline search: it fits a schedule or statistics to one model, for later runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from lightrail.errors import CompositionError
from lightrail.generation.artefact import Artefact, path_key
from lightrail.generation.denoiser import Condition, Denoiser
from lightrail.generation.evaluator import Evaluator
from lightrail.generation.fine_solution import fine_solution
from lightrail.generation.guidance import Guidance
from lightrail.generation.noise import Noise
from lightrail.generation.sampler import Sampler
from lightrail.generation.sampling import sample
from lightrail.generation.time_grid import Grid, TimeGrid
from lightrail.traits import Traits, traits_of

__all__ = ["Artefact", "Report", "Search", "SearchProblem", "sliced_wasserstein"]

PROJECTIONS = 128


class Report(Protocol):
    """Is told how far a search is."""

    def __call__(self, done: int, total: int, score: float | None = None) -> None:
        """``done`` of ``total`` trials, the best score so far."""
        ...


def silent(done: int, total: int, score: float | None = None) -> None:
    """A report to nobody."""


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = PROJECTIONS, seed: int = 0) -> float:
    """The sliced 2-Wasserstein distance of two sets of points, over random directions that the seed fixes.

    Args:
        a: ``[N, …]``.
        b: ``[M, …]``; of two sizes, the quantiles are compared.
        projections: Directions.
        seed: Of the directions.

    Example:
        >>> points = torch.randn(50, 3)
        >>> round(sliced_wasserstein(points, points + 1), 2) > 0, round(sliced_wasserstein(points, points.flip(0)), 9)
        (True, 0.0)
    """
    a, b = a.detach().double().flatten(1).cpu(), b.detach().double().flatten(1).cpu()
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(a.shape[1], projections, generator=generator, dtype=torch.float64)
    directions /= directions.norm(dim=0)
    first, second = (a @ directions).sort(0).values, (b @ directions).sort(0).values
    if len(first) != len(second):
        count = min(len(first), len(second))
        shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        first, second = torch.quantile(first, shares, dim=0), torch.quantile(second, shares, dim=0)
    return float((first - second).square().mean().sqrt())


@dataclass(frozen=True)
class SearchProblem:
    """A model, a solver and its times: what a search fits to, with the samples that it scores on.

    The same indices begin from the same noise whatever is tried, so that trials differ by what was tried alone.

    Args:
        denoiser: The model.
        sampler: The solver, inside its wrappers.
        time_grid: The spacing that it begins with.
        grid: The levels of that.
        seed: Of all noise.
        condition_of: What steers the samples of these indices.
        guidance: What else does, in order.
        data: Real samples as states, ``[N, *shape]``, where they are known.
        described: What else the result is for, kept in its key: ``sampler`` (its name), ``options``, ``condition``.
        evaluations: How often the network is asked along one fine reference solution.
        batch_size: Samples at a time.
    """

    denoiser: Denoiser
    sampler: Sampler
    time_grid: TimeGrid
    grid: Grid
    seed: int = 0
    condition_of: Callable[[Sequence[int]], Condition | None] = lambda indices: None
    guidance: tuple[Guidance, ...] = ()
    data: Tensor | None = None
    described: Mapping[str, Any] = field(default_factory=dict)
    evaluations: int = 200
    batch_size: int = 256
    _solutions: dict[Any, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def key(self) -> dict[str, Any]:
        """What a result is for; see :class:`Artefact`."""
        name = type(self.sampler).__name__
        known = {
            "model": self.denoiser.fingerprint(),
            "path": path_key(self.denoiser.path),
            "sampler": name,
            "options": {},
            "steps": self.sampler.steps,
            "grid": [level.t for level in self.grid],
            "condition": {},
        }
        return {**known, **self.described}

    def noise(self, indices: Sequence[int]) -> Noise:
        """The random numbers of these samples."""
        model = self.denoiser
        return Noise(self.seed, indices, model.shape, model.dtype, model.device)

    def predictor(self, indices: Sequence[int], grid: Grid | None = None) -> Evaluator:
        """The network as these samples ask it, under their condition and guidance."""
        condition = self.condition_of(indices)
        return Evaluator(self.denoiser, condition, self.guidance, grid or self.grid, self.noise(indices))

    def starts(self, indices: Sequence[int], grid: Grid | None = None) -> Tensor:
        """The states that samples begin from, ``[B, *shape]``."""
        return self.denoiser.start(self.noise(indices), (grid or self.grid)[0])

    def samples(self, indices: Sequence[int], *, sampler: Sampler | None = None, grid: Grid | None = None) -> Tensor:
        """What the solver makes of these samples, ``[B, *shape]``.

        Args:
            indices: Which.
            sampler: Another solver.
            grid: Other levels.
        """
        solver, levels = sampler or self.sampler, grid or self.grid
        parts = []
        for batch in self._batches(indices):
            steered = {"condition": self.condition_of(batch), "guidance": self.guidance}
            parts.append(sample(self.denoiser, solver, levels, batch, seed=self.seed, **steered).x)
        return torch.cat(parts)

    @torch.no_grad()
    def solution(self, indices: Sequence[int], grid: Grid | None = None) -> Tensor:
        """The fine solution at every level of a grid, ``[levels, B, *shape]``; kept, as searches ask for it often.

        Where the grid denoises last, the data predicted at the last level stand in the place of its states.

        Raises:
            CompositionError: Guidance moves the states themselves, so that there is no solution to follow.
        """
        moving = [each for each in self.guidance if _moves_states(each)]
        if moving:
            raise CompositionError(
                "there is no one solution to compare with: guidance moves the states",
                found=f"guidance {type(moving[0]).__name__}",
                allowed="guidance of the prediction, such as cfg, or a score against data",
                remedy="Leave that guidance out, or search autodiffusion for a trained run, whose data are known.",
            )
        levels = grid or self.grid
        key = (tuple(indices), tuple(level.t for level in levels), levels.denoises_last)
        if key not in self._solutions:
            parts = [self._solved(batch, levels) for batch in self._batches(indices)]
            self._solutions[key] = torch.cat(parts, dim=1)
        return self._solutions[key]

    def _solved(self, indices: Sequence[int], grid: Grid) -> Tensor:
        predict = self.predictor(indices, grid)
        start = self.starts(indices, grid)
        flow = "data" not in self.denoiser.gives
        states = fine_solution(predict, start, grid.path, grid.levels, self.evaluations, flow=flow)
        if grid.denoises_last:
            states[-1] = predict(states[-1], grid[-1]).data
        return states

    def endpoint_error(self, x: Tensor, indices: Sequence[int]) -> float:
        """The root mean square distance of samples from the fine solution of the same starts."""
        return float((x - self.solution(indices)[-1]).double().square().mean().sqrt())

    def distance(self, x: Tensor, indices: Sequence[int]) -> float:
        """The sliced Wasserstein distance of samples from the data, or from fine solutions where none are known."""
        target = self.solution(indices)[-1] if self.data is None else self.data
        return sliced_wasserstein(x, target, seed=self.seed)

    def scores(
        self, indices: Sequence[int], *, sampler: Sampler | None = None, grid: Grid | None = None
    ) -> dict[str, float]:
        """Both scores of a solver on these samples; the distance from one solution only where it follows one."""
        x = self.samples(indices, sampler=sampler, grid=grid)
        found = {"sliced_wasserstein": self.distance(x, indices)}
        if self.is_stochastic or any(map(_moves_states, self.guidance)):
            return found
        return {"endpoint_error": self.endpoint_error(x, indices), **found}

    @property
    def is_stochastic(self) -> bool:
        """Whether the solver draws noise of its own."""
        inner = self.sampler
        while True:
            if traits_of(type(inner), self.described.get("options")).is_stochastic:
                return True
            if not isinstance(held := getattr(inner, "sampler", None), Sampler):
                return False
            inner = held

    def refuse_stochastic(self, search: str) -> None:
        """Raises:
        CompositionError: The solver draws noise of its own, so that it has no one solution to be compared with.
        """
        if self.is_stochastic:
            raise CompositionError(
                f"the search '{search}' follows one solution, and {type(self.sampler).__name__} draws noise",
                found=f"a stochastic sampler: {type(self.sampler).__name__}",
                allowed="a deterministic sampler: unipc, dpm_solver_pp, ddim with eta=0",
                remedy="Choose one of those, or a search that compares distributions: autodiffusion.",
            )

    def _batches(self, indices: Sequence[int]) -> list[list[int]]:
        listed = list(indices)
        return [listed[i : i + self.batch_size] for i in range(0, len(listed), self.batch_size)]


def _moves_states(guidance: Guidance) -> bool:
    kind = type(guidance)
    return kind.after_step is not Guidance.after_step or kind.around is not Guidance.around


class Search(ABC):
    """Fits something to one model once, which later runs read: a time grid, a schedule, ratios, statistics.

    A search is deterministic: what it tries follows from the problem's seed.

    Attributes:
        replaces: The groups of the command line that what is found takes the place of.
    """

    traits: ClassVar[Traits] = Traits()
    replaces: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def search(self, problem: SearchProblem, report: Report = silent) -> Artefact:
        """Searches.

        Args:
            problem: What it fits to.
            report: Is told how far it is.

        Returns:
            What it found, with scores on samples that it was not fitted on.
        """

    @abstractmethod
    def words(self, artefact: Artefact, path: str) -> list[str]:
        """The words of ``generate`` that use what was found, in place of all words of the groups that it replaces.

        Args:
            artefact: What was found.
            path: Where it lies.
        """
