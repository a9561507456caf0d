"""Grams: the magnitude of Adam's update in the direction of the current gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightrail.options import between, non_negative, positive
from lightrail.traits import Claim, Peer, Traits
from lightrail_optimizers.adam_rule import adam_update
from lightrail_optimizers.tensor_lists import add_scaled_, shrink_
from lightrail_optimizers.tensorwise import TensorwiseOptimizer

__all__ = ["Grams", "grams"]


def grams(
    x: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    *,
    lr: float | Tensor,
    t: int | Tensor,
    b1: float,
    b2: float,
    eps: float,
    wd: float,
) -> None:
    """One update, in place: Adam's moments; ``x *= 1 - lr wd``; ``x -= lr k |m| / (sqrt(v) + eps) sign(g)``.

    ``k = sqrt(1-b2^t) / (1-b1^t)`` corrects the bias of both moments.
    """
    u = adam_update(g, m, v, t=t, b1=b1, b2=b2, eps=eps, early_eps=True)
    torch._foreach_abs_(u)
    torch._foreach_mul_(u, torch._foreach_sign(g))
    shrink_(x, lr * wd)
    add_scaled_(x, u, -lr)


class Grams(TensorwiseOptimizer):
    """Grams: Adam says how far each coordinate moves, the sign of the current gradient says where to.

    ``m = b1 m + (1-b1) g``; ``v = b2 v + (1-b2) g²``; ``u = |sqrt(1-b2^t) / (1-b1^t) m / (sqrt(v) + eps)| sign(g)``;
    ``x *= 1 - lr wd``; ``x -= lr u``. Without weight decay no step goes against the current gradient.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, >= 0.
        betas: ``(b1, b2)``, each in [0, 1).
        eps: Added to the root of the second moment before its bias is corrected, > 0.
        weight_decay: Decoupled, >= 0.
        maximize: Ascend.
        foreach: One call for many tensors; ``False`` is the same bit for bit, tensor by tensor, with less memory.
        compile: Compile the update; a learning rate that moves does not compile it again.

    Raises:
        ConfigurationError: An option out of range; a complex parameter or a sparse gradient.

    Deviations:
        The authors' code replaces ``.grad`` by its sign; here it stays as it is.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> w.grad = torch.tensor([0.5, 0.0])
        >>> Grams([w], lr=0.1).step()
        >>> [round(v, 4) for v in w.tolist()]
        [0.9, -2.0]

    Reference:
        Cao, Li and Song, 2024, "Grams: Gradient Descent with Adaptive Momentum Scaling", arXiv:2412.17107.
    """

    traits = Traits(
        rule="x -= lr (|Adam's update| sign(g) + wd x)",
        paper="Cao, Li, Song, 2024, Grams: Gradient Descent with Adaptive Momentum Scaling, arXiv:2412.17107",
        state=2,
        example={"lr": 0.01},
        claim=Claim(sentence="a lower loss than Adam's"),
        peers=(Peer("pytorch_optimizer.Grams"),),
    )
    state_names = ("momentum", "second_moment")
    rule = staticmethod(grams)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool = True,
        compile: bool = False,
    ) -> None:
        non_negative(lr=lr, weight_decay=weight_decay)
        b1, b2 = betas
        between(0.0, 1.0, beta1=b1, beta2=b2)
        positive(eps=eps)
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": (b1, b2),
                "eps": eps,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "foreach": foreach,
                "compile": compile,
            },
        )

    def scalars(self, group: dict[str, Any], t: int) -> dict[str, Any]:
        b1, b2 = group["betas"]
        return {"lr": group["lr"], "t": t, "b1": b1, "b2": b2, "eps": group["eps"], "wd": group["weight_decay"]}
