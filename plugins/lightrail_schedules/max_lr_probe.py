"""The largest learning rate at which gradient descent on a batch is stable, from the top of its Hessian."""

from __future__ import annotations

import math

from lightrail.options import at_least, between
from lightrail.step import Closure
from lightrail.step.curvature import extreme_eigenvalues

__all__ = ["max_lr_probe", "sharpness_of", "stable_lr"]


def sharpness_of(closure: Closure, steps: int = 30) -> float:
    """The largest eigenvalue of the Hessian of the closure's loss, by Lanczos; NaN where the loss is not finite."""
    return extreme_eigenvalues(closure.hvp, closure.params, steps=steps)[1]


def stable_lr(sharpness: float, momentum: float = 0.0, *, dampening: float = 0.0, nesterov: bool = False) -> float:
    """``2 (1+mu) / lambda``: above it SGD leaves a quadratic valley of curvature lambda.

    With Nesterov's momentum ``2 (1+mu) / ((1+2mu) lambda)``; dampening divides the bound by ``1 - dampening``.

    Args:
        sharpness: lambda.
        momentum: mu, as in torch's SGD.
        dampening: As in torch's SGD.
        nesterov: As in torch's SGD.

    Returns:
        The bound; infinite where lambda is not positive, NaN where it is not a number.

    Example:
        >>> stable_lr(4.0), round(stable_lr(4.0, momentum=0.9), 6)
        (0.5, 0.95)
    """
    if math.isnan(sharpness):
        return math.nan
    if sharpness <= 0 or dampening >= 1:
        return math.inf
    return 2 * (1 + momentum) / (sharpness * (1 + 2 * momentum if nesterov else 1 - dampening))


def max_lr_probe(closure: Closure, momentum: float = 0.0, *, nesterov: bool = False, steps: int = 30) -> float:
    """The largest stable learning rate of SGD at the current parameters, on the batch of a closure.

    ``2 (1+mu) / lambda_max``, lambda_max being the largest eigenvalue of the Hessian of the loss on that batch. The
    smaller the batch, the larger is lambda_max: a probe on the batches that one trains with is more honest than one on
    all data.

    Args:
        closure: The loss, on its batch.
        momentum: mu of SGD, in [0, 1).
        nesterov: Whether the momentum is Nesterov's.
        steps: Hessian-vector products at most, >= 1; each costs about two gradients.

    Returns:
        The bound; infinite where the Hessian has no positive eigenvalue, NaN where the loss is not finite.

    Raises:
        ConfigurationError: An option out of range.
        ClosureError: The loss cannot be differentiated twice.

    Deviations:
        The bound is that of a quadratic with a fixed batch. It is none for Adam and sign methods, whose step is
        measured by a preconditioned Hessian.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> closure = Closure(lambda: (torch.tensor([4.0, 1.0]) * w**2).sum() / 2, [w])
        >>> round(max_lr_probe(closure), 6), round(max_lr_probe(closure, momentum=0.9), 6)
        (0.5, 0.95)

    Reference:
        Granziol, Zohren and Roberts, 2022, "Learning Rates as a Function of Batch Size: A Random Matrix Theory
        Approach to Neural Network Training", Journal of Machine Learning Research 23, arXiv:2006.09092.
    """
    between(0.0, 1.0, momentum=momentum)
    at_least(1, steps=steps)
    return stable_lr(sharpness_of(closure, steps), momentum, nesterov=nesterov)
