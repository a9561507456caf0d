"""MARS: gradients corrected by their change since the last step, then AdamW, Lion or Shampoo."""

from __future__ import annotations

from typing import Any

from lightrail.traits import Claim, Peer, Traits
from lightrail_optimizers.mars_base import CorrectedOptimizer

__all__ = ["MARS", "MARSLion", "MARSShampoo"]

_PAPER = (
    "Yuan, Liu, Wu, Zhou, Gu, 2024, MARS: Unleashing the Power of Variance Reduction for Training Large Models, "
    "arXiv:2411.10438"
)


class MARS(CorrectedOptimizer):
    """MARS with AdamW: a gradient extrapolated from the last one, which reduces its variance, clipped tensor by tensor.

    ``c = g + gamma b1/(1-b1) (g - g_prev)``; for each tensor ``c /= max(1, |c|)``; then AdamW on c:
    ``m = b1 m + (1-b1) c``; ``v = b2 v + (1-b2) c²``; ``x *= 1 - lr wd``;
    ``x -= lr (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)``.

    ``g_prev`` is the gradient of the last step, 0 at first: the approximate form, which costs no evaluation.

    Args:
        params: Parameters or parameter groups. An option that a group sets for itself holds for all of its tensors.
        lr: Learning rate, >= 0.
        betas: ``(b1, b2)``, each in [0, 1).
        eps: Added to the root of the second moment, > 0.
        weight_decay: Decoupled, >= 0.
        gamma: Strength of the correction, >= 0; with 0, and gradients whose norm is below 1, it is AdamW.
        exact: Take as ``g_prev`` the gradient of the current batch at the previous parameters: a second evaluation a
            step, and a closure that can do it.
        optimize_1d: Correct tensors of fewer than two dimensions too; otherwise AdamW has them, with the next three.
        lr_1d: Of AdamW, >= 0; a schedule scales it together with ``lr``.
        betas_1d: Of AdamW, each in [0, 1).
        weight_decay_1d: Of AdamW, decoupled, >= 0.
        form: ``default`` corrects tensors of two dimensions or more; ``official`` those of exactly two.
        maximize: Ascend.
        foreach: One call for many tensors; ``False`` is the same to rounding, tensor by tensor, with less memory.
        compile: Compile the update; a learning rate that moves does not compile it again.

    Raises:
        ConfigurationError: An option out of range; a complex parameter or a sparse gradient.
        ClosureError: ``exact`` without a :class:`lightrail.Closure`.

    Deviations:
        The authors' code leaves the four-dimensional weights of convolutions to AdamW, so that on a convolutional
        network it is AdamW; ``form=official`` does so too. It takes ``gamma``, ``eps`` and the three options of
        AdamW for all groups at once; here each group has its own. The second moment averages c², as their code has
        it. Their exact form starts from ``g_prev = 0``; here the parameters before the first step are those at the
        first, and c is g there. There is no AMSGrad.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> w.grad = torch.tensor([0.5, -1.0])
        >>> optimizer = MARS([w], lr=0.1, weight_decay=0.1, optimize_1d=True)
        >>> optimizer.step()
        >>> [round(v, 4) for v in w.tolist()]
        [0.89, -1.88]
        >>> [len(group["params"]) for group in MARS(torch.nn.Linear(2, 3).parameters()).param_groups]  # matrix, bias
        [1, 1]

    Reference:
        Yuan et al., 2024, arXiv:2411.10438, the AdamW instance.
    """

    traits = Traits(
        rule="AdamW on c / max(1, |c|), c = g + gamma b1/(1-b1) (g - g_prev)",
        paper=_PAPER,
        state=3,
        needs_whole_tensors=True,
        example={"lr": 0.01, "lr_1d": 0.01},
        claim=Claim(sentence="a lower loss than AdamW's at equal tokens"),
        peers=(
            Peer("timm.optim.Mars"),
            Peer("pytorch_optimizer.MARS"),
            Peer("heavyball.AdamW", {"mars": True, "consume_grad": False}),
        ),
    )
    _of_matrices = _of_vectors = "mars_adamw"

    def __init__(
        self,
        params: Any,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gamma: float = 0.025,
        exact: bool = False,
        optimize_1d: bool = False,
        lr_1d: float = 3e-3,
        betas_1d: tuple[float, float] = (0.9, 0.95),
        weight_decay_1d: float = 0.1,
        form: str = "default",
        maximize: bool = False,
        foreach: bool = True,
        compile: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "gamma": gamma,
                "exact": exact,
                "optimize_1d": optimize_1d,
                "lr_1d": lr_1d,
                "betas_1d": betas_1d,
                "weight_decay_1d": weight_decay_1d,
                "form": form,
                "maximize": maximize,
                "foreach": foreach,
                "compile": compile,
            },
        )


