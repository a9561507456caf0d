"""SAM: the gradient at the worst point nearby."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightrail.options import non_negative
from lightrail.step import Closure, Transform
from lightrail.traits import Traits
from lightrail_optimizers.tensor_lists import global_norm

__all__ = ["SAM", "climb"]


def climb(x: Sequence[Tensor], g: Sequence[Tensor | None], rho: float, adaptive: bool = False) -> list[Tensor]:
    """The worst point nearby, to first order: ``x + rho T² g / ||T g||``; T is 1, or ``|x|`` where adaptive.

    Args:
        x: Parameters.
        g: Gradients; a parameter without one stays where it is.
        rho: Radius, >= 0.
        adaptive: Whether a coordinate's reach grows with its magnitude.

    Returns:
        New tensors, one a parameter. Where the whole gradient is zero, copies of ``x``.

    Example:
        >>> point = climb([torch.tensor([1.0, 2.0]).double()], [torch.tensor([3.0, 4.0]).double()], 0.5)
        >>> [round(value, 6) for value in point[0].tolist()]
        [1.3, 2.4]
    """
    scaled = [x_i.abs() * g_i if adaptive and g_i is not None else g_i for x_i, g_i in zip(x, g, strict=True)]
    norm = global_norm([s for s in scaled if s is not None])
    reach = torch.where(norm > 0, rho / norm, 0.0)
    points = []
    for x_i, s in zip(x, scaled, strict=True):
        if s is None:
            points.append(x_i.detach().clone())
        else:
            points.append(x_i.detach() + reach.to(s) * (x_i.abs() * s if adaptive else s))
    return points


class SAM(Transform):
    """Sharpness-aware minimization: climbs to the worst point within a radius and takes the gradient there.

    ``e = rho g / ||g||``, one norm over all parameters; the optimizer steps from x with the gradient at ``x + e``.

    Args:
        rho: Radius, >= 0; 0 is the optimizer without SAM, bit for bit, at the price of one evaluation.
        adaptive: ASAM: ``e = rho x² g / || |x| g ||``, unchanged when layers are rescaled; use a radius about ten
            times as large.

    Raises:
        ConfigurationError: ``rho`` is negative.
        ClosureError: The closure cannot evaluate elsewhere.

    Guarantees:
        Both evaluations see the same micro-batches and the same dropout masks; BatchNorm statistics move once.

    Deviations:
        The published ASAM leaves biases unscaled and adds 0.01 to ``|x|``; here every parameter is treated alike and
        nothing is added.

    Example:
        >>> from lightrail import Closure, TransformedOptimizer
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [SAM(rho=0.5)])
        >>> loss = optimizer.step(Closure(lambda: (w**2).sum() / 2, [w]))
        >>> [round(value, 4) for value in w.tolist()]
        [2.67, 3.56]

    Reference:
        Foret, Kleiner, Mobahi and Neyshabur, 2021, "Sharpness-Aware Minimization for Efficiently Improving
        Generalization", arXiv:2010.01412, Algorithm 1. Adaptive: Kwon, Kim, Park and Choi, 2021, "ASAM",
        arXiv:2102.11600, Algorithm 1.
    """

    traits = Traits(
        rule="g = gradient at x + rho g / ||g||",
        paper=(
            "Foret, Kleiner, Mobahi, Neyshabur, 2021, Sharpness-Aware Minimization for Efficiently Improving "
            "Generalization, arXiv:2010.01412"
        ),
        state=0,
        extra_evaluations=1,
        needs_closure=True,
        example={"rho": 0.05},
    )

    def __init__(self, rho: float = 0.05, adaptive: bool = False) -> None:
        non_negative(rho=rho)
        self.rho = rho
        self.adaptive = adaptive

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        if self.rho == 0:
            return
        points = climb(closure.params, [p.grad for p in closure.params], self.rho, self.adaptive)
        with closure.at(points):
            closure()
