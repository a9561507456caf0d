"""The base of optimizers that train at one point and are evaluated at an average of the points they have been at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightrail.errors import UserError
from lightrail_optimizers.tensor_lists import add_scaled_
from lightrail_optimizers.tensorwise import TensorwiseOptimizer

__all__ = ["IterateAverage", "average_", "exponential_weight", "polynomial_weight", "require_training_point"]


def average_(average: list[Tensor], x: list[Tensor], c: float | Tensor) -> None:
    """``x̄ = (1-c) x̄ + c x``, in place."""
    if isinstance(c, Tensor):
        add_scaled_(average, list(torch._foreach_sub(x, average)), c)
    else:
        torch._foreach_lerp_(average, x, c)


def polynomial_weight(t: int, gamma: float) -> float:
    """``(1+gamma) / (t+gamma)``: x_i counts about as ``(i/t)^gamma``, so that early iterates fade.

    Shamir and Zhang, 2013, "Stochastic Gradient Descent for Non-smooth Optimization", arXiv:1212.1824.

    Args:
        t: The iterate, from 1; the first weighs 1, so that the average starts there.
        gamma: 0 is the plain mean.

    Example:
        >>> [polynomial_weight(t, 0.0) for t in (1, 2, 4)]
        [1.0, 0.5, 0.25]
    """
    return (1 + gamma) / (t + gamma)


def exponential_weight(t: int | Tensor, beta: float) -> Any:
    """``(1-beta) / (1-beta^t)``: x_i counts as ``beta^(t-i)``, and all weights sum to 1 from the first iterate on.

    Example:
        >>> exponential_weight(1, 0.9)
        1.0
    """
    return (1 - beta) / (1 - beta**t)


def require_training_point(optimizer: Optimizer, at_evaluation_point: bool) -> None:
    """Raises where a step is asked for at the evaluation point: its gradient would belong to another point."""
    if at_evaluation_point:
        name = type(optimizer).__name__
        raise UserError(
            f"{name} was asked for a step at the point where it is evaluated",
            found="step() after eval()",
            allowed="step() after train()",
            remedy="Call optimizer.train() before the training loop goes on, and optimizer.eval() before validation.",
        )


class IterateAverage(TensorwiseOptimizer):
    """An optimizer whose parameters stand at x while it trains, and at x̄ after :meth:`eval`.

    A subclass keeps x̄ under ``average`` in the state of each parameter. After :meth:`eval` that place holds x, and the
    group says so: both are in ``state_dict``, which is right in either mode, together with the parameters of that mode.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step.

        Args:
            closure: Evaluates the loss and its gradient; ``None`` with gradients in ``.grad``.

        Returns:
            The loss that the closure gave.

        Raises:
            UserError: :meth:`eval` was called, and :meth:`train` was not.
        """
        require_training_point(self, any(group.get("at_average") for group in self.param_groups))
        return super().step(closure)

    def eval(self) -> None:
        """Goes to the average, where the model is to be evaluated; nothing where it is there already."""
        self._go(to_average=True)

    def train(self) -> None:
        """Goes back to the point where gradients are taken, bit for bit."""
        self._go(to_average=False)

    @torch.no_grad()
    def _go(self, *, to_average: bool) -> None:
        for group in self.param_groups:
            if group.get("at_average", False) is to_average:
                continue
            group["at_average"] = to_average
            for p in group["params"]:
                # Not `self.state[p]`: that would make a state for a parameter that has none.
                average = self.state.get(p, {}).get("average")
                if average is not None:
                    here = p.detach().clone()
                    p.copy_(average)
                    average.copy_(here)
