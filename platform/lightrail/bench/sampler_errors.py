"""How far samplers end from the exact solution of one problem, each with its best time grid, under one budget."""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightrail.catalogue import available, load
from lightrail.errors import UserError
from lightrail.generation import GaussianMixture, NoisePath, Sampler, TimeGrid, sample
from lightrail.testing.building import missing_options
from lightrail.traits import traits_of

__all__ = ["BUDGETS", "PAIRS", "Found", "Problem", "errors_of_peers", "errors_of_samplers"]

BUDGETS = (5, 8, 10, 20, 50)

# Of an installed sampler the settings that are tried, under the name that they are listed by; of others the defaults.
_SETTINGS: dict[str, tuple[tuple[str, list[dict[str, Any]]], ...]] = {
    "deis": (("deis", [{"method": m, "order": k} for m in ("tab", "rhoab", "loglam") for k in (1, 2, 3)]),),
    "dpm_solver": (("dpm_solver", [{"order": 2}, {"order": 3}, {"variant": "fast"}]),),
    "dpm_solver_pp": (
        ("dpm_solver_pp", [{"order": 2}, {"order": 2, "solver_type": "taylor"}, {"order": 3}]),
        ("dpm_solver_pp single", [{"variant": v, "order": k} for v in ("single", "fast") for k in (2, 3)]),
    ),
    "dpm_solver_v3": (("dpm_solver_v3", [{"order": 2}, {"order": 3}]),),
    "plms": (("plms", [{"order": 2}, {"order": 3}, {"order": 4}]),),
    "unipc": (("unipc", [{"order": k, "b": b} for k in (2, 3) for b in ("bh1", "bh2")]),),
}
# Spacings that are tried of an installed time grid; of others the defaults.
_SPACINGS: dict[str, list[dict[str, Any]]] = {
    "training_steps": [{"spacing": each} for each in ("linspace", "leading", "trailing", "karras", "lambda")],
    # Where the last step, to the data, begins is a choice of the spacing too: the schedulers' own begin it anywhere
    # from the first training time to the 332nd.
    **{
        name: [{}, *({"stop": stop} for stop in (20, 50, 100, 150, 200, 300))]
        for name in ("karras", "quadratic", "uniform", "uniform_lambda")
    },
}
# The same method here and there.
PAIRS: tuple[tuple[str, str], ...] = (
    ("ddim", "DDIMScheduler"),
    ("edm_euler", "EulerDiscreteScheduler"),
    ("edm_heun", "HeunDiscreteScheduler"),
    ("dpm_solver_pp", "DPMSolverMultistepScheduler"),
    ("dpm_solver_pp single", "DPMSolverSinglestepScheduler"),
    ("dpm_solver", "KDPM2DiscreteScheduler"),
    ("deis", "DEISMultistepScheduler"),
    ("deis", "LMSDiscreteScheduler"),
    ("unipc", "UniPCMultistepScheduler"),
    ("plms", "PNDMScheduler"),
)


@dataclass(frozen=True)
class Found:
    """What came of one method under one budget.

    Args:
        method: The sampler, or the scheduler.
        library: ``lightrail`` or ``diffusers``.
        setting: Options and spacing.
        budget: At most how many evaluations.
        evaluations: How many there were.
        error: The root mean square distance from the exact solution.
    """

    method: str
    library: str
    setting: str
    budget: int
    evaluations: int
    error: float


@dataclass(frozen=True)
class Problem:
    """From one noise to the data, on a path of 1000 training times.

    Args:
        samples: How many.
    """

    samples: int = 64
    mixture: GaussianMixture = field(default_factory=lambda: GaussianMixture(path="ddpm"))

    def __post_init__(self) -> None:
        noise = torch.from_numpy(np.random.default_rng(0).standard_normal((self.samples, 2)))
        times = [0.0, -1.0]
        object.__setattr__(self, "start", noise)
        object.__setattr__(
            self, "exact", dict(zip(times, self.mixture.exact(noise, self.mixture.path.t_max, times), strict=True))
        )

    start: Tensor = field(init=False)
    exact: Mapping[float, Tensor] = field(init=False)

    def error(self, x: Tensor, time: float = -1.0) -> float:
        """How far states at a time are from the exact ones."""
        return float((x - self.exact[time]).square().mean().sqrt())


