"""The problems: made alike from one seed, with gradients that are those of their merit's loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset
from torch.utils.data._utils.collate import default_collate_fn_map

from lightrail import compose
from lightrail.bench.claims import Problem, RunProblem
from lightrail.catalogue import available, load

RUNS = [name for name in available("problem") if issubclass(load("problem", name), RunProblem)]
NAMES = [name for name in available("problem") if name not in RUNS]


def made(name: str, seed: int = 1) -> Problem:
    torch.manual_seed(seed)
    return load("problem", name)()


@pytest.mark.parametrize("name", NAMES)
def test_one_seed_makes_one_problem(name: str) -> None:
    first, second, other = made(name), made(name), made(name, seed=2)
    assert first.merit() == second.merit() == first.merit()
    assert torch.equal(made(name).closure(0)(), made(name).closure(0)())
    same = [
        torch.equal(p, q) for (_, p), (_, q) in zip(first.named_parameters(), other.named_parameters(), strict=True)
    ]
    assert not all(same) or first.merit() != other.merit()


@pytest.mark.parametrize("name", NAMES)
def test_the_closure_gives_gradients_of_every_parameter_and_the_merit_spends_nothing(name: str) -> None:
    problem = made(name)
    state = torch.get_rng_state()
    problem.merit()
    assert torch.equal(torch.get_rng_state(), state)
    closure = problem.closure(0)
    closure()
    assert closure.passes == 1
    for named, p in problem.named_parameters():
        assert p.grad is not None, named
        assert bool(p.grad.isfinite().all()), named
    flat = [
        p for group in problem.groups(named=False) for p in (group["params"] if isinstance(group, dict) else [group])
    ]
    assert [id(p) for p in flat] == [id(p) for _, p in problem.named_parameters()]


def test_the_least_logistic_loss_has_no_gradient() -> None:
    torch.manual_seed(1)
    from lightrail_optimizers.problems.scaled_logistic import ScaledLogistic

    problem = ScaledLogistic()
    scale = torch.logspace(-3, 3, 30, dtype=torch.float64)
    u = torch.nn.Parameter(torch.zeros(30, dtype=torch.float64))
    optimizer = torch.optim.LBFGS([u], max_iter=400, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(problem._x @ (u / scale), problem._y)
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        problem._w.copy_(u / scale)
    assert abs(problem.merit()) < 1e-8


class _Rows(tuple[torch.Tensor, ...]):
    """Rows that are a batch already."""


@pytest.fixture
def _rows_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of all records are 1.6 million reads of one row: the same rows, in one read a batch."""

    def rows(data: TensorDataset, indices: list[int]) -> list[_Rows]:
        return [_Rows(column[indices] for column in data.tensors)]

    monkeypatch.setattr(TensorDataset, "__getitems__", rows, raising=False)
    monkeypatch.setitem(default_collate_fn_map, _Rows, lambda batch, **_: [*batch[0]])


@pytest.mark.usefixtures("_rows_are_read_together")
@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_as_long_as_it_says(name: str, tmp_path: Path) -> None:
    cls = load("problem", name)
    run = compose([*cls.overrides, "logger=[csv]", "trainer.accelerator=cpu", f"run.root={tmp_path}"])
    result = run.execute(show_progress=False)
    assert result.summary["steps"] == cls.passes
    assert cls.metric in result.metrics
