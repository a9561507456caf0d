"""Behaviour cloning: an expert that steers, and a loss that does not tell what a rollout does."""

from __future__ import annotations

import pytest
import torch

from lightrail_starter.problems.behaviour_cloning import BehaviourCloning


def made(seed: int = 0) -> BehaviourCloning:
    torch.manual_seed(seed)
    return BehaviourCloning()


def eigenvalues(problem: BehaviourCloning, policy: torch.Tensor) -> list[float]:
    return torch.linalg.eigvals(problem._a + problem._b @ policy).abs().tolist()


def test_the_expert_mirrors_every_eigenvalue_in_the_unit_circle() -> None:
    for seed in range(5):
        problem = made(seed)
        assert eigenvalues(problem, problem._policy.detach()) == pytest.approx([1.1] * 6)
        assert eigenvalues(problem, problem._expert) == pytest.approx([1 / 1.1] * 6)


def test_the_gradient_is_that_of_the_mean_squared_error_and_vanishes_on_average_at_the_expert() -> None:
    problem = made()
    with torch.no_grad():
        problem._policy.copy_(problem._expert)
    total = torch.zeros(2, 6, dtype=torch.float64)
    for step in range(4000):
        total += problem.closure(step).gradient()[1][0] / 4000
    assert total.abs().max() < 0.03
    assert 0.9 < sum(float(problem.closure(step).loss()) for step in range(400)) / 400 < 1.1


def test_a_policy_a_little_off_costs_little_in_the_loss_and_much_in_the_rollout() -> None:
    problem = made()
    with torch.no_grad():
        problem._policy.copy_(problem._expert)
        expert = problem.merit()
        worst = 0.0
        for _ in range(200):
            problem._policy.copy_(problem._expert + 0.08 * torch.randn(2, 6, dtype=torch.float64))
            worst = max(worst, problem.merit())
    # Squared error of the actions: 12 · 0.08² / 2 = 0.04 above a floor of 1.
    assert expert < 1
    assert worst > 5 * expert
    with torch.no_grad():
        problem._policy.fill_(1e200)
    assert problem.merit() == 100
