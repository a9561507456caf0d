"""Gradient centralization: each unit's gradient without its mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightrail.options import at_least
from lightrail.step import Closure, Transform
from lightrail.traits import Traits
from lightrail_optimizers.dense_gradients import dense_gradients

__all__ = ["Centralize", "centralize_"]


def centralize_(g: Tensor) -> Tensor:
    """``g_i -= mean(g_i)``, in place, for each slice ``g_i`` along the first axis.

    Args:
        g: Of two axes or more, not empty.

    Returns:
        The means, with as many axes as ``g``, in single precision at least.

    Example:
        >>> g = torch.tensor([[1.0, 3.0], [0.0, 4.0]])
        >>> centralize_(g).flatten().tolist()
        [2.0, 2.0]
        >>> g.tolist()
        [[-1.0, 1.0], [-2.0, 2.0]]
    """
    mean = g.mean(dim=tuple(range(1, g.dim())), keepdim=True, dtype=torch.promote_types(g.dtype, torch.float32))
    g.sub_(mean)
    return mean


class Centralize(Transform):
    """Takes the mean from the gradient of each unit's incoming weights: gradient centralization.

    ``g_i -= mean(g_i)`` over all axes but the first, for weights of two axes or more: the rows of a linear layer, the
    filters of a convolution. The mean of each unit's weights then stays where it began, under plain gradient descent.

    Args:
        min_axes: Weights of fewer axes are left alone, >= 2; 4 centralizes convolutions on images only.

    Raises:
        ConfigurationError: An option out of range, or a sparse gradient.

    Deviations:
        Units with a single incoming weight are left alone; to centralize them, as the published code does, makes
        their gradient zero. That code also centralizes weight decay and, under Adam, what Adam makes of the gradient;
        here it is the gradient, as in the paper's algorithms.

    Example:
        >>> from lightrail import Closure, TransformedOptimizer
        >>> w = torch.nn.Parameter(torch.zeros(1, 3))
        >>> optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=1.0), [Centralize()])
        >>> loss = optimizer.step(Closure(lambda: (w * torch.tensor([1.0, 2.0, 6.0])).sum(), [w]))
        >>> w.tolist()
        [[2.0, 1.0, -3.0]]

    Reference:
        Yong, Huang, Hua and Zhang, 2020, "Gradient Centralization: A New Optimization Technique for Deep Neural
        Networks", arXiv:2004.01461, equation 1 and Algorithms 1 and 2.
    """

    traits = Traits(
        rule="g_i -= mean(g_i) for each unit i",
        paper=(
            "Yong, Huang, Hua, Zhang, 2020, Gradient Centralization: A New Optimization Technique for Deep Neural "
            "Networks, arXiv:2004.01461"
        ),
        state=0,
        example={"min_axes": 2},
    )

    def __init__(self, min_axes: int = 2) -> None:
        at_least(2, min_axes=min_axes)
        self.min_axes = min_axes
        self._removed: list[tuple[Tensor, int]] = []

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        self._removed = []
        for g in dense_gradients("centralize", params)[1]:
            inputs = math.prod(g.shape[1:])
            if g.dim() >= self.min_axes and inputs > 1:
                self._removed.append((centralize_(g), inputs))

    def logged(self) -> dict[str, float]:
        if not self._removed:
            return {}
        squares = (inputs * float(mean.abs().square().sum()) for mean, inputs in self._removed)
        return {"norm_of_removed_means": math.sqrt(sum(squares))}
