"""SOAP, from pytorch_optimizer."""

from __future__ import annotations

from typing import Any

from lightrail.options import at_least, between, non_negative
from lightrail.traits import Claim, Peer, Traits
from lightrail_optimizers.library_optimizer import LibraryOptimizer, missing_library

try:
    import pytorch_optimizer
except ModuleNotFoundError as error:
    raise missing_library("optimizer 'soap'", error) from error

__all__ = ["SOAP"]


class SOAP(LibraryOptimizer, pytorch_optimizer.SOAP):
    """Adam in the eigenbasis of Shampoo's preconditioner.

    For a matrix ``L = b L + (1-b) G Gᵀ``, ``R = b R + (1-b) GᵀG`` with eigenvectors ``Q_L``, ``Q_R``, renewed every
    ``precondition_frequency`` steps: AdamW on ``Q_Lᵀ G Q_R``, whose step is rotated back. Vectors and scalars have
    AdamW. Needs the extra ``optimizers``.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, >= 0; as for AdamW.
        betas: ``(b1, b2)`` of the moments, each in [0, 1).
        shampoo_beta: Of the preconditioner, in [0, 1); ``None`` for ``b2``.
        eps: Added to the root of the second moment, >= 0.
        weight_decay: Decoupled, >= 0.
        precondition_frequency: Steps from one eigenbasis to the next, >= 1; one step of power iteration each.
        max_precondition_dim: Sides longer than this are not rotated, >= 1.
        merge_dims: Merge the sides of convolutions up to that length.
        precondition_1d: Rotate vectors too.
        correct_bias: Adam's bias correction.
        normalize_gradients: Scale the step of every tensor to a root mean square of 1.

    Raises:
        ConfigurationError: An option out of range; a complex parameter or a sparse gradient.
        PluginError: The extra ``optimizers`` is not installed.

    Deviations:
        As in the authors' code, the first step builds the preconditioner and moves nothing. Parameters in bfloat16
        are rotated in bfloat16; the bases are computed in single precision.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.eye(2))
        >>> optimizer = SOAP([w], lr=0.1, weight_decay=0.0)
        >>> for _ in range(2):
        ...     w.grad = torch.diag(torch.tensor([1.0, 100.0]))
        ...     optimizer.step()
        >>> [[round(value, 4) for value in row] for row in w.tolist()]
        [[0.9, 0.0], [0.0, 0.9]]

    Reference:
        Vyas, Morwani, Zhao, Shapira, Brandfonbrener, Janson and Kakade, 2024, "SOAP: Improving and Stabilizing Shampoo
        using Adam", arXiv:2409.11321, Algorithm 3. The update is that of the library pytorch_optimizer.
    """

    traits = Traits(
        rule="AdamW on Q_Lᵀ G Q_R, rotated back; Q the eigenvectors of averaged G Gᵀ and GᵀG",
        paper=(
            "Vyas, Morwani, Zhao, Shapira, Brandfonbrener, Janson, Kakade, 2024, SOAP: Improving and Stabilizing "
            "Shampoo using Adam, arXiv:2409.11321"
        ),
        state=9.5,  # depends on the shapes: 6 for a square matrix, more for a long one, 2 for a vector
        needs_whole_tensors=True,
        example={"lr": 0.01, "precondition_frequency": 2},
        exceptions={
            "takes_groups_with_own_lr": "the first step builds the preconditioner and moves nothing, as published",
        },
        claim=Claim(sentence="a lower loss than AdamW's"),
        peers=(Peer("heavyball.SOAP", {"consume_grad": False}),),
    )

    def __init__(
        self,
        params: Any,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precondition_dim: int = 10000,
        merge_dims: bool = False,
        precondition_1d: bool = False,
        correct_bias: bool = True,
        normalize_gradients: bool = False,
    ) -> None:
        non_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        b1, b2 = betas
        between(0.0, 1.0, beta1=b1, beta2=b2)
        if shampoo_beta is not None:
            between(0.0, 1.0, shampoo_beta=shampoo_beta)
        at_least(1, precondition_frequency=precondition_frequency, max_precondition_dim=max_precondition_dim)
        pytorch_optimizer.SOAP.__init__(
            self,
            params,
            lr=lr,
            betas=(b1, b2),
            shampoo_beta=shampoo_beta,
            eps=eps,
            weight_decay=weight_decay,
            precondition_frequency=precondition_frequency,
            max_precondition_dim=max_precondition_dim,
            merge_dims=merge_dims,
            precondition_1d=precondition_1d,
            correct_bias=correct_bias,
            normalize_gradient=normalize_gradients,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "data_format": self.data_format, "maximize": self.maximize}
