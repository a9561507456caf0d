"""Lion: the sign of an interpolation between momentum and gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightrail.options import between, non_negative
from lightrail.traits import Claim, Peer, Traits
from lightrail_optimizers.tensor_lists import add_scaled_, shrink_
from lightrail_optimizers.tensorwise import TensorwiseOptimizer

__all__ = ["Lion", "lion"]


def lion(
    x: list[Tensor], g: list[Tensor], m: list[Tensor], *, lr: float | Tensor, b1: float, b2: float, wd: float
) -> None:
    """One update, in place: ``x *= 1 - lr wd``; ``x -= lr sign(b1 m + (1-b1) g)``; ``m = b2 m + (1-b2) g``."""
    shrink_(x, lr * wd)
    u = list(torch._foreach_lerp(m, g, 1 - b1))
    torch._foreach_sign_(u)
    add_scaled_(x, u, -lr)
    torch._foreach_lerp_(m, g, 1 - b2)


class Lion(TensorwiseOptimizer):
    """Lion: moves every coordinate by the learning rate, in the direction of a two-speed momentum.

    ``x *= 1 - lr wd``; ``x -= lr sign(b1 m + (1-b1) g)``; ``m = b2 m + (1-b2) g``.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, >= 0; three to ten times smaller than AdamW's.
        betas: ``(b1, b2)``, each in [0, 1).
        weight_decay: Decoupled, >= 0; three to ten times larger than AdamW's, for the same strength.
        maximize: Ascend.
        foreach: One call for many tensors; ``False`` is the same bit for bit, tensor by tensor, with less memory.
        compile: Compile the update; a learning rate that moves does not compile it again.

    Raises:
        ConfigurationError: An option out of range; a complex parameter or a sparse gradient.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> w.grad = torch.tensor([0.5, -1.0])
        >>> Lion([w], lr=0.1).step()
        >>> w.tolist()
        [0.8999999761581421, -1.899999976158142]

    Reference:
        Chen et al., 2023, "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675, Program 1.
    """

    traits = Traits(
        rule="x -= lr (sign(b1 m + (1-b1) g) + wd x)",
        paper="Chen et al., 2023, Symbolic Discovery of Optimization Algorithms, arXiv:2302.06675",
        state=1,
        example={"lr": 0.01},
        claim=Claim(sentence="a loss as low as AdamW's with half of its state", margin=0.02),
        peers=(Peer("pytorch_optimizer.Lion"), Peer("timm.optim.Lion", {"foreach": True})),
    )
    state_names = ("momentum",)
    rule = staticmethod(lion)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool = True,
        compile: bool = False,
    ) -> None:
        non_negative(lr=lr, weight_decay=weight_decay)
        b1, b2 = betas
        between(0.0, 1.0, beta1=b1, beta2=b2)
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": (b1, b2),
                "weight_decay": weight_decay,
                "maximize": maximize,
                "foreach": foreach,
                "compile": compile,
            },
        )

    def scalars(self, group: dict[str, Any], t: int) -> dict[str, Any]:
        b1, b2 = group["betas"]
        return {"lr": group["lr"], "b1": b1, "b2": b2, "wd": group["weight_decay"]}
