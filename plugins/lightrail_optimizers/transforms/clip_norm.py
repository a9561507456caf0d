"""Clipping of the gradient's norm."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightrail.options import between, positive
from lightrail.step import Closure, Transform
from lightrail.traits import Traits
from lightrail_optimizers.dense_gradients import dense_gradients
from lightrail_optimizers.tensor_lists import global_norm, refuse_complex

__all__ = ["ClipNorm", "clip_norm"]


def clip_norm(g: Sequence[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """``g *= min(1, max_norm / ||g||)``, in place, one norm over all tensors.

    Args:
        g: Gradients.
        max_norm: The norm that is kept to, > 0.
        norm_type: The p of the p-norm, > 0; ``math.inf`` for the largest magnitude.

    Returns:
        The norm before clipping: a 0-d tensor; nothing waits for it.

    Example:
        >>> g = [torch.tensor([3.0]), torch.tensor([4.0])]
        >>> clip_norm(g, 1.0).item()
        5.0
        >>> [round(t.item(), 4) for t in g]
        [0.6, 0.8]
    """
    norm = global_norm(g, norm_type)
    factor = (max_norm / norm).clamp(max=1.0)
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in g:
        by_device.setdefault(tensor.device, []).append(tensor)
    for device, tensors in by_device.items():
        torch._foreach_mul_(tensors, factor.to(device))
    return norm


class ClipNorm(Transform):
    """Shrinks the whole gradient to a largest norm, its direction unchanged.

    ``g *= min(1, max_norm / ||g||)``, one norm over all parameters.

    Args:
        max_norm: The norm that is kept to, > 0.
        norm_type: The p of the p-norm, > 0; ``inf`` for the largest magnitude.

    Raises:
        ConfigurationError: An option out of range, a complex parameter, or a sparse gradient.

    Guarantees:
        A gradient within the norm is untouched, bit for bit. One that is not finite stays so.

    Deviations:
        torch's ``clip_grad_norm_`` adds 1e-6 to the norm, so that it clips to slightly less; nothing is added here.

    Example:
        >>> from lightrail import Closure, TransformedOptimizer
        >>> w = torch.nn.Parameter(torch.tensor([30.0, 40.0]))
        >>> optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=1.0), [ClipNorm(max_norm=5.0)])
        >>> loss = optimizer.step(Closure(lambda: (w**2).sum() / 2, [w]))
        >>> w.tolist()
        [27.0, 36.0]

    Reference:
        Pascanu, Mikolov and Bengio, 2013, "On the difficulty of training Recurrent Neural Networks",
        arXiv:1211.5063, Algorithm 1.
    """

    traits = Traits(
        rule="g *= min(1, max_norm / ||g||)",
        paper=(
            "Pascanu, Mikolov, Bengio, 2013, On the difficulty of training Recurrent Neural Networks, arXiv:1211.5063"
        ),
        state=0,
        example={"max_norm": 1.0},
    )

    def __init__(self, max_norm: float = 1.0, norm_type: float = 2.0) -> None:
        positive(max_norm=max_norm)
        between(0.0, math.inf, closed="right", norm_type=norm_type)
        self.max_norm = max_norm
        self.norm_type = norm_type
        self._norm: Tensor | None = None

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        refuse_complex("clip_norm", params)
        self._norm = clip_norm(dense_gradients("clip_norm", params)[1], self.max_norm, self.norm_type)

    def logged(self) -> dict[str, float]:
        return {} if self._norm is None else {"gradient_norm": float(self._norm)}
