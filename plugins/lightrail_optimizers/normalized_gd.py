"""Gradient descent on a gradient that is divided by a power of its norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightrail.options import between, non_negative
from lightrail.traits import Claim, Traits
from lightrail_optimizers.tensor_lists import add_scaled_, gather, global_norm
from lightrail_optimizers.tensorwise import TensorwiseOptimizer

__all__ = ["NormalizedGD", "normalized_step"]


def normalized_step(x: list[Tensor], v: list[Tensor], norm: Tensor, *, lr: float, beta: float = 1.0) -> None:
    """``x -= lr v / norm^beta``, in place; where the norm is 0, x stays.

    Args:
        x: Parameters.
        v: A direction, such as the gradient.
        norm: Of the whole direction, of which ``v`` may be a part: a 0-d tensor.
    """
    by = torch.where(norm > 0, lr / norm.pow(beta), 0.0)
    add_scaled_(x, v, -by.to(x[0].device) if norm.device.type != "cpu" else -float(by))


class NormalizedGD(TensorwiseOptimizer):
    """Gradient descent whose step is shortened or lengthened by a power of the gradient's norm.

    ``x -= lr g / ||g||^beta``, one norm over all parameters. At ``beta=1`` every step is ``lr`` long, wherever it
    starts: it does not diverge where curvature grows with the gradient (polynomials, exponentials), and it does not
    settle closer than ``lr`` unless a schedule lowers that.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, >= 0: at ``beta=1`` the distance that all parameters move together.
        beta: In (0, 1]; at least as large as the power of the gradient's norm with which curvature grows.
        maximize: Ascend.

    Raises:
        ConfigurationError: An option out of range; a complex parameter or a sparse gradient.

    Deviations:
        The paper's method is deterministic, with the gradient of the whole loss. On batches the norm is that of a noisy
        gradient, which biases small ones; :class:`lightrail_optimizers.Spider` is the paper's method for batches.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> w.grad = torch.tensor([3e6, 4e6])
        >>> NormalizedGD([w], lr=0.5).step()
        >>> [round(value, 4) for value in w.tolist()]
        [2.7, 3.6]

    Reference:
        Chen, Zhou, Liang and Lu, 2023, "Generalized-Smooth Nonconvex Optimization is As Efficient As Smooth Nonconvex
        Optimization", arXiv:2303.02854, beta-normalized gradient descent.
    """

    traits = Traits(
        rule="x -= lr g / ||g||^beta",
        paper=(
            "Chen, Zhou, Liang, Lu, 2023, Generalized-Smooth Nonconvex Optimization is As Efficient As Smooth "
            "Nonconvex Optimization, arXiv:2303.02854"
        ),
        state=0,
        needs_whole_tensors=True,
        example={"lr": 0.01},
        claim=Claim(sentence="a lower loss than gradient descent's", baseline="sgd"),
    )

    def __init__(self, params: Any, lr: float = 0.01, beta: float = 1.0, maximize: bool = False) -> None:
        non_negative(lr=lr)
        between(0.0, 1.0, closed="right", beta=beta)
        super().__init__(params, {"lr": lr, "beta": beta, "maximize": maximize})

    def update(self) -> None:
        """Takes the norm of the whole gradient, then the step."""
        name = type(self).__name__
        lists = [(group, x, g) for group in self.param_groups for x, g in gather(name, group, self.state, ())]
        norm = global_norm([g_i for _, _, g in lists for g_i in g])
        for group, x, g in lists:
            sign = -1.0 if group["maximize"] else 1.0
            normalized_step(x, g, norm, lr=sign * float(group["lr"]), beta=group["beta"])
