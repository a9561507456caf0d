"""Optimistic Adam: optimistic descent along Adam's directions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightrail.options import between, non_negative, positive
from lightrail.traits import Claim, Traits
from lightrail_optimizers.adam_rule import adam_direction, adam_moments_
from lightrail_optimizers.optimistic_sgd import optimistic_gradient
from lightrail_optimizers.tensorwise import TensorwiseOptimizer

__all__ = ["OptimisticAdam", "optimistic_adam"]


def optimistic_adam(
    x: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    previous: list[Tensor],
    *,
    lr: float | Tensor,
    t: int | Tensor,
    b1: float,
    b2: float,
    eps: float,
    optimism: float,
    wd: float,
) -> None:
    """One update, in place: :func:`~lightrail_optimizers.optimistic_sgd.optimistic_gradient` along Adam's direction."""
    adam_moments_(g, m, v, b1=b1, b2=b2)
    u = adam_direction(m, v, t=t, b1=b1, b2=b2, eps=eps)
    optimistic_gradient(x, u, previous, lr=lr, optimism=optimism, wd=wd)


class OptimisticAdam(TensorwiseOptimizer):
    """Optimistic Adam, for games: Adam that takes twice its step and gives the step before back.

    ``u_t = m̂_t / (sqrt(v̂_t) + eps)``, Adam's direction with its bias correction; ``x *= 1 - lr wd``;
    ``x -= 2 lr u_t - lr u_{t-1}``, where ``u_0 = 0``.

    Every player has to move from the same point: give one optimizer all players, with the gradient of each player's
    own loss in ``.grad``, as tasks with ``players()`` that move at once do.

    Args:
        params: Parameters or parameter groups; in a game, a group a player.
        lr: Learning rate, >= 0.
        betas: ``(b1, b2)``, each in [0, 1).
        eps: Added to the root of the second moment, > 0.
        optimism: How far the change of the direction is carried on, >= 0; 0 is AdamW.
        weight_decay: Decoupled, >= 0.
        maximize: Ascend.
        foreach: One call for many tensors; ``False`` is the same bit for bit, tensor by tensor, with less memory.
        compile: Compile the update; a learning rate that moves does not compile it again.

    Raises:
        ConfigurationError: An option out of range; a complex parameter or a sparse gradient.

    Deviations:
        Codes of the method that divide the older moments by the newer bias corrections give back another step than
        the one that was taken; here it is the same one, as the paper writes it. With a learning rate that moves,
        today's rate multiplies both. The paper has no weight decay.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        >>> optimizer = OptimisticAdam([w], lr=0.1)
        >>> for _ in range(2):
        ...     w.grad = torch.tensor([0.5, -1.0], dtype=torch.float64)
        ...     optimizer.step()
        ...     print([round(v, 4) for v in w.tolist()])
        [0.8, -1.8]
        [0.7, -1.7]

    Reference:
        Daskalakis, Ilyas, Syrgkanis, Zeng, 2018, "Training GANs with Optimism", arXiv:1711.00141, Algorithm 1.
    """

    traits = Traits(
        rule="x -= lr (2 u_t - u_{t-1}), u Adam's direction",
        paper="Daskalakis, Ilyas, Syrgkanis, Zeng, 2018, Training GANs with Optimism, arXiv:1711.00141",
        state=3,
        example={"lr": 0.01},
        claim=Claim(
            sentence="closer to the solution of a game than Adam", baseline="adam", problems=("bilinear_game",)
        ),
    )
    state_names = ("momentum", "second_moment", "previous_direction")
    rule = staticmethod(optimistic_adam)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.5, 0.9),
        eps: float = 1e-8,
        optimism: float = 1.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool = True,
        compile: bool = False,
    ) -> None:
        non_negative(lr=lr, optimism=optimism, weight_decay=weight_decay)
        positive(eps=eps)
        b1, b2 = betas
        between(0.0, 1.0, beta1=b1, beta2=b2)
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": (b1, b2),
                "eps": eps,
                "optimism": optimism,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "foreach": foreach,
                "compile": compile,
            },
        )

    def scalars(self, group: dict[str, Any], t: int) -> dict[str, Any]:
        b1, b2 = group["betas"]
        return {
            "lr": group["lr"],
            "t": t,
            "b1": b1,
            "b2": b2,
            "eps": group["eps"],
            "optimism": group["optimism"],
            "wd": group["weight_decay"],
        }
