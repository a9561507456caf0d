"""Clipping of each entry of the gradient at one value."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightrail.options import between
from lightrail.step import Closure, Transform
from lightrail.traits import Traits
from lightrail_optimizers.dense_gradients import dense_gradients
from lightrail_optimizers.tensor_lists import global_norm, refuse_complex

__all__ = ["ClipValue", "clip_coordinates"]


def clip_coordinates(g: Tensor, threshold: float | Tensor) -> None:
    """``g_i = sign(g_i) min(|g_i|, threshold)``, in place.

    Args:
        g: Any shape, dense and real.
        threshold: > 0; a 0-d tensor on an accelerator is not waited for. One that the dtype of ``g`` cannot hold clips
            nothing.

    Example:
        >>> g = torch.tensor([-3.0, 0.5])
        >>> clip_coordinates(g, 1.0)
        >>> g.tolist()
        [-1.0, 0.5]
    """
    if isinstance(threshold, Tensor) and threshold.device.type == "cpu":
        threshold = float(threshold)  # here a clamp by tensors takes ten times as long
    if isinstance(threshold, Tensor):
        threshold = threshold.to(g)
        torch.clamp(g, -threshold, threshold, out=g)
    elif threshold <= torch.finfo(g.dtype).max:
        g.clamp_(-threshold, threshold)


class ClipValue(Transform):
    """Clips each entry of the gradient to a largest magnitude.

    ``g_i = sign(g_i) min(|g_i|, max_value)``.

    Args:
        max_value: The magnitude that is kept to, > 0; ``inf`` clips nothing.

    Raises:
        ConfigurationError: An option out of range, a complex parameter, or a sparse gradient.

    Guarantees:
        Entries within the bound are untouched, bit for bit. NaN stays; an infinite entry becomes ``max_value``, as
        with torch's ``clip_grad_value_``.

    Example:
        >>> from lightrail import Closure, TransformedOptimizer
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=1.0), [ClipValue(max_value=1.0)])
        >>> loss = optimizer.step(Closure(lambda: (w * torch.tensor([-3.0, 0.5])).sum(), [w]))
        >>> w.tolist()
        [1.0, -0.5]

    Reference:
        Mikolov, 2012, "Statistical Language Models Based on Neural Networks", PhD thesis, Brno University of
        Technology; discussed by Pascanu, Mikolov and Bengio, 2013, arXiv:1211.5063, beside their Algorithm 1.
    """

    traits = Traits(
        rule="g_i = sign(g_i) min(|g_i|, max_value)",
        paper="Mikolov, 2012, Statistical Language Models Based on Neural Networks, PhD thesis, Brno",
        state=0,
        example={"max_value": 0.05},
    )

    def __init__(self, max_value: float = 1.0) -> None:
        between(0.0, math.inf, closed="right", max_value=max_value)
        self.max_value = max_value
        self._largest: Tensor | None = None

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        refuse_complex("clip_value", params)
        _, gradients = dense_gradients("clip_value", params)
        self._largest = global_norm(gradients, math.inf)
        for g in gradients:
            clip_coordinates(g, self.max_value)

    def logged(self) -> dict[str, float]:
        return {} if self._largest is None else {"largest_gradient": float(self._largest)}
