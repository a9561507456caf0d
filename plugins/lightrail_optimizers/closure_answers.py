"""What a closure says, put beside the parameters that a method moves.

A closure answers for all of its parameters in its own order; a method moves those of its groups that have a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightrail.errors import ClosureError
from lightrail.step import Closure
from lightrail.step.sharded import whole_of
from lightrail_optimizers.flat_vector import working_dtype
from lightrail_optimizers.sophia_rule import draw_directions, hutchinson
from lightrail_optimizers.tensor_lists import refuse_sparse

__all__ = [
    "Moving",
    "answers_for",
    "average_curvature_",
    "gradients",
    "inner",
    "moving",
    "points_of",
    "truncated",
    "wide",
]


Moving = list[tuple[dict[str, Any], list[Tensor]]]


def moving(optimizer: Optimizer, closure: Closure | None = None) -> Moving:
    """Each group with those of its parameters that have a gradient; no group that has none.

    Args:
        optimizer: Whose groups.
        closure: Must know each of them, where it is given.

    Raises:
        ConfigurationError: A gradient is sparse.
        ClosureError: The closure does not know one of them.
    """
    name = type(optimizer).__name__
    known = None if closure is None else set(closure.params)
    found = [(group, [p for p in group["params"] if p.grad is not None]) for group in optimizer.param_groups]
    for p in (p for _, x in found for p in x):
        if p.grad is not None and p.grad.is_sparse:
            refuse_sparse(name, p.grad)
        if known is not None and p not in known:
            raise ClosureError(
                f"the closure does not know a parameter of {name}",
                found=f"a parameter of shape {tuple(p.shape)} that is not among closure.params",
                allowed="lightrail.Closure over every parameter of the optimizer",
                remedy="Pass the same parameters to lightrail.Closure and to the optimizer.",
            )
    return [(group, x) for group, x in found if x]


def gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of parameters that all have one, not copied."""
    return [p.grad for p in params if p.grad is not None]


def answers_for(params: Sequence[Tensor], closure: Closure, answers: Sequence[Tensor]) -> list[Tensor]:
    """The answers of a closure, one for each of its own parameters, in the order of ``params``."""
    by_parameter = dict(zip(closure.params, answers, strict=True))
    return [by_parameter[p] for p in params]


def points_of(closure: Closure, params: Sequence[Tensor], points: Sequence[Tensor]) -> list[Tensor]:
    """Where ``closure.at`` shall evaluate: ``params`` at ``points``, the closure's others where they are."""
    by_parameter = dict(zip(params, points, strict=True))
    return [by_parameter.get(p, p.detach()) for p in closure.params]


def wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same numbers in single precision at least."""
    return [t.to(working_dtype([t])) for t in tensors]


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The inner product of two lists of tensors as vectors; 0 where there is nothing.

    Example:
        >>> inner([torch.tensor([1.0, 2.0]), torch.tensor(3.0)], [torch.tensor([1.0, 1.0]), torch.tensor(2.0)])
        9.0
    """
    if not a:
        return 0.0
    products = torch._foreach_mul(wide(a), wide(b))
    device, dtype = products[0].device, working_dtype(products)
    return math.fsum(torch.stack([whole_of(p.sum()).to(device, dtype) for p in products]).tolist())


def average_curvature_(optimizer: Optimizer, closure: Closure, groups: Moving, warm_up: int) -> list[list[Tensor]]:
    """``D = b2 D + (1-b2) z ⊙ (H z)``, z of random signs; the first D is the mean of ``warm_up`` such draws.

    Args:
        optimizer: Keeps D in its state as ``curvature``; its groups have ``beta2``.
        closure: Multiplies by the Hessian, once for parameters that have a D and ``warm_up`` times for others.
        groups: From :func:`moving`.
        warm_up: Draws for the first D.

    Returns:
        D, a list for each group.
    """
    state = optimizer.state
    new = [p for _, x in groups for p in x if "curvature" not in state[p]]
    known = [(group, old) for group, x in groups if (old := [p for p in x if "curvature" in state[p]])]
    if known:
        draw = _draw(closure)
        for group, x in known:
            d = [state[p]["curvature"] for p in x]
            torch._foreach_lerp_(d, answers_for(x, closure, draw), 1 - group["beta2"])
    if new:
        d = wide([torch.zeros_like(p, memory_format=torch.preserve_format) for p in new])
        for _ in range(warm_up):
            torch._foreach_add_(d, wide(answers_for(new, closure, _draw(closure))), alpha=1 / warm_up)
        for p, first in zip(new, d, strict=True):
            state[p]["curvature"] = first.to(p.dtype)
    return [[state[p]["curvature"] for p in x] for _, x in groups]


def truncated(d: Sequence[Tensor], alpha: float) -> list[Tensor]:
    """``D̂ = max(|D|, alpha)``, as new tensors in single precision at least."""
    d_hat = list(torch._foreach_abs(wide(d)))
    torch._foreach_clamp_min_(d_hat, alpha)
    return d_hat


def _draw(closure: Closure) -> list[Tensor]:
    z = draw_directions(closure.params, "rademacher")
    return hutchinson(z, closure.hvp(z))
