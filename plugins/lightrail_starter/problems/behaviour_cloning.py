"""A policy cloned from an expert, judged by what happens when it is left to steer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import stdev

import torch
from torch import Tensor

from lightrail.bench.claims.problem import CountedClosure, Problem
from lightrail.traits import Traits

__all__ = ["BehaviourCloning"]

STATES, ACTIONS, SAMPLES, HORIZON = 6, 2, 8, 100
RADIUS = 1.1
FALLEN = 100.0  # a squared state that counts as much as any beyond


class BehaviourCloning(Problem):
    """A linear policy for a linear system that falls over when left alone, from noisy actions of an expert.

    ``x' = A x + B u`` has every eigenvalue of A at magnitude 1.1, and the expert ``u = K x`` brings them to 1 / 1.1.
    The loss is the mean squared error of the policy's actions on 8 states a step, which noise in the expert's actions
    keeps from falling to zero. The merit is the mean squared state, at most 100, along 100 steps of the policy's own
    making: where the policy is a little off, the loss hardly tells, and the rollout does.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> problem = BehaviourCloning()
        >>> problem.merit() > 10
        True
    """

    traits = Traits(
        rule="½ mean ‖W x − (K x + noise)‖² over 8 states a step; merit: mean ‖x‖² along x' = (A + B W) x, 100 steps"
    )
    passes = 2000
    merit_name = "log10 of the spread of the rollout's cost"

    @classmethod
    def outcome(cls, merits: Sequence[float]) -> float:
        """The logarithm of the standard deviation of the cost over the checkpoints of the second half.

        A logarithm, since a policy that falls over at one checkpoint has a spread many times that of one that does
        not; a first comparison of the spreads themselves was one of such falls.
        """
        return math.log10(stdev(merits[len(merits) // 2 :])) if len(merits) > 3 else math.inf

    def __init__(self) -> None:
        self._a = RADIUS * torch.linalg.qr(torch.randn(STATES, STATES, dtype=torch.float64))[0]
        self._b = torch.linalg.qr(torch.randn(STATES, ACTIONS, dtype=torch.float64))[0]
        self._starts = torch.randn(32, STATES, dtype=torch.float64)
        self._expert = _expert(self._a, self._b)
        self._policy = torch.nn.Parameter(torch.zeros(ACTIONS, STATES, dtype=torch.float64))

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        return [("policy", self._policy)]

    def closure(self, step: int) -> CountedClosure:
        x = torch.randn(SAMPLES, STATES, dtype=torch.float64)
        u = x @ self._expert.T + torch.randn(SAMPLES, ACTIONS, dtype=torch.float64)

        def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
            states, actions = batch
            return (states @ self._policy.T - actions).square().sum(1).mean() / 2

        return CountedClosure(loss, [self._policy], (x, u))

    @torch.no_grad()
    def merit(self) -> float:
        step = (self._a + self._b @ self._policy).T
        x, costs = self._starts, []
        for _ in range(HORIZON):
            x = x @ step
            costs.append(x.square().sum(1).clamp(max=FALLEN))
        # A state that has left the numbers has fallen, too.
        return float(torch.stack(costs).nan_to_num(nan=FALLEN).mean())


def _expert(a: Tensor, b: Tensor) -> Tensor:
    """The gain that brings a falling system to rest with the least effort: it mirrors eigenvalues in the unit circle.

    Found by iterating the Riccati equation of ``min Σ ‖u‖²``.
    """
    p = torch.eye(len(a), dtype=a.dtype)
    k = torch.zeros_like(b.T)
    for _ in range(1000):
        k = -torch.linalg.solve(torch.eye(b.shape[1], dtype=a.dtype) + b.T @ p @ b, b.T @ p @ a)
        p = a.T @ p @ (a + b @ k)
    return k
