"""The base of optimizers whose update is one function of lists: parameters, gradients and states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightrail.errors import ClosureError
from lightrail.step import Closure
from lightrail.step.sharded import local_of
from lightrail.traits import traits_of
from lightrail_optimizers.tensor_lists import count_step, gather, refuse_complex, refuse_sharded

__all__ = ["MethodOptimizer", "TensorwiseOptimizer", "require_closure"]


class MethodOptimizer(Optimizer):
    """What every optimizer here does with its parameters: refuse by name those that its method cannot take."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        name = type(self).__name__
        refuse_complex(name, params)
        if traits_of(type(self)).needs_whole_tensors:
            refuse_sharded(name, params)


class TensorwiseOptimizer(MethodOptimizer):
    """An optimizer whose update, a pure function, treats each tensor by itself.

    A subclass names its state and its rule, and says what the rule takes beside lists:

    - ``state_names``: tensors kept for each parameter, zeros at first, in its dtype.
    - ``rule``: a static method ``rule(x, g, *states, **scalars)`` over lists of tensors that changes ``x`` and the
      states in place and leaves ``g`` as it is. It is compiled where a group says ``compile``; then ``lr`` and ``t``
      are 0-d tensors, so that a schedule never compiles it again: multiply by them through ``add_scaled_`` and
      ``shrink_``.
    - ``scalars(group, t)``: the keyword arguments; ``t`` counts a parameter's own updates from 1.

    Its groups hold ``maximize``, ``foreach`` and ``compile``.
    """

    state_names: ClassVar[tuple[str, ...]] = ()
    rule: ClassVar[Callable[..., None]]

    def scalars(self, group: dict[str, Any], t: int) -> dict[str, Any]:
        """What the rule takes by keyword."""
        raise NotImplementedError

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
        self.update()
        return loss

    def update(self) -> None:
        """Applies the rule to every parameter that has a gradient."""
        for group in self.param_groups:
            for x, g, *states in self.lists(group):
                if group["maximize"]:
                    g = list(torch._foreach_neg(g))
                self.apply_rule(group, self.state[x[0]]["step"], x, g, *states)

    def lists(self, group: dict[str, Any]) -> Iterator[tuple[list[Tensor], ...]]:
        """``(x, g, *states)``, each of one device, dtype and step; counts the step."""
        name = type(self).__name__
        return gather(name, group, self.state, self.state_names, count_step, cached=not group["compile"])

    def apply_rule(self, group: dict[str, Any], t: int, *lists: list[Tensor]) -> None:
        """The rule over lists, at once, compiled, or tensor by tensor."""
        if not traits_of(type(self)).needs_whole_tensors:
            lists = tuple(local_of(each) for each in lists)
        scalars = self.scalars(group, t)
        if "lr" in scalars and not group["compile"]:
            scalars["lr"] = float(scalars["lr"])
        if group["compile"]:
            moving = {k: torch.as_tensor(float(scalars[k]), dtype=torch.float64) for k in ("lr", "t") if k in scalars}
            _compiled(type(self).rule)(*lists, **scalars | moving)
        elif group["foreach"]:
            type(self).rule(*lists, **scalars)
        else:
            for tensors in zip(*lists, strict=True):
                type(self).rule(*([tensor] for tensor in tensors), **scalars)


@cache
def _compiled(rule: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(rule, fullgraph=True)


def require_closure(optimizer: Optimizer, closure: object, reason: str) -> Closure:
    """The closure as a :class:`lightrail.Closure`.

    Args:
        optimizer: Who asks.
        closure: What its ``step`` was given.
        reason: What it needs the closure for, as in "evaluates the gradient at a second point".

    Raises:
        ClosureError: It is another closure, or none.
    """
    if isinstance(closure, Closure):
        return closure
    name = type(optimizer).__name__
    raise ClosureError(
        f"{name} {reason} and needs more than one gradient",
        found="step() without a closure" if closure is None else f"a {type(closure).__name__}",
        allowed="a lightrail.Closure, which `train` provides",
        remedy=f"In your own loop: {name}(...).step(lightrail.Closure(loss_fn, params, batch)).",
    )
