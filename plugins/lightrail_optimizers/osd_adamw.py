"""Online Subspace Descent with AdamW inside its subspace."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightrail.traits import Claim, Traits
from lightrail_optimizers.inner_rules import ADAMW
from lightrail_optimizers.osd_base import PAPER, OnlineSubspaceDescent

__all__ = ["OSDAdamW"]


class OSDAdamW(OnlineSubspaceDescent):
    """Online Subspace Descent with AdamW: moments in a subspace that follows the gradients by online PCA.

    For a hidden matrix with G of n columns and more rows, and P of n rows: ``x *= 1 - lr wd``;
    ``x -= scale lr AdamW(G P) Pᵀ``; then one step of P's optimizer on ``‖Ĝ - Ĝ P Pᵀ‖² + λ ‖PᵀP - I‖²``,
    ``Ĝ = G / ‖G‖``. P begins with the singular vectors of the first gradient. A matrix of more columns is taken
    transposed. Embeddings, output layers, biases and norms get AdamW with the same options.
    Kept for an m × n matrix: ``(2 m + n) rank`` numbers, and for P's optimizer ``2 n rank`` (``lion`` half of that,
    ``sgd`` none); that is below AdamW's ``2 m n`` only where the rank is well below n.

    Args:
        params: ``(name, parameter)`` pairs, or parameter groups whose ``params`` are such pairs. A group may hold any
            option below but ``adamw_names``.
        lr: Learning rate, >= 0.
        betas: Of AdamW, each in [0, 1).
        eps: Added to the root of the second moment, > 0.
        weight_decay: Decoupled, of all parameters, >= 0.
        rank: Columns of P, >= 1; clipped to the shorter side of each matrix.
        scale: Times the learning rate of hidden matrices, >= 0; decay is not scaled.
        projection_optimizer: Of P: ``adamw``, ``lion`` or ``sgd``, with their usual betas.
        projection_lr: Of P at first, >= 0; it follows ``lr`` as a schedule moves that.
        projection_decay: Decoupled weight decay of P, >= 0.
        orthogonality: λ, the weight of ``‖PᵀP - I‖²`` in the loss of P, >= 0.
        adamw_names: Patterns in the manner of file names; a matrix stays with AdamW where one matches its full name or
            a part of it between dots. ``None`` for those of embeddings and output layers. The last layer of an
            ``nn.Sequential`` has no telling name: give its number here.
        maximize: Ascend.

    Raises:
        ConfigurationError: Parameters without names, no hidden matrix, an option out of range, a complex or sharded
            parameter, or a sparse gradient.

    Deviations:
        The paper's loss of P has the term with λ, the authors' code has not: ``orthogonality=0`` is the code. Its AdamW
        of P also decays P by torch's default: ``projection_decay=0.01`` is that. It decays weights after the step in
        place of before, and adds ``eps`` before the second moment is corrected.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 4, bias=False)
        >>> optimizer = OSDAdamW(model.named_parameters(), lr=0.1, rank=2)
        >>> model.weight.grad = torch.randn(4, 3)
        >>> optimizer.step()
        >>> {key: list(kept.shape) for key, kept in optimizer.state[model.weight].items() if key != "step"}
        {'basis': [3, 2], 'momentum': [4, 2], 'square': [4, 2], 'basis_momentum': [3, 2], 'basis_square': [3, 2]}

    Reference:
        Liang et al., 2024, arXiv:2408.12857, Algorithm 1.
    """

    traits = Traits(
        rule="x -= scale lr AdamW(G P) Pᵀ, P by online PCA of G, on hidden matrices, AdamW elsewhere",
        paper=PAPER,
        needs_parameter_names=True,
        needs_whole_tensors=True,
        example={"lr": 0.05, "rank": 2},
        claim=Claim(
            sentence="near AdamW's loss, from moments in a subspace",
            margin=0.02,
            problems=("docs_lm",),
            options={"rank": 16},
        ),
    )
    inner = ADAMW

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int = 128,
        scale: float = 0.25,
        projection_optimizer: str = "adamw",
        projection_lr: float = 5e-3,
        projection_decay: float = 0.0,
        orthogonality: float = 0.0,
        adamw_names: list[str] | None = None,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": tuple(betas),
                "eps": eps,
                "weight_decay": weight_decay,
                "rank": rank,
                "scale": scale,
                "projection_optimizer": projection_optimizer,
                "projection_lr": projection_lr,
                "projection_decay": projection_decay,
                "orthogonality": orthogonality,
                "maximize": maximize,
            },
            adamw_names,
        )
