"""FRUGAL with Lion inside its subspace."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightrail.traits import Claim, Traits
from lightrail_optimizers.frugal_base import PAPER, Frugal
from lightrail_optimizers.inner_rules import LION

__all__ = ["FrugalLion"]


class FrugalLion(Frugal):
    """FRUGAL with Lion: momentum for a quarter of the hidden matrices, the sign of the gradient for the rest.

    As :class:`lightrail_optimizers.FrugalAdamW`, with Lion in the part with state and options of their own for AdamW
    on the parameters that are no hidden matrices. Kept: ``density`` copies of the hidden matrices, and 2 of the others.

    Args:
        params: ``(name, parameter)`` pairs, or parameter groups whose ``params`` are such pairs. A group may hold any
            option below but ``adamw_names``.
        lr: Learning rate of hidden matrices, >= 0.
        betas: Of Lion, each in [0, 1).
        weight_decay: Decoupled, of hidden matrices, >= 0.
        density: The fraction of the hidden matrices that has state, in [0, 1]; at least one tensor, line or entry
            unless 0.
        update_gap: Updates from one choice of that fraction to the next, >= 1.
        selection: What is chosen: ``block``, whole tensors of a group; in each tensor ``columns``, ``rows`` or single
            entries (``randk``) at random, the leading singular vectors of the gradient's shorter side (``svd``) or as
            many random orthonormal ones (``random``).
        block_order: The order of whole tensors: ``random``, ``ascending``, ``descending``, or ``mirror``, which takes
            them from both ends.
        state_free: The rule of the rest: ``sign``, ``sgd``, or ``none``.
        state_free_scale: Times the learning rate of the rest, >= 0.
        scale: Times the learning rate of hidden matrices, >= 0; decay is not scaled.
        reset: Whether state starts from zero at every choice.
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
            parameter (the latter with another selection than ``block``), or a sparse gradient.

    Deviations:
        As :class:`lightrail_optimizers.FrugalAdamW`; the authors' code has Lion on all other parameters too.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(1.0)
        >>> model.weight.grad = torch.tensor([[3.0, -0.5], [0.0, 2.0]])
        >>> FrugalLion(model.named_parameters(), lr=0.25, selection="columns", density=0.5).step()
        >>> model.weight.tolist()
        [[0.75, 1.25], [1.0, 0.75]]

    Reference:
        Zmushko et al., 2024, arXiv:2411.07837, Algorithm 1 and section 3.
    """

    traits = Traits(
        rule="x -= lr (up(Lion(down(g))) + sign(g - up(down(g)))) on hidden matrices, AdamW elsewhere",
        paper=PAPER,
        needs_parameter_names=True,
        is_stochastic=True,
        example={"lr": 0.01, "update_gap": 3, "adamw_lr": 0.01},
        claim=Claim(sentence="near Lion's loss, with less state", baseline="lion", margin=0.02, problems=("docs_lm",)),
    )
    inner = LION

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        density: float = 0.25,
        update_gap: int = 200,
        selection: str = "block",
        block_order: str = "random",
        state_free: str = "sign",
        state_free_scale: float = 1.0,
        scale: float = 1.0,
        reset: bool = True,
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
                "betas": tuple(betas),
                "weight_decay": weight_decay,
                "density": density,
                "update_gap": update_gap,
                "selection": selection,
                "block_order": block_order,
                "state_free": state_free,
                "state_free_scale": state_free_scale,
                "scale": scale,
                "reset": reset,
                "adamw_lr": adamw_lr,
                "adamw_betas": tuple(adamw_betas),
                "adamw_eps": adamw_eps,
                "adamw_weight_decay": adamw_weight_decay,
                "maximize": maximize,
            },
            adamw_names,
        )
