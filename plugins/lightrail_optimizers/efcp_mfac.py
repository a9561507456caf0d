"""EFCP with M-FAC: the inverse Fisher matrix of gradients that were compressed with error feedback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightrail.options import at_least, positive
from lightrail.traits import Claim, Traits
from lightrail_optimizers.compressed_window import LowRankWindow
from lightrail_optimizers.efcp_base import EFCP, EFCP_PAPER, check_top_k, top_k_window
from lightrail_optimizers.flat_vector import state_holder
from lightrail_optimizers.gradient_window import Window, newest_row
from lightrail_optimizers.mfac import mfac

__all__ = ["EFCPLowRankMFAC", "EFCPTopKMFAC"]


class _EFCPMFAC(EFCP):
    def __init__(self, params: Any, options: dict[str, Any]) -> None:
        positive(damping=options["damping"])
        super().__init__(params, options)

    def preconditioned(self, group: dict[str, Any], kept: dict[str, Any], window: Window, x: Tensor | None) -> Tensor:
        m = group["window"]
        return mfac(window, kept["gram"], newest_row(kept, m), m=m, damping=group["damping"], x=x)


class EFCPTopKMFAC(_EFCPMFAC):
    """S-MFAC: M-FAC over sparse gradients, whose omitted entries come back through error feedback.

    ``a = e + g``; ``c`` is a at its k largest entries, 0 elsewhere; ``e = a - c``; c enters the window; ``u = F^-1 c``
    with ``F = λ I + (1/m) Σ c_i c_i^T``; ``v = momentum v + u``; ``x *= 1 - lr wd``; ``x -= lr v``.

    Under a density of 1 and without momentum it is M-FAC, bit for bit. The direction is long at first, as M-FAC's: up
    to ``sqrt(m/λ) / 2``. Warm the learning rate up over the first m steps, or take a larger damping.

    Args:
        params: Parameters or parameter groups. Each group has a window of its own.
        lr: Learning rate, >= 0.
        density: The share of entries that are kept, in (0, 1]; one entry at least.
        window: m, >= 1. It is allocated at the first step: ``m density`` numbers and indices for each parameter.
        damping: λ, > 0, in units of a squared gradient; the paper takes 1e-7 to 1e-4.
        momentum: In [0, 1), of a sum of directions.
        weight_decay: >= 0.
        decay_form: ``decoupled`` as above, or ``preconditioned``: ``u = F^-1 (c + wd x)``.
        selection: ``global`` finds the largest entries of all parameters of a group together, ``tensor`` of each.
        precondition: ``compressed`` as above, or ``gradient``: ``u = F^-1 g``, which has no zeros.
        maximize: Ascend.

    Raises:
        ConfigurationError: An option out of range; a complex or sharded parameter, or a sparse gradient.

    Deviations:
        The published code takes the largest entries of all parameters together, has one window over all groups,
        shrinks by ``1 - wd`` whatever the learning rate, and can apply both forms of decay at once.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> optimizer = EFCPTopKMFAC([w], lr=17.0, density=0.5, window=1, damping=1.0)
        >>> optimizer.step()
        >>> [round(number, 4) for number in w.tolist()], optimizer.state[w]["error"].tolist()
        ([1.0, -6.0], [3.0, 0.0])

    Reference:
        Modoranu, Kalinov, Kurtic, Frantar and Alistarh, 2023, "Error Feedback Can Accurately Compress
        Preconditioners", arXiv:2306.06098, sparse M-FAC.
    """

    traits = Traits(
        rule="c = top-k(e + g); e = e + g - c; x -= lr (λ I + C^T C / m)^-1 c, C the last m of c",
        paper=EFCP_PAPER,
        state=21.48,  # 2 m density + 1, and m² numbers a group
        needs_whole_tensors=True,
        example={"lr": 0.02, "density": 0.25, "window": 8, "damping": 0.1, "momentum": 0.5, "selection": "tensor"},
        claim=Claim(
            sentence="as good as M-FAC, in a fraction of its memory",
            baseline="mfac",
            baseline_options={"window": 64},
            problems=("digits",),
            options={"window": 64},
            margin=0.02,
        ),
    )

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        density: float = 0.01,
        window: int = 1024,
        damping: float = 1e-4,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        decay_form: str = "decoupled",
        selection: str = "global",
        precondition: str = "compressed",
        maximize: bool = False,
    ) -> None:
        options = {
            "lr": lr,
            "density": density,
            "window": window,
            "damping": damping,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "decay_form": decay_form,
            "selection": selection,
            "precondition": precondition,
            "maximize": maximize,
        }
        check_top_k(options)
        super().__init__(params, options)

    def window(self, group: dict[str, Any], kept: dict[str, Any], params: Sequence[Tensor], g: Tensor) -> Window:
        return top_k_window(group, kept, params, g)


class EFCPLowRankMFAC(_EFCPMFAC):
    """LR-MFAC: M-FAC over gradients of low rank, whose remainders come back through error feedback.

    ``a = e + g``; for each matrix in it ``P = orth(a Q)``, ``Q = a^T P``, ``c = P Q^T`` with Q from the step before;
    ``e = a - c``; c enters the window; ``u = F^-1 c`` with ``F = λ I + (1/m) Σ c_i c_i^T``; ``v = momentum v + u``;
    ``x *= 1 - lr wd``; ``x -= lr v``.

    A tensor of more dimensions is the matrix of its first and all others. Vectors, and matrices so small that their
    factors would be no smaller, are kept whole. The direction is long at first, as M-FAC's: up to ``sqrt(m/λ) / 2``.
    Warm the learning rate up over the first m steps, or take a larger damping.

    Args:
        params: Parameters or parameter groups. Each group has a window of its own.
        lr: Learning rate, >= 0.
        rank: Of the factors, >= 1; the paper takes 1 to 4.
        window: m, >= 1. It is allocated at the first step: ``m rank (rows + columns)`` numbers for each matrix.
        damping: λ, > 0, in units of a squared gradient.
        momentum: In [0, 1), of a sum of directions.
        weight_decay: >= 0.
        decay_form: ``decoupled`` as above, or ``preconditioned``: ``u = F^-1 (c + wd x)``.
        precondition: ``compressed`` as above, or ``gradient``: ``u = F^-1 g``, which costs rank times more.
        maximize: Ascend.

    Raises:
        ConfigurationError: An option out of range; a complex or sharded parameter, or a sparse gradient.

    Deviations:
        The published code offers no other weight decay than one added to the gradient, averages its momentum
        (``(1 - momentum) u``), and orthogonalizes by Gram and Schmidt, which stays at zero once a gradient was zero.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.ones(3, 3))
        >>> w.grad = torch.outer(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([0.0, 0.0, 1.0]))
        >>> EFCPLowRankMFAC([w], lr=20.0, window=1, damping=1.0).step()
        >>> [[round(number, 4) for number in row] for row in w.tolist()]
        [[1.0, 1.0, -1.0], [1.0, 1.0, -3.0], [1.0, 1.0, -3.0]]

    Reference:
        Modoranu, Kalinov, Kurtic, Frantar and Alistarh, 2023, "Error Feedback Can Accurately Compress
        Preconditioners", arXiv:2306.06098, low-rank M-FAC.
    """

    traits = Traits(
        rule="c = P Q^T near e + g; e = e + g - c; x -= lr (λ I + C^T C / m)^-1 c, C the last m of c",
        paper=EFCP_PAPER,
        state=37.4,  # on the network of the check; m rank (rows + columns) / (rows columns) + 1 on a large matrix
        needs_whole_tensors=True,
        is_stochastic=True,
        example={"lr": 0.02, "window": 8, "damping": 0.1, "momentum": 0.5},
        claim=Claim(
            sentence="as good as M-FAC, in a fraction of its memory",
            baseline="mfac",
            baseline_options={"window": 64},
            problems=("digits",),
            options={"window": 64},
            margin=0.02,
        ),
    )

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        rank: int = 1,
        window: int = 1024,
        damping: float = 1e-4,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        decay_form: str = "decoupled",
        precondition: str = "compressed",
        maximize: bool = False,
    ) -> None:
        at_least(1, rank=rank)
        options = {
            "lr": lr,
            "rank": rank,
            "window": window,
            "damping": damping,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "decay_form": decay_form,
            "precondition": precondition,
            "maximize": maximize,
        }
        super().__init__(params, options)

    def window(self, group: dict[str, Any], kept: dict[str, Any], params: Sequence[Tensor], g: Tensor) -> Window:
        return LowRankWindow(kept, group["window"], params, group["rank"], g, state_holder(params).dtype)
