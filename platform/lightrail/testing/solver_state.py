"""Where a solver's memory lives: in the state, row by row, in what can be saved; never on the solver."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from lightrail.generation import Evaluator, Level, Noise, Prediction, State
from lightrail.testing.runs import saved_and_loaded
from lightrail.testing.solver_runs import (
    Solver,
    at_rows,
    begun,
    continued,
    grid_of,
    ready,
    require_near,
    solved,
    starts,
)
from lightrail.testing.suite import require

__all__ = ["require_apart", "require_no_memory", "require_resumed", "require_selectable"]


def require_apart(solver: Solver) -> None:
    """A sample is the same alone, in any batch and beside any other, however far out."""
    mixture, sampler, grid, start = ready(solver)
    start = torch.cat((start[:4], 30 * start[4:]))
    together = solved(sampler, mixture, grid, start)
    order = [3, 0, 4, 2, 1]
    turned = solved(sampler, mixture, grid, start[order], indices=order)
    require_near(turned, together[order], "in another order the samples are others")
    for row in range(4):
        alone = solved(sampler, mixture, grid, start[[row]], indices=[row])
        require_near(alone, together[[row]], "a sample alone is not what it is beside others")


def require_selectable(solver: Solver) -> None:
    """Rows of a state in mid-run, chosen or doubled by ``state.select``, go on as they would have."""
    mixture, sampler, grid, start = ready(solver)
    middle = continued(
        sampler, begun(sampler, mixture, grid, start), Evaluator(mixture), grid, until=max(1, grid.steps // 2)
    )
    expected = continued(sampler, middle, Evaluator(mixture), grid).x
    for rows in ([4, 2, 0, 1, 3], [2, 2, 0]):
        found = continued(sampler, at_rows(middle, rows), Evaluator(mixture), grid).x
        require_near(found, expected[rows], f"after state.select({rows}) the samples go on otherwise")


def require_no_memory(solver: Solver) -> None:
    """One sampler that solves two batches in turn, step by step, ends where two samplers end."""
    mixture, sampler, grid, start = ready(solver)
    runs = [(grid, start), (grid_of(sampler, mixture.path, uneven=5), starts(mixture, grid[0], 3).flip(0))]
    expected = [solved(solver.of(mixture), mixture, levels, x) for levels, x in runs]
    states = [begun(sampler, mixture, levels, x) for levels, x in runs]
    evaluator = Evaluator(mixture)
    while any(state.index < levels.steps for state, (levels, _) in zip(states, runs, strict=True)):
        states = [
            continued(sampler, state, evaluator, levels, until=min(state.index + 1, levels.steps))
            for state, (levels, _) in zip(states, runs, strict=True)
        ]
    for state, (levels, _), end in zip(states, runs, expected, strict=True):
        found = continued(sampler, state, evaluator, levels).x
        require_near(found, end, "two batches solved in turn by one sampler disturb each other")


def require_resumed(solver: Solver) -> None:
    """A state in mid-run that was saved in plain values and tensors goes on bit for bit, in another sampler."""
    mixture, sampler, grid, start = ready(solver)
    middle = continued(
        sampler, begun(sampler, mixture, grid, start), Evaluator(mixture), grid, until=max(1, grid.steps // 2)
    )
    expected = continued(sampler, middle, Evaluator(mixture), grid).x
    file = saved_and_loaded(_plain(_fields(middle)))
    again = solver.of(mixture)
    found = continued(again, _state(file, middle.noise), Evaluator(mixture), grid).x
    require(torch.equal(found, expected), "a run that goes on from a saved state ends elsewhere")


def _fields(state: State) -> dict[str, Any]:
    return {"x": state.x, "index": state.index, "history": state.history, "memory": dict(state.memory)}


def _plain(value: Any) -> Any:
    if isinstance(value, Prediction):
        level = [getattr(value.level, field.name) for field in dataclasses.fields(Level)]
        return {"prediction": [value.x, level, value.form, dict(value.known)]}
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value] if isinstance(value, list) else {"tuple": [_plain(v) for v in value]}
    is_plain = value is None or isinstance(value, bool | int | float | str | Tensor)
    require(
        is_plain, f"the state carries a {type(value).__name__}: only tensors, predictions and plain values are kept"
    )
    return value


def _again(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"prediction"}:
        x, level, form, known = value["prediction"]
        prediction = Prediction(x, Level(*level), form, known[form])
        prediction.known.update(known)
        return prediction
    if isinstance(value, dict) and set(value) == {"tuple"}:
        return tuple(_again(each) for each in value["tuple"])
    if isinstance(value, dict):
        return {name: _again(each) for name, each in value.items()}
    return [_again(each) for each in value] if isinstance(value, list) else value


def _state(file: dict[str, Any], noise: Noise) -> State:
    return State(noise=noise, **{name: _again(value) for name, value in file.items()})
