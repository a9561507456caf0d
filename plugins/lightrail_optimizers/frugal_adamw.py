"""FRUGAL with AdamW inside its subspace."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightrail.traits import Claim, Traits
from lightrail_optimizers.frugal_base import PAPER, Frugal
from lightrail_optimizers.inner_rules import ADAMW

__all__ = ["FrugalAdamW"]


class FrugalAdamW(Frugal):
    """FRUGAL with AdamW: moments for a quarter of the hidden matrices, the sign of the gradient for the rest.

    ``x *= 1 - lr wd``; ``x -= scale lr (up(AdamW(down(g))) + state_free_scale sign(g - up(down(g))))``, where ``down``
    takes the part with state, chosen anew every ``update_gap`` updates. Embeddings, output layers, biases and norms
    get AdamW with the same options. Kept: ``2 density`` copies of the hidden matrices, and 2 of the others; ``randk``
    keeps one number more an entry, ``svd`` and ``random`` their vectors.

    Args:
        params: ``(name, parameter)`` pairs, or parameter groups whose ``params`` are such pairs. A group may hold any
            option below but ``adamw_names``.
        lr: Learning rate, >= 0.
        betas: Of AdamW, each in [0, 1).
        eps: Added to the root of the second moment, > 0.
        weight_decay: Decoupled, of all parameters, >= 0.
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
        adamw_names: Patterns in the manner of file names; a matrix stays with AdamW where one matches its full name or
            a part of it between dots. ``None`` for those of embeddings and output layers. The last layer of an
            ``nn.Sequential`` has no telling name: give its number here.
        maximize: Ascend.

    Raises:
        ConfigurationError: Parameters without names, no hidden matrix, an option out of range, a complex or sharded
            parameter (the latter with another selection than ``block``), or a sparse gradient.

    Deviations:
        Of the authors' code. At least one tensor or line has state where ``density`` is not 0; it may round to none.
        ``mirror`` takes an odd number and reaches the middle tensor. What ``svd`` and ``random`` leave over counts as
        zero where it is rounding error, of which a sign would make full steps. ``selection=svd, state_free=none,
        reset=False, scale=0.25`` is GaLore as the authors ran it.

    Example:
        >>> import torch
        >>> model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 4)})
        >>> optimizer = FrugalAdamW(model.named_parameters(), lr=0.1, density=0.5, block_order="ascending")
        >>> for p in model.parameters():
        ...     p.grad = torch.ones_like(p)
        >>> optimizer.step()
        >>> [sorted(optimizer.state[model[name].weight]) for name in "ab"]
        [['momentum', 'square', 'step'], []]

    Reference:
        Zmushko et al., 2024, arXiv:2411.07837, Algorithm 1 and section 3.
    """

    traits = Traits(
        rule="x -= lr (up(AdamW(down(g))) + sign(g - up(down(g)))) on hidden matrices, AdamW elsewhere",
        paper=PAPER,
        needs_parameter_names=True,
        is_stochastic=True,
        example={"lr": 0.01, "update_gap": 3},
        claim=Claim(sentence="near AdamW's loss, with less state", margin=0.02, problems=("docs_lm",)),
    )
    inner = ADAMW

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        density: float = 0.25,
        update_gap: int = 200,
        selection: str = "block",
        block_order: str = "random",
        state_free: str = "sign",
        state_free_scale: float = 1.0,
        scale: float = 1.0,
        reset: bool = True,
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
                "density": density,
                "update_gap": update_gap,
                "selection": selection,
                "block_order": block_order,
                "state_free": state_free,
                "state_free_scale": state_free_scale,
                "scale": scale,
                "reset": reset,
                "maximize": maximize,
            },
            adamw_names,
        )