class MARSLion(CorrectedOptimizer):
    """MARS with the sign of its momentum.

    ``c`` as in :class:`MARS`; ``m = b1 m + (1-b1) c``; ``x *= 1 - lr wd``; ``x -= lr sign(m)``.

    Args:
        params: Parameters or parameter groups. An option that a group sets for itself holds for all of its tensors.
        lr: Learning rate, >= 0: every coordinate of a corrected tensor moves by it. Smaller than for :class:`MARS`.
        beta: b1, in [0, 1).
        weight_decay: Decoupled, >= 0.
        gamma: Strength of the correction, >= 0.
        exact: Take as ``g_prev`` the gradient of the current batch at the previous parameters, at a second evaluation.
        optimize_1d: Correct tensors of fewer than two dimensions too; otherwise AdamW has them, with the next four.
        lr_1d: Of AdamW, >= 0; a schedule scales it together with ``lr``.
        betas_1d: Of AdamW, each in [0, 1).
        eps: Of AdamW, > 0.
        weight_decay_1d: Of AdamW, decoupled, >= 0.
        form: ``default`` corrects tensors of two dimensions or more; ``official`` those of exactly two.
        maximize: Ascend.
        foreach: One call for many tensors; ``False`` is the same to rounding, tensor by tensor, with less memory.
        compile: Compile the update; a learning rate that moves does not compile it again.

    Raises:
        ConfigurationError: An option out of range; a complex parameter or a sparse gradient.
        ClosureError: ``exact`` without a :class:`lightrail.Closure`.

    Deviations:
        Those of :class:`MARS`. Lion as published takes the sign of an interpolation between momentum and gradient;
        the authors of MARS take that of the momentum itself, and so does this.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> w.grad = torch.tensor([0.5, -1.0])
        >>> MARSLion([w], lr=0.1, weight_decay=0.1, optimize_1d=True).step()
        >>> [round(v, 4) for v in w.tolist()]
        [0.89, -1.88]

    Reference:
        Yuan et al., 2024, arXiv:2411.10438, the Lion instance.
    """

    traits = Traits(
        rule="x -= lr (sign(m) + wd x), m the average of c / max(1, |c|), c = g + gamma b1/(1-b1) (g - g_prev)",
        paper=_PAPER,
        state=2,
        needs_whole_tensors=True,
        example={"lr": 0.01, "lr_1d": 0.01},
        claim=Claim(sentence="a lower loss than Lion's", baseline="lion"),
    )
    _of_matrices = _of_vectors = "mars_lion"

    def __init__(
        self,
        params: Any,
        lr: float = 3e-3,
        beta: float = 0.95,
        weight_decay: float = 0.0,
        gamma: float = 0.025,
        exact: bool = False,
        optimize_1d: bool = False,
        lr_1d: float = 3e-3,
        betas_1d: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay_1d: float = 0.1,
        form: str = "default",
        maximize: bool = False,
        foreach: bool = True,
        compile: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "beta": beta,
                "weight_decay": weight_decay,
                "gamma": gamma,
                "exact": exact,
                "optimize_1d": optimize_1d,
                "lr_1d": lr_1d,
                "betas_1d": betas_1d,
                "eps": eps,
                "weight_decay_1d": weight_decay_1d,
                "form": form,
                "maximize": maximize,
                "foreach": foreach,
                "compile": compile,
            },
        )


