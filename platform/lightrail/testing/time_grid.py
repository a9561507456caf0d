"""Conformance of time grids, on every noise path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from lightrail.errors import UserError
from lightrail.generation import Grid, NoisePath, TimeGrid
from lightrail.generation.gaussian_mixture import PATHS
from lightrail.generation.noise_path import SMALLEST_ALPHA
from lightrail.generation.time_grid import ENDS
from lightrail.testing.building import accepts, built, check_is_documented, refuses_unknown_options
from lightrail.testing.suite import Check, NotApplicable, Suite, known_exceptions, name_of, require

__all__ = ["TimeGridSuite"]

Options = Mapping[str, Any]
COUNTS = (1, 2, 3, 4, 6, 10, 60)


def _grids(times: TimeGrid) -> Iterator[tuple[str, NoisePath, int, Grid]]:
    """Every grid on a path and with a number of steps that it does not refuse."""
    for name, path_of in PATHS.items():
        path = path_of()
        for steps in COUNTS:
            try:
                grid = times.grid(path, steps)
            except UserError:
                continue
            yield f"on the path {name}, {steps} steps,", path, steps, grid


def _first(times: TimeGrid) -> tuple[NoisePath, int, Grid]:
    for _, path, steps, grid in _grids(times):
        if steps > 2:
            return path, steps, grid
    raise NotApplicable("it makes no grid of three steps or more")


def check_builds_from_options(plugin: Any, options: Options) -> None:
    """``plugin(**options)`` is a lightrail.TimeGrid."""
    times = built(plugin, options)
    require(isinstance(times, TimeGrid), f"it is no lightrail.TimeGrid but {type(times).__name__}")


def check_rejects_unknown_options(plugin: Any, options: Options) -> None:
    """An option that the signature lacks is an error."""
    built(plugin, options)
    refuses_unknown_options(plugin, options)


def check_falls(plugin: Any, options: Options) -> None:
    """From noise to data, as many steps as were asked for, inside the path; at least one path and number is taken."""
    made = 0
    for where, path, steps, grid in _grids(built(plugin, options)):
        made += 1
        require(isinstance(grid, Grid), f"{where} it makes no lightrail Grid but {type(grid).__name__}")
        require(grid.steps == steps, f"{where} it makes {grid.steps}")
        sigmas = [level.sigma / max(level.alpha, 1e-300) for level in grid]
        falls = all(a > b for a, b in pairwise(sigmas))
        require(falls, f"{where} the noise does not fall at each step")
        inside = all(path.t_zero - 1e-9 <= level.t <= path.t_max * (1 + 1e-9) for level in grid)
        require(inside, f"{where} it leaves the path: {grid[0].t:g} to {grid[-1].t:g}")
        require(all(level.sigma > 0 for level in grid.levels[:-1]), f"{where} σ = 0 is not the last level")
    require(made, "it makes a grid on no path, with no number of steps")


def check_is_in_double_precision(plugin: Any, options: Options) -> None:
    """Times are float64 and levels are Python's own numbers."""
    times = built(plugin, options)
    path, steps, grid = _first(times)
    for level in grid:
        for value in (level.t, level.alpha, level.sigma):
            require(type(value) is float, f"a level holds a {type(value).__name__}, no float")
    found = times.times(path, grid[0].t, path.t_min, steps + 1)
    is_double = isinstance(found, np.ndarray) and found.dtype == np.float64
    require(is_double, f"times() gives {getattr(found, 'dtype', type(found).__name__)}, no array of float64")


def check_starts_where_solvers_can(plugin: Any, options: Options) -> None:
    """A finite grid starts where α is above 0, on every path."""
    for where, path, _, grid in _grids(built(plugin, options)):
        enough = grid[0].alpha >= SMALLEST_ALPHA * (1 - 1e-9)
        require(enough, f"{where} it starts at α = {grid[0].alpha:.3g}, t_finite is {path.t_finite:.6g}")


def check_ends_as_asked(plugin: Any, options: Options) -> None:
    """``zero`` ends at σ = 0; ``minimum`` and ``denoise`` at the path's smallest time, and ``denoise`` says so."""
    if not accepts(plugin, "end"):
        raise NotApplicable("the signature has no 'end'")
    for end in ENDS:
        for where, path, _, grid in _grids(plugin(**{**options, "end": end})):
            require(grid.denoises_last == (end == "denoise"), f"{where} end={end}: denoises_last={grid.denoises_last}")
            require(grid[-1].is_clean == (end == "zero"), f"{where} end={end}: it ends at σ = {grid[-1].sigma:.3g}")
            last = path.t_zero if end == "zero" else path.t_min
            stops = "stop" in options or abs(grid[-1].t - last) <= 1e-12 * max(1.0, abs(last))
            require(stops, f"{where} end={end}: it ends at t = {grid[-1].t:.6g}, not {last:.6g}")


def check_goes_between_its_ends(plugin: Any, options: Options) -> None:
    """``start`` and ``stop`` are visited exactly; outside the path they are an error."""
    ends = [name for name in ("start", "stop") if accepts(plugin, name)]
    if not ends:
        raise NotApplicable("the signature has neither 'start' nor 'stop'")
    path, steps, _ = _first(built(plugin, options))
    # Whole numbers where the path has whole times.
    given = {"start": path.t_max * 0.8 if path.t_max < 500 else 800, "stop": path.t_max * 0.1}
    asked = {name: given[name] for name in ends}
    closing = {"end": "minimum"} if accepts(plugin, "end") else {}
    grid = plugin(**{**options, **asked, **closing}).grid(path, steps)
    if "start" in asked:
        require(grid[0].t == asked["start"], f"start={asked['start']}, and it starts at {grid[0].t!r}")
    if "stop" in asked:
        require(grid[-1].t == asked["stop"], f"stop={asked['stop']}, and it stops at {grid[-1].t!r}")
    for name in ends:
        try:
            outside = plugin(**{**options, name: path.t_max * 2 + 1}).grid(path, steps, finite=False)
        except UserError:
            continue
        require(False, f"{name}={path.t_max * 2 + 1:g} is outside the path, and it goes from {outside[0].t:g}")


def check_refuses_no_steps(plugin: Any, options: Options) -> None:
    """A grid of no steps, or of a part of one, is an error."""
    times = built(plugin, options)
    path, _, _ = _first(times)
    for steps in (0, -1, 2.5):
        try:
            times.grid(path, steps)  # type: ignore[arg-type]
        except UserError:
            continue
        require(False, f"it makes a grid of {steps} steps")


def check_is_the_same_again(plugin: Any, options: Options) -> None:
    """The same path and number give the same levels, whatever was asked in between."""
    times = built(plugin, options)
    path, steps, grid = _first(times)
    list(_grids(times))
    again = times.grid(path, steps)
    require(again.levels == grid.levels, "asked again, it gives other levels")


CHECKS: tuple[Check, ...] = (
    check_is_documented,
    check_builds_from_options,
    check_rejects_unknown_options,
    check_falls,
    check_is_in_double_precision,
    check_starts_where_solvers_can,
    check_ends_as_asked,
    check_goes_between_its_ends,
    check_refuses_no_steps,
    check_is_the_same_again,
)


class TimeGridSuite(Suite):
    """Every check of a time grid."""

    kind: ClassVar[str] = "time_grid"
    checks: ClassVar[tuple[Check, ...]] = (*CHECKS, known_exceptions(frozenset(map(name_of, CHECKS))))
