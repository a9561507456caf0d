"""M-FAC: the gradient over the empirical Fisher matrix of a window of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightrail.options import positive
from lightrail.traits import Claim, Traits
from lightrail_optimizers.flat_vector import state_holder
from lightrail_optimizers.gradient_window import DenseWindow, Window, insert, newest_row, solve_shifted
from lightrail_optimizers.window_optimizer import WindowOptimizer, add_decay_

__all__ = ["MFAC", "mfac"]


def mfac(window: Window, gram: Tensor, j: int, *, m: int, damping: float, x: Tensor | None = None) -> Tensor:
    """``F^-1 g`` with ``F = λ I + G^T G / m``, for the gradient g in row j of G or, in its place, for any vector x.

    By Woodbury's identity ``F^-1 x = (x - G^T (m λ I + K)^-1 G x) / λ`` with ``K = G G^T``. For a row of G it is
    ``m G^T (m λ I + K)^-1 e_j``, which is the same and does not lose the digits of a difference.

    Args:
        window: G; rows beyond those of K are zeros.
        gram: K, ``G G^T`` over the n rows that are filled.
        j: The row of the gradient.
        m: How many rows the window has, filled or not.
        damping: λ, > 0.
        x: The vector.
    """
    if x is None:
        e = gram.new_zeros(len(gram))
        e[j] = m
        return window.combination(solve_shifted(gram, m * damping, e))
    w = solve_shifted(gram, m * damping, window.products(len(gram), x))
    return window.combination(w).neg_().add_(x).div_(damping)


class MFAC(WindowOptimizer):
    """M-FAC: a natural gradient by the last m gradients, without forming their matrix.

    ``u = F^-1 g`` with ``F = λ I + (1/m) Σ G_i G_i^T`` over the last m gradients, the newest being g itself;
    ``v = momentum v + (1-momentum) u``; ``x -= lr v``. A step reads the window twice and solves one m × m system.

    The direction is long at first: up to ``sqrt(m/λ) / 2``, which is 5060 under the defaults, and about ``g/λ`` where
    ``|g|²`` is below ``m λ``. Warm the learning rate up over the first m steps, or take a larger damping; clipping
    the gradient does not help, since shorter gradients give longer directions.

    Args:
        params: Parameters or parameter groups. Each group has a window of its own.
        lr: Learning rate, >= 0.
        window: m, >= 1. It is allocated at the first step: m numbers for each parameter.
        damping: λ, > 0, in units of a squared gradient.
        momentum: In [0, 1), of an average of directions.
        weight_decay: Added to the gradient before anything else, times the parameter, >= 0.
        maximize: Ascend.

    Raises:
        ConfigurationError: An option out of range; a complex or sharded parameter, or a sparse gradient.

    Deviations:
        The published code has one window over all groups and takes the products in single precision throughout; here
        the m × m system is solved in double. It also masks weights that were pruned, and spreads the window over
        several devices; neither is offered.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> MFAC([w], lr=26.0, window=1, damping=1.0).step()
        >>> [round(number, 4) for number in w.tolist()]
        [-2.0, -6.0]

    Reference:
        Frantar, Kurtic and Alistarh, 2021, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information",
        arXiv:2107.03356, the dynamic algorithm.
    """

    traits = Traits(
        rule="x -= lr (λ I + G^T G / m)^-1 g, G the last m gradients",
        paper=(
            "Frantar, Kurtic, Alistarh, 2021, M-FAC: Efficient Matrix-Free Approximations of Second-Order Information, "
            "arXiv:2107.03356"
        ),
        state=1024,  # and m² numbers a group
        needs_whole_tensors=True,
        example={"lr": 0.05, "window": 8, "damping": 0.1, "momentum": 0.5},
        claim=Claim(
            sentence="a lower loss than SGD's",
            baseline="sgd",
            baseline_options={"momentum": 0.9},
            problems=("digits", "scaled_logistic"),
            options={"window": 64},
        ),
    )
    averages_momentum = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        window: int = 1024,
        damping: float = 1e-5,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        positive(damping=damping)
        super().__init__(
            params,
            {
                "lr": lr,
                "window": window,
                "damping": damping,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "maximize": maximize,
            },
        )

    def direction(self, group: dict[str, Any], kept: dict[str, Any], params: Sequence[Tensor], g: Tensor) -> Tensor:
        m = group["window"]
        if "window" not in kept:
            kept["window"] = torch.zeros(m, len(g), dtype=state_holder(params).dtype, device=g.device)
        if wd := group["weight_decay"]:
            add_decay_(g, params, wd)
        window = DenseWindow(kept["window"])
        insert(window, kept, m, g)
        return mfac(window, kept["gram"], newest_row(kept, m), m=m, damping=group["damping"])
