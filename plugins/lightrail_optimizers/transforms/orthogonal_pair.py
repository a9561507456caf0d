"""A main objective, and of an auxiliary one only what is orthogonal to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightrail.errors import ClosureError, ConfigurationError, closest
from lightrail.options import at_least, between, non_negative
from lightrail.step import Closure
from lightrail.traits import Traits
from lightrail_optimizers.jacobian_descent import JacobianDescent

__all__ = ["OrthogonalPair", "pair_weights"]


def pair_weights(g: Tensor, eta: float, main: int = 0) -> Tensor:
    """The weights of ``g_f + eta (g_b - (g_f · g_b) / ||g_f||² g_f)``.

    Args:
        g: The Gramian of the two gradients, ``[2, 2]``.
        eta: >= 0.
        main: Which of the two is g_f.

    Returns:
        ``[2]``. Where g_f vanishes there is nothing to be orthogonal to: 1 and ``eta``.

    Example:
        >>> pair_weights(torch.tensor([[1.0, -2.0], [-2.0, 13.0]]), 1.0).tolist()
        [3.0, 1.0]
    """
    length = g[main, main]
    overlap = torch.where(length > 0, g[main, 1 - main] / length, 0.0)
    w = torch.full_like(g[0], eta)
    w[main] = 1 - eta * overlap
    return w


class OrthogonalPair(JacobianDescent):
    """The gradient of a main objective, with the part of an auxiliary objective's gradient that is orthogonal to it.

    ``g = g_f + eta (g_b - (g_f · g_b) / ||g_f||² g_f)``, one inner product over all parameters: what the auxiliary
    objective adds neither helps nor hinders the main one, to first order.

    Args:
        eta: How much of the auxiliary gradient, >= 0; 0 is the main objective alone.
        main: The main objective: its place among the two that the task offers, 0 or 1, or its name, where the task's
            ``objectives`` are a mapping.

    Raises:
        ConfigurationError: ``eta`` is negative, ``main`` is a number beyond 1, or a name that the task does not have.
        ClosureError: The task has one objective, or more than two.
        CompositionError: The task has no ``objectives``.

    Guarantees:
        ``g · g_f = ||g_f||²``. A name costs one evaluation without gradients, in the first step.

        What a transform earlier in the chain did to the loss's gradient is kept as a difference,
        ``.grad = g + (edited - plain)``, at the price of one more evaluation. Clipping and masks belong after this one.

    Deviations:
        The paper's objectives are the two halves of one temporal-difference loss, of the current and of the next
        state, and its code adds the gradient of a third term; here they are any two losses, and a third term belongs
        in the main one. Its code adds 1e-10 to ``||g_f||²``; nothing is added here.

    Example:
        >>> from lightrail import Closure, TransformedOptimizer
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> J = torch.tensor([[1.0, 0.0], [-2.0, 3.0]])
        >>> optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=1.0), [OrthogonalPair()])
        >>> loss = optimizer.step(Closure(lambda: (J @ w).sum(), [w], objectives_fn=lambda: J @ w))
        >>> (-w).tolist()
        [1.0, 3.0]

    Reference:
        Mao, Xu, Zhang and Zhan, 2024, "ODICE: Revealing the Mystery of Distribution Correction Estimation via
        Orthogonal-gradient Update", arXiv:2402.00348, the orthogonal-gradient update.
    """

    traits = Traits(
        rule="g = g_f + eta (g_b - (g_f · g_b) / ||g_f||² g_f)",
        paper=(
            "Mao, Xu, Zhang, Zhan, 2024, ODICE: Revealing the Mystery of Distribution Correction Estimation via "
            "Orthogonal-gradient Update, arXiv:2402.00348"
        ),
        state=0,
        extra_evaluations=1,
        needs_objectives=True,
        needs_whole_tensors=True,
    )

    def __init__(self, eta: float = 1.0, main: int | str = 0) -> None:
        super().__init__()
        non_negative(eta=eta)
        if not isinstance(main, str):
            at_least(0, main=main)
            between(0, 1, closed="both", main=main)
        self.eta = eta
        self.main = main
        self._index = None if isinstance(main, str) else int(main)

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        if self._index is None:
            self._index = self._place(_names(closure))
        super().before_step(params, closure)

    def weights(self, g: Tensor) -> Tensor:
        assert self._index is not None
        if len(g) != 2:
            raise ClosureError(
                "orthogonal_pair takes a main and an auxiliary objective",
                found=f"a task with {len(g)} objective{'s' if len(g) > 1 else ''}",
                allowed="a task whose objectives(batch) returns two losses",
                remedy="Return two losses, summing those that belong together, or choose transform 'upgrad'.",
            )
        return pair_weights(g, self.eta, self._index)

    def _place(self, names: list[str]) -> int:
        if self.main not in names:
            raise ConfigurationError(
                f"the task has no objective '{self.main}'",
                found=f"main={self.main}",
                allowed=", ".join(names) or "0 or 1: the task's objectives have no names",
                remedy=f"{closest(str(self.main), names)}Choose one of the allowed.",
            )
        return names.index(str(self.main))


def _names(closure: Closure) -> list[str]:
    """What the task calls its objectives; nothing where they are no mapping."""
    names: list[str] = []

    def look(*batch: Any) -> Tensor:
        if not batch:
            raise ClosureError(
                "the objectives' names are known only to a loss that is given its batch",
                found="a loss function that closes over its batch",
                allowed="lightrail.Closure(loss_fn, params, batch)",
                remedy="Pass the batch to lightrail.Closure, or set main to 0 or 1.",
            )
        found = closure.objectives(batch[0])
        names[:] = [str(name) for name in found] if isinstance(found, Mapping) else []
        return torch.zeros((), device=closure.params[0].device)

    closure.value_of(look)
    return names
