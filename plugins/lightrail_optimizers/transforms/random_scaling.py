"""Updates as long as an exponential random number says."""

from __future__ import annotations

import torch
from torch import Tensor

from lightrail.step import Transform
from lightrail.traits import Traits
from lightrail_optimizers.rs_sgdm import draw_exponential

__all__ = ["RandomScaling", "scale_update_"]


def scale_update_(x: list[Tensor], previous: list[Tensor], s: float) -> None:
    """``x = previous + s (x - previous)``, in place; ``s = 1`` changes nothing, bit for bit.

    Example:
        >>> x = [torch.tensor([3.0])]
        >>> scale_update_(x, [torch.tensor([1.0])], 2.0)
        >>> x[0].item()
        5.0
    """
    torch._foreach_lerp_(x, previous, 1 - s)


class RandomScaling(Transform):
    """Scales every update of any optimizer by one exponential random number of mean 1.

    ``s ~ Exp(1)``, one number a step for all parameters; ``x = x_prev + s (x_new - x_prev)``.

    The random scale makes the loss's change over a step equal, in expectation, its gradient at the new point times the
    update, which is what the guarantee for losses that are neither smooth nor convex rests on. The paper finds accuracy
    as good as without it, not better. Any optimizer and any learning rate do; decoupled weight decay is part of the
    update and is scaled with it.

    Guarantees:
        s comes from torch's global generator, so an exact resume repeats it, and is the same on all ranks. A parameter
        that did not move stays, bit for bit.

    Deviations:
        The guarantee is for an average of the iterates with the momentum's memory. What is evaluated here is the
        iterate; ``callback=ema`` with ``decay`` at the momentum evaluates such an average, and the optimizer
        ``rs_sgdm`` is SGD with momentum with the scale and the average in one.

    Example:
        >>> from lightrail import Closure, TransformedOptimizer
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> _ = torch.manual_seed(0)
        >>> optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [scaling := RandomScaling()])
        >>> loss = optimizer.step(Closure(lambda: (w**2).sum() / 2, [w]))
        >>> bool(torch.isclose(w[1], 2 * w[0])), abs(w[0].item() - (1 - 0.1 * scaling.logged()["scale"])) < 1e-6
        (True, True)

    Reference:
        Zhang and Cutkosky, 2024, "Random Scaling and Momentum for Non-smooth Non-convex Optimization",
        arXiv:2405.09742: the conversion from online to non-convex optimization with exponential scaling.
    """

    traits = Traits(
        rule="x = x_prev + s (x_new - x_prev), s ~ Exp(1)",
        paper=(
            "Zhang, Cutkosky, 2024, Random Scaling and Momentum for Non-smooth Non-convex Optimization, "
            "arXiv:2405.09742"
        ),
        state=0,
        is_stochastic=True,
    )

    def __init__(self) -> None:
        self._scale: float | None = None

    def after_step(self, params: list[Tensor], previous: list[Tensor]) -> None:
        if params:
            self._scale = draw_exponential(params[0])
            scale_update_(params, previous, self._scale)

    def logged(self) -> dict[str, float]:
        return {} if self._scale is None else {"scale": self._scale}
