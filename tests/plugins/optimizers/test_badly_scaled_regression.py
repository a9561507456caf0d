"""OASIS and PSPS where they are meant for: logistic regression on columns of lengths from 1e-3 to 1e3."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightrail import Closure
from lightrail_optimizers import OASIS, PSPS

ENOUGH = 1e-4


@pytest.fixture(scope="module")
def problem():
    """Inputs, targets, and the least loss: found on equal columns, where it is the same."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(100, 5, generator=generator, dtype=torch.float64)
    truth = torch.randn(5, generator=generator, dtype=torch.float64)
    targets = torch.bernoulli((columns @ truth).sigmoid(), generator=generator)
    w = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = torch.optim.LBFGS([w], max_iter=300, tolerance_grad=1e-12, line_search_fn="strong_wolfe")
    optimizer.step(Closure(lambda: F.binary_cross_entropy_with_logits(columns @ w, targets), [w]))
    least = F.binary_cross_entropy_with_logits(columns @ w, targets).item()
    return columns * 10.0 ** torch.linspace(-3, 3, 5, dtype=torch.float64), targets, least


def gap(problem, make, steps):
    """The smallest distance to the least loss on the way, which ends where that is small enough."""
    inputs, targets, least = problem
    torch.manual_seed(1)
    w = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer, found = make([w]), float("inf")
    for _ in range(steps):
        loss = optimizer.step(Closure(lambda: F.binary_cross_entropy_with_logits(inputs @ w, targets), [w]))
        found = min(found, loss.item() - least)
        if found < ENOUGH:
            break
    return found


def test_oasis_solves_what_no_learning_rate_of_gradient_descent_does(problem):
    assert gap(problem, lambda p: OASIS(p, alpha=1e-7), 500) < ENOUGH
    assert min(gap(problem, lambda p, k=k: torch.optim.SGD(p, 10.0**k), 100) for k in range(-7, 0)) > 100 * ENOUGH


def test_the_polyak_step_needs_its_preconditioner(problem):
    options = {"f_star": problem[2], "eta_max": None}
    hutchinson = gap(problem, lambda p: PSPS(p, "hutchinson", beta2=0.999, alpha=1e-7, **options), 600)
    plain = gap(problem, lambda p: PSPS(p, "none", **options), 600)
    assert hutchinson < ENOUGH
    assert plain > 100 * ENOUGH
