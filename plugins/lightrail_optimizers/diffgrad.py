"""diffGrad: Adam whose step is shorter where the gradient changes little."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightrail.options import between, non_negative, positive
from lightrail.traits import Claim, Peer, Traits
from lightrail_optimizers.adam_rule import adam_update
from lightrail_optimizers.tensor_lists import add_scaled_
from lightrail_optimizers.tensorwise import TensorwiseOptimizer

__all__ = ["DiffGrad", "diffgrad"]


def diffgrad(
    x: list[Tensor],
    g: list[Tensor],
    g_prev: list[Tensor],
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
    """One update, in place: Adam's moments; ``x -= lr k sigmoid(|g_prev - g|) m / (sqrt(v) + eps)``; ``g_prev = g``.

    ``k = sqrt(1-b2^t) / (1-b1^t)`` corrects the bias of both moments; g stands for ``g + wd x`` throughout.
    """
    if wd:
        g = list(torch._foreach_add(g, x, alpha=wd))
    u = adam_update(g, m, v, t=t, b1=b1, b2=b2, eps=eps, early_eps=True)
    xi = g_prev
    torch._foreach_sub_(xi, g)
    torch._foreach_abs_(xi)
    torch._foreach_sigmoid_(xi)
    torch._foreach_mul_(u, xi)
    add_scaled_(x, u, lr)
    torch._foreach_copy_(g_prev, g)


class DiffGrad(TensorwiseOptimizer):
    """diffGrad: Adam's step times a friction between a half, where the gradient stands still, and one.

    ``m = b1 m + (1-b1) g``; ``v = b2 v + (1-b2) g²``; ``x -= lr sqrt(1-b2^t) / (1-b1^t) xi m / (sqrt(v) + eps)`` with
    ``xi = sigmoid(|g_prev - g|)``, where ``g_prev`` is the gradient of the last step, 0 at first.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, >= 0; a gradient that does not change is followed at half of it.
        betas: ``(b1, b2)``, each in [0, 1).
        eps: Added to the root of the second moment before its bias is corrected, > 0.
        weight_decay: Coupled, >= 0: ``wd x`` is added to the gradient before all else, ``g_prev`` included.
        maximize: Ascend.
        foreach: One call for many tensors; ``False`` is the same bit for bit, tensor by tensor, with less memory.
        compile: Compile the update; a learning rate that moves does not compile it again.

    Raises:
        ConfigurationError: An option out of range; a complex parameter or a sparse gradient.

    Deviations:
        The code behind the first published results kept ``g_prev`` by reference, so that xi was a half from the
        second step on: Adam at half its learning rate. This keeps a copy, as the authors' second version does. xi
        depends on the scale of the loss, as published: gradients far below 1 leave it at a half.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> w.grad = torch.tensor([0.5, -1.0])
        >>> DiffGrad([w], lr=0.1).step()
        >>> [round(v, 4) for v in w.tolist()]
        [0.9378, -1.9269]

    Reference:
        Dubey, Chakraborty, Roy, Mukherjee, Singh, Chaudhuri, 2019, "diffGrad: An Optimization Method for Convolutional
        Neural Networks", arXiv:1909.11015.
    """

    traits = Traits(
        rule="x -= lr sigmoid(|g_prev - g|) m / (sqrt(v) + eps), bias-corrected",
        paper="Dubey, Chakraborty, Roy, Mukherjee, Singh, Chaudhuri, 2019, diffGrad: An Optimization Method for "
        "Convolutional Neural Networks, arXiv:1909.11015",
        state=3,
        example={"lr": 0.01},
        claim=Claim(sentence="a lower loss than Adam's", baseline="adam"),
        peers=(Peer("pytorch_optimizer.DiffGrad"),),
    )
    state_names = ("previous_gradient", "momentum", "second_moment")
    rule = staticmethod(diffgrad)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
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
