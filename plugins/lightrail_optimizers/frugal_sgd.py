"""FRUGAL with momentum inside its subspace, and SGD outside."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightrail.traits import Claim, Traits
from lightrail_optimizers.frugal_base import PAPER, Frugal
from lightrail_optimizers.inner_rules import MOMENTUM

__all__ = ["FrugalSGD"]


class FrugalSGD(Frugal):
    """FRUGAL with SGD: momentum for a quarter of the hidden matrices, plain SGD for the rest.

    As :class:`lightrail_optimizers.FrugalAdamW`, with ``b = momentum b + g``, ``x -= lr b`` in the part with state and
    options of their own for AdamW on the parameters that are no hidden matrices. This is the pair of methods of the
    paper's theorems. Kept: ``density`` copies of the hidden matrices, and 2 of the others.

    Args:
        params: ``(name, parameter)`` pairs, or parameter groups whose ``params`` are such pairs. A group may hold any
            option below but ``adamw_names``.
        lr: Learning rate of hidden matrices, >= 0.
        momentum: In [0, 1).
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
        As :class:`lightrail_optimizers.FrugalAdamW`. The authors' code begins with the weights as momentum, and this
        one with zeros; it has sign descent on the rest by default, which asks for a ``state_free_scale`` of its own,
        and SGD on all other parameters too.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(1.0)
        >>> optimizer = FrugalSGD(model.named_parameters(), lr=0.25, momentum=0.5, density=1.0)
        >>> for _ in range(2):
        ...     model.weight.grad = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        ...     optimizer.step()
        >>> model.weight.tolist()
        [[0.375, 1.0], [1.0, -0.25]]

    Reference:
        Zmushko et al., 2024, arXiv:2411.07837, Algorithm 2 and section 4.
    """

    traits = Traits(
        rule="x -= lr (up(b) + g - up(down(g))), b = momentum b + down(g), on hidden matrices, AdamW elsewhere",
        paper=PAPER,
        needs_parameter_names=True,
        is_stochastic=True,
        example={"lr": 0.02, "update_gap": 3, "adamw_lr": 0.01},
        claim=Claim(sentence="near AdamW's loss, with less state", margin=0.02, problems=("docs_lm",)),
    )
    inner = MOMENTUM

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        density: float = 0.25,
        update_gap: int = 200,
        selection: str = "block",
        block_order: str = "random",
        state_free: str = "sgd",
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
                "momentum": momentum,
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
