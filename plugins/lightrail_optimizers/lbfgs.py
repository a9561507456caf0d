"""L-BFGS, torch's own, with the card that says what it needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightrail.errors import ClosureError
from lightrail.traits import Traits
from lightrail_optimizers.own_step_size import refuse_schedule
from lightrail_optimizers.tensor_lists import refuse_complex, refuse_sparse

__all__ = ["LBFGS"]


class LBFGS(torch.optim.LBFGS):
    """Limited-memory BFGS: a full-batch quasi-Newton method that evaluates the loss many times a step.

    ``d = -H g`` with H, an inverse Hessian, built from the last ``history_size`` pairs of moves and gradient changes;
    ``x += lr d``, up to ``max_iter`` times a step on one and the same batch.

    The arithmetic and the arguments are those of :class:`torch.optim.LBFGS`; complex parameters and sparse gradients
    are refused. It is meant for small problems where the batch is all the data, or nearly so: curvature pairs from
    different mini-batches mislead it. It takes one parameter group. Under ``line_search_fn="strong_wolfe"`` the step
    size is found by search.

    Raises:
        ClosureError: ``step`` is called without a closure.
        ConfigurationError: A complex parameter or a sparse gradient.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> curvature = torch.tensor([1.0, 10.0])
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = (curvature * x**2).sum() / 2
        ...     loss.backward()
        ...     return loss
        >>> optimizer = LBFGS([x], line_search_fn="strong_wolfe")
        >>> loss = optimizer.step(closure)
        >>> bool(x.abs().max() < 1e-3)
        True

    Reference:
        Liu and Nocedal, 1989, "On the limited memory BFGS method for large scale optimization",
        doi:10.1007/BF01589116.
    """

    traits = Traits(
        rule="x -= lr H g, H from the last pairs of moves and gradient changes",
        paper=(
            "Liu, Nocedal, 1989, On the limited memory BFGS method for large scale optimization, doi:10.1007/BF01589116"
        ),
        state=203,  # 100 pairs, the direction, the previous gradient, and one of work space
        extra_evaluations=24,
        needs_closure=True,
        needs_whole_tensors=True,
        example={"max_iter": 4, "line_search_fn": "strong_wolfe"},
        exceptions={
            "takes_an_empty_group": "torch's L-BFGS has one direction over all parameters, and so one group",
            "takes_groups_with_own_lr": "torch's L-BFGS has one direction over all parameters, and so one group",
            "takes_missing_gradients": "its direction remembers the gradients that a parameter had before",
        },
    )

    @staticmethod
    def traits_under(options: Mapping[str, Any]) -> Traits:
        """As ``traits``; a line search sets the step size."""
        return dataclasses.replace(LBFGS.traits, sets_step_size=options.get("line_search_fn") is not None)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        refuse_complex("LBFGS", self.param_groups[-1]["params"])

    def _gather_flat_grad(self) -> Tensor:
        # As torch's, for gradients of any layout: torch's own takes contiguous ones only.
        views = []
        for p in self._params:
            if p.grad is not None and p.grad.is_sparse:
                refuse_sparse("LBFGS", p.grad)
            views.append(torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten())
        return torch.cat(views)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of up to ``max_iter`` moves.

        Args:
            closure: Evaluates the loss and its gradient, as often as it is called.

        Returns:
            The loss at the point where the step began.
        """
        if closure is None:
            raise ClosureError(
                "LBFGS evaluates the loss several times a step and needs a closure",
                found="no closure",
                allowed="a lightrail.Closure, or torch's own closure",
                remedy="Pass optimizer.step(lightrail.Closure(loss_fn, params)).",
            )
        for group in self.param_groups:
            if group["line_search_fn"] is not None:
                refuse_schedule(self, group, "Leave the schedule out, or the line search.")
        return super().step(closure)
