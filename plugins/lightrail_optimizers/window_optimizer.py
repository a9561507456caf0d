"""The base of optimizers that precondition by a window of past gradients, all parameters of a group as one vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightrail.options import at_least, between, non_negative
from lightrail_optimizers.flat_vector import gradient_vector, move_, state_holder
from lightrail_optimizers.tensorwise import MethodOptimizer

__all__ = ["WindowOptimizer", "add_decay_", "without_missing"]


class WindowOptimizer(MethodOptimizer):
    """An optimizer whose direction is made of the last m gradients of a group.

    Its groups hold ``lr``, ``window``, ``momentum``, ``weight_decay`` and ``maximize``. A subclass gives ``direction``.
    """

    # What the momentum is of: v = momentum v + u, or, where it is an average, (1 - momentum) u.
    averages_momentum: ClassVar[bool] = False
    # State that keeps its own dtype, whatever that of the parameters.
    _exact_state: ClassVar[tuple[str, ...]] = ("gram", "indices")

    def __init__(self, params: Any, options: dict[str, Any]) -> None:
        non_negative(lr=options["lr"], weight_decay=options["weight_decay"])
        at_least(1, window=options["window"])
        between(0.0, 1.0, momentum=options["momentum"])
        super().__init__(params, options)

    def direction(self, group: dict[str, Any], kept: dict[str, Any], params: Sequence[Tensor], g: Tensor) -> Tensor:
        """The direction u from the gradient g, before momentum, as a new vector; ``kept`` is the state of the group."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torch casts all state to the dtype of its parameter; indices and G G^T do not survive half precision.
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(keys, params, strict=True):
            saved = state_dict["state"].get(key, {})
            for name in self._exact_state:
                if name in saved:
                    self.state[p][name] = saved[name].to(p.device, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step.

        Args:
            closure: Evaluates the loss and its gradient; ``None`` with gradients in ``.grad``.

        Returns:
            The loss that the closure gave.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if any(p.grad is not None and p.numel() for p in group["params"]):
                self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        params = group["params"]
        g = gradient_vector(type(self).__name__, params)
        if group["maximize"]:
            g.neg_()
        holder = state_holder(params)
        kept = self.state[holder]
        u = self.direction(group, kept, params, g)
        if mu := group["momentum"]:
            if "momentum" not in kept:
                kept["momentum"] = torch.zeros_like(u, dtype=holder.dtype)
            v = kept["momentum"].to(u.dtype).mul_(mu).add_(u, alpha=1 - mu if self.averages_momentum else 1.0)
            kept["momentum"].copy_(v)
            u = v
        move_(params, u, -float(group["lr"]))


def add_decay_(vector: Tensor, params: Sequence[Tensor], by: float) -> Tensor:
    """``vector += by x``, in place, where x has a gradient."""
    for part, p in zip(vector.split([p.numel() for p in params]), params, strict=True):
        if p.grad is not None:
            part.add_(p.detach().reshape(-1).to(part.device), alpha=by)
    return vector


def without_missing(vector: Tensor, params: Sequence[Tensor]) -> Tensor:
    """The vector with zeros where a parameter has no gradient; itself where all have one."""
    if all(p.grad is not None for p in params):
        return vector
    vector = vector.clone()
    for part, p in zip(vector.split([p.numel() for p in params]), params, strict=True):
        if p.grad is None:
            part.zero_()
    return vector
