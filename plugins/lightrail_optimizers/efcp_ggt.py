"""EFCP with GGT: the inverse root of the second moment of gradients that were compressed with error feedback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightrail.options import between, positive
from lightrail.traits import Claim, Traits
from lightrail_optimizers.efcp_base import EFCP, EFCP_PAPER, check_top_k, top_k_window
from lightrail_optimizers.gradient_window import Window, eigh, newest_row

__all__ = ["EFCPGGT", "ggt"]


def ggt(window: Window, gram: Tensor, j: int, *, eps: float, beta2: float = 1.0, x: Tensor | None = None) -> Tensor:
    """``((H^T H)^(1/2) + ε I)^-1 g`` for the gradient g in row j of G or, in its place, for any vector x.

    The rows of H are those of G, each times beta2 to the power of its age. With ``H H^T = V S² V^T``, it is
    ``H^T V (S + ε)^-1 V^T e_j`` for a row, and ``x/ε + H^T V S^-2 ((S + ε)^-1 - ε^-1) V^T H x`` for any x.

    Args:
        window: G.
        gram: K, ``G G^T`` over the n rows that are filled.
        j: The newest row.
        eps: ε, > 0.
        beta2: In (0, 1].
        x: The vector.
    """
    n = len(gram)
    age = (j - torch.arange(n, device=gram.device)) % n
    weights = torch.pow(torch.tensor(beta2, dtype=torch.float64, device=gram.device), age)
    s2, v = eigh(weights.unsqueeze(1) * gram.double() * weights)
    s = s2.sqrt()
    if x is None:
        return window.combination((weights * (v @ (v[j] / (s + eps)))).to(gram.dtype))
    # -1 / (ε s (s + ε)) is what stands before V^T H x. Along directions in which H vanishes so does H x.
    vanishes = s2 <= n * torch.finfo(gram.dtype).eps * s2.max()
    factor = torch.where(vanishes, 0.0, -1 / (eps * s * (s + eps)))
    y = v.t() @ (weights * window.products(n, x).double())
    return window.combination((weights * (v @ (factor * y))).to(gram.dtype)).add_(x, alpha=1 / eps)


class EFCPGGT(EFCP):
    """S-GGT: full-matrix AdaGrad over a window of sparse gradients, whose omitted entries come back by error feedback.

    ``a = e + g``; ``c`` is a at its k largest entries, 0 elsewhere; ``e = a - c``; c enters the window, the rows of G;
    ``u = ((G^T G)^(1/2) + ε I)^-1 c``; ``v = momentum v + u``; ``x *= 1 - lr wd``; ``x -= lr v``.

    The length of u is below 1, whatever that of the gradients. Under a density of 1 it is GGT.

    Args:
        params: Parameters or parameter groups. Each group has a window of its own.
        lr: Learning rate, >= 0: a bound on the length of a step without momentum.
        density: The share of entries that are kept, in (0, 1]; one entry at least.
        window: m, >= 1. It is allocated at the first step: ``m density`` numbers and indices for each parameter. A step
            takes O(m³), several times more than M-FAC's.
        eps: ε, > 0, in units of a gradient.
        beta2: Each step multiplies the gradients in the window by it, in (0, 1].
        momentum: In [0, 1), of a sum of directions.
        weight_decay: >= 0.
        decay_form: ``decoupled`` as above, or ``preconditioned``: ``u = ((G^T G)^(1/2) + ε I)^-1 (c + wd x)``.
        selection: ``global`` finds the largest entries of all parameters of a group together, ``tensor`` of each.
        precondition: ``compressed`` as above, or ``gradient``: g in place of c on the right.
        maximize: Ascend.

    Raises:
        ConfigurationError: An option out of range; a complex or sharded parameter, or a sparse gradient.

    Deviations:
        The published code adds 1e-6 to the eigenvalues of ``G G^T``; here it divides by nothing that may be zero, and
        needs no such floor. Its sparse form takes no beta2, its dense form averages gradients in place of directions,
        and applies beta2 to the eigenvalues only. Weight decay there is added to the gradient.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> EFCPGGT([w], lr=10.0, density=1.0, eps=5.0).step()
        >>> [round(number, 4) for number in w.tolist()]
        [-2.0, -6.0]

    Reference:
        Modoranu, Kalinov, Kurtic, Frantar and Alistarh, 2023, "Error Feedback Can Accurately Compress
        Preconditioners", arXiv:2306.06098, sparse GGT; after Agarwal et al., 2018, "Efficient Full-Matrix Adaptive
        Regularization", arXiv:1806.02958.
    """

    traits = Traits(
        rule="c = top-k(e + g); e = e + g - c; x -= lr ((C^T C)^(1/2) + ε I)^-1 c, C the last m of c",
        paper=EFCP_PAPER,
        state=3,  # 2 m density + 1, and m² numbers a group
        needs_whole_tensors=True,
        example={"lr": 0.1, "density": 0.25, "window": 8, "momentum": 0.5, "selection": "tensor"},
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
        lr: float = 1.0,
        density: float = 0.01,
        window: int = 100,
        eps: float = 1e-5,
        beta2: float = 1.0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        decay_form: str = "decoupled",
        selection: str = "global",
        precondition: str = "compressed",
        maximize: bool = False,
    ) -> None:
        positive(eps=eps)
        between(0.0, 1.0, closed="right", beta2=beta2)
        options = {
            "lr": lr,
            "density": density,
            "window": window,
            "eps": eps,
            "beta2": beta2,
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

    def preconditioned(self, group: dict[str, Any], kept: dict[str, Any], window: Window, x: Tensor | None) -> Tensor:
        j = newest_row(kept, group["window"])
        return ggt(window, kept["gram"], j, eps=group["eps"], beta2=group["beta2"], x=x)
