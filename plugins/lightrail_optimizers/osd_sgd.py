"""Online Subspace Descent with momentum inside its subspace."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightrail.traits import Claim, Traits
from lightrail_optimizers.inner_rules import MOMENTUM
from lightrail_optimizers.osd_base import PAPER, OnlineSubspaceDescent

__all__ = ["OSDSGD"]


class OSDSGD(OnlineSubspaceDescent):
    """Online Subspace Descent with SGD: momentum in a subspace that follows the gradients by online PCA.

    As :class:`lightrail_optimizers.OSDAdamW`, with ``b = momentum b + G P``, ``x -= scale lr b Pᵀ``, and options of
    their own for AdamW on the parameters that are no hidden matrices. Kept for an m × n matrix: ``(m + n) rank``
    numbers, and for P's optimizer ``2 n rank`` (``lion`` half of that, ``sgd`` none).

    Args:
        params: ``(name, parameter)`` pairs, or parameter groups whose ``params`` are such pairs. A group may hold any
            option below but ``adamw_names``.
        lr: Learning rate of hidden matrices, >= 0.
        momentum: In [0, 1).
        weight_decay: Decoupled, of hidden matrices, >= 0.
        rank: Columns of P, >= 1; clipped to the shorter side of each matrix.
        scale: Times the learning rate of hidden matrices, >= 0; decay is not scaled.
        projection_optimizer: Of P: ``adamw``, ``lion`` or ``sgd``, with their usual betas.
        projection_lr: Of P at first, >= 0; it follows ``lr`` as a schedule moves that.
        projection_decay: Decoupled weight decay of P, >= 0.
        orthogonality: λ, the weight of ``‖PᵀP - I‖²`` in the loss of P, >= 0.
        adamw_lr: Of AdamW on all other parameters, >= 0; a schedule scales it too.
        adamw_betas: Each in [0, 1).
        adamw_eps: Added to the root of the second moment, > 0.
        adamw_weight_decay: Decoupled, >= 0.
        adamw_names: Patterns in the manner of file names; a matrix stays with AdamW where one matches its full name or
            a part of it between dots. ``None`` for those of embeddings and output layers. The last layer of an
            ``nn.Sequential`` has no telling name: give its number here.
        maximize: Ascend.

    Raises:
        ConfigurationError: Parameters without names, no hidden matrix, an option out of range, a complex or sharded
            parameter, or a sparse gradient.

    Deviations:
        The paper's loss of P has the term with λ, the authors' code has not: ``orthogonality=0`` is the code. Its AdamW
        of P also decays P by torch's default: ``projection_decay=0.01`` is that.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(1.0)
        >>> model.weight.grad = torch.tensor([[4.0, 0.0], [0.0, 2.0]])
        >>> OSDSGD(model.named_parameters(), lr=0.5, rank=1).step()
        >>> model.weight.tolist()
        [[0.5, 1.0], [1.0, 1.0]]

    Reference:
        Liang et al., 2024, arXiv:2408.12857, Algorithm 1.
    """

    traits = Traits(
        rule="x -= scale lr b Pᵀ, b = momentum b + G P, P by online PCA of G, on hidden matrices, AdamW elsewhere",
        paper=PAPER,
        needs_parameter_names=True,
        needs_whole_tensors=True,
        example={"lr": 0.1, "rank": 2, "adamw_lr": 0.01},
        claim=Claim(
            sentence="near AdamW's loss, from moments in a subspace",
            margin=0.02,
            problems=("docs_lm",),
            options={"rank": 16},
        ),
    )
    inner = MOMENTUM

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        rank: int = 128,
        scale: float = 0.25,
        projection_optimizer: str = "adamw",
        projection_lr: float = 5e-3,
        projection_decay: float = 0.0,
        orthogonality: float = 0.0,
        adamw_lr: float = 1e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        adamw_names: list[str] | None = None,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "rank": rank,
                "scale": scale,
                "projection_optimizer": projection_optimizer,
                "projection_lr": projection_lr,
                "projection_decay": projection_decay,
                "orthogonality": orthogonality,
                "adamw_lr": adamw_lr,
                "adamw_betas": tuple(adamw_betas),
                "adamw_eps": adamw_eps,
                "adamw_weight_decay": adamw_weight_decay,
                "maximize": maximize,
            },
            adamw_names,
        )
