"""CAGrad: near the mean gradient, the direction that is best for the objective that gains least."""

from __future__ import annotations

import numpy as np
import scipy.optimize
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightrail.options import non_negative
from lightrail.traits import Traits
from lightrail_optimizers.dual_cone import project
from lightrail_optimizers.jacobian_descent import JacobianDescent

__all__ = ["CAGrad", "cagrad_weights"]

Array = NDArray[np.float64]

# Of the mean row: a combination shorter than this is taken to vanish.
_VANISHING = 1e-6


def cagrad_weights(g: Tensor, c: float) -> Tensor:
    """The weights of ``d = argmax min_i g_i · d`` over ``||d - g_0|| <= c ||g_0||``, where g_0 is the mean row.

    Its dual: ``d = g_0 + c ||g_0|| / ||g_w|| g_w``, where ``g_w = Jᵀ w`` minimizes ``g_w · g_0 + c ||g_0|| ||g_w||``
    over ``w >= 0, Σ w_i = 1``.

    Args:
        g: The Gramian ``G = J Jᵀ``, ``[m, m]``, in double precision.
        c: >= 0.

    Returns:
        ``[m]``. Where g_w vanishes, those of the direction nearest to g_0 that conflicts with no row.

    Example:
        >>> cagrad_weights(torch.tensor([[1.0, 0.0], [0.0, 4.0]]).double(), 0.0).tolist()
        [0.5, 0.5]
    """
    count = len(g)
    mean = g.new_full((count,), 1 / count)
    scale = float(g.diagonal().mean())
    length = float(mean @ g @ mean / scale) ** 0.5 if scale > 0 else 0.0
    if count < 2 or c == 0 or length <= 0:
        return mean
    normalised = (g / scale).numpy()
    w = _least_favourable(normalised, c * length)
    size = _length(normalised, w)
    if size <= _VANISHING * length:
        return project(g, mean)
    return mean + c * length / size * torch.from_numpy(w)


def _length(g: Array, w: Array) -> float:
    """``||Jᵀ w||``; rounding may bring its square below 0."""
    return float(np.sqrt(max(w @ g @ w, 0.0)))


def _least_favourable(g: Array, radius: float) -> Array:
    """The minimum of ``wᵀ G 1/m + radius sqrt(wᵀ G w)`` over convex weights, for a Gramian with diagonal near 1."""
    count = len(g)
    slope, floor = g.mean(1), 1e-9  # the floor keeps the length differentiable where it is 0

    def value(w: Array) -> float:
        return float(slope @ w + radius * np.hypot(_length(g, w), floor))

    def gradient(w: Array) -> Array:
        return slope + radius * (g @ w) / np.hypot(_length(g, w), floor)

    found = scipy.optimize.minimize(
        value,
        np.full(count, 1 / count),
        jac=gradient,
        method="SLSQP",
        bounds=[(0.0, 1.0)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(count)},
        options={"ftol": 1e-15, "maxiter": 200},
    )
    w = found.x.clip(0)
    return w / w.sum()


class CAGrad(JacobianDescent):
    """Conflict-averse gradient descent: leaves the mean gradient, within ``c``, for the sake of the worst objective.

    ``d = argmax min_i g_i · d`` over ``||d - g_0|| <= c ||g_0||``, where g_0 is the mean of the objectives' gradients.

    Args:
        c: Radius relative to g_0, >= 0. 0 is the mean; the larger, the closer to the direction of MGDA. Below 1 it
            converges to a stationary point of the mean, from 1 on to any Pareto-stationary one.

    Raises:
        ConfigurationError: ``c`` is negative.
        CompositionError: The task has no ``objectives``.

    Guarantees:
        The objective that gains least gains no less than along g_0. d scales with the gradients, however small.

        What a transform earlier in the chain did to the loss's gradient g is kept as a difference:
        ``.grad = d + (g_edited - g)``, at the price of one more evaluation. Clipping and masks belong after this one.

    Deviations:
        The published code can divide d by ``1 + c`` or ``1 + c²``; the paper and this do not. Where the combination of
        the dual problem vanishes, d is the direction nearest to g_0 that conflicts with no objective, which solves the
        problem; the published code divides by the vanishing length plus 1e-8.

    Example:
        >>> from lightrail import Closure, TransformedOptimizer
        >>> w = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        >>> J = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=1.0), [CAGrad(c=0.5)])
        >>> loss = optimizer.step(Closure(lambda: (J @ w).mean(), [w], objectives_fn=lambda: J @ w))
        >>> [round(value, 4) for value in (-w).tolist()]
        [0.75, 0.75]

    Reference:
        Liu, Liu, Jin, Stone and Liu, 2021, "Conflict-Averse Gradient Descent for Multi-task Learning",
        arXiv:2110.14048, Algorithm 1.
    """

    traits = Traits(
        rule="g = argmax min_i g_i · d over ||d - g_0|| <= c ||g_0||",
        paper=(
            "Liu, Liu, Jin, Stone, Liu, 2021, Conflict-Averse Gradient Descent for Multi-task Learning, "
            "arXiv:2110.14048"
        ),
        state=0,
        extra_evaluations=1,
        needs_objectives=True,
        needs_whole_tensors=True,
    )

    def __init__(self, c: float = 0.5) -> None:
        super().__init__()
        non_negative(c=c)
        self.c = c

    def weights(self, g: Tensor) -> Tensor:
        return cagrad_weights(g, self.c)