class MARSShampoo(CorrectedOptimizer):
    """MARS with an orthogonalized momentum: Shampoo without its averages, as in Muon.

    ``c`` as in :class:`MARS`; ``m = b1 m + (1-b1) c``; ``x *= 1 - lr wd``; ``x -= lr sqrt(max(1, rows/cols)) NS(m)``,
    where five Newton-Schulz steps NS bring all singular values near 1. A tensor of more than two dimensions is a matrix
    of its first against all others.

    Args:
        params: Parameters or parameter groups. An option that a group sets for itself holds for all of its tensors.
        lr: Learning rate, >= 0.
        betas: ``(b1, b2)``, each in [0, 1); b2 has a part in ``optimize_1d`` alone.
        eps: Added to the norm of a matrix, and in AdamW to the root of the second moment, > 0.
        weight_decay: Decoupled, >= 0.
        gamma: Strength of the correction, >= 0.
        exact: Take as ``g_prev`` the gradient of the current batch at the previous parameters, at a second evaluation.
        optimize_1d: Update tensors of fewer than two dimensions as :class:`MARS` does; otherwise AdamW has them, with
            the next three.
        lr_1d: Of AdamW, >= 0; a schedule scales it together with ``lr``.
        betas_1d: Of AdamW, each in [0, 1).
        weight_decay_1d: Of AdamW, decoupled, >= 0.
        form: ``default`` takes tensors of two dimensions or more as matrices; ``official`` those of exactly two.
        maximize: Ascend.
        foreach: One call for many tensors; ``False`` is the same to rounding, tensor by tensor, with less memory.
        compile: Compile the update; a learning rate that moves does not compile it again.

    Raises:
        ConfigurationError: An option out of range; a complex parameter or a sparse gradient.
        ClosureError: ``exact`` without a :class:`lightrail.Closure`.

    Deviations:
        Those of :class:`MARS`. On a CPU the iterations run in single precision at least, not in bfloat16: it is slower.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> w.grad = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> MARSShampoo([w], lr=0.1).step()
        >>> [[round(v, 2) for v in row] for row in w.tolist()]  # both singular values near lr
        [[-0.08, 0.0], [0.0, -0.11]]

    Reference:
        Yuan et al., 2024, arXiv:2411.10438, the Shampoo instance.
    """

    traits = Traits(
        rule="x -= lr (sqrt(max(1, rows/columns)) NewtonSchulz(m) + wd x), m the average of c / max(1, |c|)",
        paper=_PAPER,
        state=2,
        needs_whole_tensors=True,
        example={"lr": 0.01, "lr_1d": 0.01},
        claim=Claim(sentence="a lower loss than AdamW's at equal tokens", problems=("docs_lm",)),
        peers=(Peer("torch.optim.Muon"), Peer("heavyball.Muon", {"consume_grad": False})),
    )
    _of_matrices = "mars_shampoo"
    _of_vectors = "mars_adamw"

    def __init__(
        self,
        params: Any,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gamma: float = 0.025,
        exact: bool = False,
        optimize_1d: bool = False,
        lr_1d: float = 3e-3,
        betas_1d: tuple[float, float] = (0.9, 0.95),
        weight_decay_1d: float = 0.1,
        form: str = "default",
        maximize: bool = False,
        foreach: bool = True,
        compile: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "gamma": gamma,
                "exact": exact,
                "optimize_1d": optimize_1d,
                "lr_1d": lr_1d,
                "betas_1d": betas_1d,
                "weight_decay_1d": weight_decay_1d,
                "form": form,
                "maximize": maximize,
                "foreach": foreach,
                "compile": compile,
            },
        )