def errors_of_samplers(problem: Problem, budgets: Sequence[int], only: Sequence[str] = ()) -> Iterator[Found]:
    """Every installed sampler that draws no noise, in each of its settings on each time grid.

    Args:
        problem: What is solved.
        budgets: How many evaluations there may be.
        only: Some samplers; all where none is given.
    """
    grids = list(_time_grids())
    for name in available("sampler"):
        if only and name not in only:
            continue
        for method, options, build in _builders(name):
            for (spacing, times), budget in itertools.product(grids, budgets):
                found = _solved(problem, build, times, budget)
                if found is not None:
                    yield Found(method, "lightrail", ", ".join(filter(None, (options, spacing))), budget, *found)


def _builders(name: str) -> Iterator[tuple[str, str, Any]]:
    try:
        plugin = load("sampler", name)
    except UserError as error:
        print(f"left out: {error.what}", file=sys.stderr)
        return
    if not issubclass(plugin, Sampler) or missing_options(plugin, {}, given=0):
        return
    if "steps" not in inspect.signature(plugin).parameters:
        return
    for method, settings in _SETTINGS.get(name, ((name, [{}]),)):
        for options in settings:
            if not traits_of(plugin, options).is_stochastic:
                told = [f"{key}={value}" for key, value in options.items() if f"{name} {value}" != method]
                yield method, ", ".join(told), lambda steps, options=options: plugin(steps=steps, **options)


def _time_grids() -> Iterator[tuple[str, TimeGrid]]:
    for name in available("time_grid"):
        try:
            plugin = load("time_grid", name)
        except UserError as error:
            print(f"left out: {error.what}", file=sys.stderr)
            continue
        if missing_options(plugin, {}, given=0):
            continue  # times that are given one by one or read from a file
        for options in _SPACINGS.get(name, [{}]):
            told = (f"stop={value}" if key == "stop" else str(value) for key, value in options.items())
            label = " ".join((name, *told))
            yield label, _Kept(plugin(**options))


class _Kept(TimeGrid):
    """A spacing whose grids are worked out once."""

    def __init__(self, inner: TimeGrid) -> None:
        super().__init__()
        self.inner = inner
        self.grid = functools.cache(inner.grid)  # type: ignore[method-assign]

    def times(self, path: NoisePath, start: float, stop: float, count: int) -> np.ndarray:
        return self.inner.times(path, start, stop, count)


def _solved(problem: Problem, build: Any, times: TimeGrid, budget: int) -> tuple[int, float] | None:
    """Evaluations and error with as many steps as the budget has room for; ``None`` where it has for none."""
    steps = budget
    while steps > 0:
        try:
            sampler: Sampler = build(steps)
            grid = sampler.grid(problem.mixture.path, times)
        except UserError:
            steps -= 1
            continue
        asked = sampler.evaluations(grid)
        if asked is None:
            return None
        if asked <= budget:
            break
        steps = min(steps - 1, steps * budget // asked + 1)
    else:
        return None
    sampler.prepare(problem.mixture)
    found = sample(problem.mixture, sampler, grid, range(problem.samples), start=problem.start)
    error = problem.error(found.x)
    return (found.evaluations, error) if np.isfinite(error) else None


def errors_of_peers(problem: Problem, budgets: Sequence[int], only: Sequence[str] = ()) -> Iterator[Found]:
    """Every deterministic scheduler of diffusers, in each of its settings and spacings.

    Args:
        problem: What is solved.
        budgets: How many evaluations there may be.
        only: Some schedulers, by class; all where none is given.
    """
    from lightrail.bench.diffusers_schedulers import last_time, schedulers

    for each, budget in itertools.product(schedulers(only), budgets):
        scheduler = each.within(budget)
        if scheduler is None:
            continue
        try:
            x = each.solved(scheduler, problem.mixture, problem.start)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            print(f"left out: {each.name}, {each.label}, {budget} evaluations ({reason})", file=sys.stderr)
            continue
        found = problem.error(x, last_time(scheduler))
        if np.isfinite(found):
            yield Found(each.name, "diffusers", each.label, budget, len(scheduler.timesteps), found)
