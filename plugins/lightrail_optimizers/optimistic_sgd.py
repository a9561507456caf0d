"""Optimistic gradient descent: the next gradient is taken to change as the last one did."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightrail.options import non_negative
from lightrail.step.sharded import copy_tensors
from lightrail.traits import Claim, Traits
from lightrail_optimizers.tensor_lists import add_scaled_, shrink_
from lightrail_optimizers.tensorwise import TensorwiseOptimizer

__all__ = ["OptimisticSGD", "optimistic_gradient"]


def optimistic_gradient(
    x: list[Tensor], g: list[Tensor], previous: list[Tensor], *, lr: float | Tensor, optimism: float, wd: float
) -> None:
    """One update, in place: ``x *= 1 - lr wd``; ``x -= lr (g + optimism (g - previous))``; ``previous = g``.

    Args:
        x: Parameters.
        g: What to descend along: gradients, or the directions of another method.
        previous: The ``g`` of the update before.
        lr: Learning rate.
        optimism: How far the change is carried on.
        wd: Decoupled weight decay.
    """
    shrink_(x, lr * wd)
    torch._foreach_lerp_(previous, g, 1 + optimism)
    add_scaled_(x, previous, -lr)
    copy_tensors(previous, g)


class OptimisticSGD(TensorwiseOptimizer):
    """Optimistic gradient descent, for games: one gradient a step, and no circling where plain descent circles.

    ``x_{t+1} = x_t - 2 lr g_t + lr g_{t-1}``, where ``g_0 = g_1``.

    Every player has to move from the same point: give one optimizer all players, with the gradient of each player's
    own loss in ``.grad``, as tasks with ``players()`` that move at once do.

    Args:
        params: Parameters or parameter groups; in a game, a group a player.
        lr: Learning rate, >= 0; below 1/(2L) for a field with Lipschitz constant L.
        optimism: How far the change of the gradient is carried on, >= 0; 0 is plain descent.
        weight_decay: Decoupled, >= 0.
        maximize: Ascend.
        foreach: One call for many tensors; ``False`` is the same bit for bit, tensor by tensor, with less memory.
        compile: Compile the update; a learning rate that moves does not compile it again.

    Raises:
        ConfigurationError: An option out of range; a complex parameter or a sparse gradient.

    Deviations:
        With a learning rate that moves, today's rate multiplies both gradients. A parameter without gradient stays,
        and goes on later from the gradient that it had last.

    Example:
        >>> from lightrail import Closure
        >>> x, y = (torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64)) for _ in range(2))
        >>> losses = {"x": lambda: x * y, "y": lambda: -x * y}
        >>> optimizer = OptimisticSGD([x, y], lr=0.1)
        >>> for _ in range(2):
        ...     closure = Closure(lambda player: losses[player](), [x, y], players={"x": [x], "y": [y]})
        ...     loss = optimizer.step(closure)
        ...     print(round(x.item(), 4), round(y.item(), 4))
        0.9 1.1
        0.78 1.18

    Reference:
        Hsieh, Iutzeler, Malick, Mertikopoulos, 2019, "On the convergence of single-call stochastic extra-gradient
        methods", arXiv:1908.08465, Section 3 (OG); Daskalakis et al., 2018, arXiv:1711.00141.
    """

    traits = Traits(
        rule="x -= lr (2 g_t - g_{t-1})",
        paper=(
            "Hsieh, Iutzeler, Malick, Mertikopoulos, 2019, On the convergence of single-call stochastic "
            "extra-gradient methods, arXiv:1908.08465"
        ),
        state=1,
        example={"lr": 0.01},
        claim=Claim(
            sentence="reaches the solution that descent and ascent circle", baseline="sgd", problems=("bilinear_game",)
        ),
    )
    state_names = ("previous_gradient",)
    rule = staticmethod(optimistic_gradient)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        optimism: float = 1.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool = True,
        compile: bool = False,
    ) -> None:
        non_negative(lr=lr, optimism=optimism, weight_decay=weight_decay)
        super().__init__(
            params,
            {
                "lr": lr,
                "optimism": optimism,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "foreach": foreach,
                "compile": compile,
            },
        )

    def scalars(self, group: dict[str, Any], t: int) -> dict[str, Any]:
        return {"lr": group["lr"], "optimism": group["optimism"], "wd": group["weight_decay"]}

    def apply_rule(self, group: dict[str, Any], t: int, *lists: list[Tensor]) -> None:
        if t == 1:
            _, g, previous = lists
            copy_tensors(previous, g)
        super().apply_rule(group, t, *lists)
