"""How the learning rate answers a larger batch."""

from __future__ import annotations

from lightrail import Extent
from lightrail.options import one_of

__all__ = ["RULES", "rate_factor"]

RULES = ("none", "auto", "linear", "sqrt")


def rate_factor(rule: str, samples: int, extent: Extent) -> float:
    """``(b / b0)^p`` with p = 1 (linear), 1/2 (sqrt) or 0 (none).

    Args:
        rule: ``auto`` is linear where the optimizer's update grows with the gradient, and the square root elsewhere.
        samples: b, of the step.
        extent: Its ``batch_size`` is b0.

    Example:
        >>> rate_factor("auto", 128, Extent(1000, 32, None, scales_with_gradient=False))
        2.0
    """
    one_of(RULES, lr_rule=rule)
    if rule == "auto":
        rule = "linear" if extent.scales_with_gradient else "sqrt"
    return (samples / extent.batch_size) ** {"none": 0.0, "linear": 1.0, "sqrt": 0.5}[rule]
