"""Constrained learning: a descent step on the Lagrangian, an ascent step on its multipliers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightrail.errors import ConfigurationError
from lightrail.options import at_least, between, non_negative, positive
from lightrail.step import Closure, Transform
from lightrail.traits import Traits
from lightrail_optimizers.added_gradient import add_gradient_

__all__ = ["Multiplier", "PrimalDual", "dual_ascent"]


def dual_ascent(multiplier: float, violation: float, lr: float) -> float:
    """``lambda = [lambda + lr (l - eps)]_+``.

    Args:
        multiplier: lambda, >= 0.
        violation: l - eps: positive where the constraint is broken.
        lr: The dual step size.

    Example:
        >>> dual_ascent(0.5, 2.0, 0.25), dual_ascent(0.5, -4.0, 0.25)
        (1.0, 0.0)
    """
    return max(multiplier + lr * violation, 0.0)


class Multiplier:
    """The multiplier of one constraint ``l <= eps``.

    Args:
        bound: eps; ``inf`` asks nothing.
        lr: The dual step size, > 0.
        every: Measurements from one dual step to the next, >= 1; the step takes their mean.
        value: lambda at the start, >= 0.

    Example:
        >>> multiplier = Multiplier(bound=1.0, lr=0.5, every=2)
        >>> for loss in (2.0, 4.0):
        ...     multiplier.measure(loss)
        >>> multiplier.value, multiplier.slack
        (1.0, -3.0)
    """

    def __init__(self, bound: float, lr: float, every: int = 1, value: float = 0.0) -> None:
        self.bound = bound
        self.lr = lr
        self.every = every
        self.value = value
        self.measured = 0
        self.slack = math.nan
        self._violations = 0.0  # their sum since the last dual step

    def measure(self, loss: float) -> None:
        """Takes in what the constraint's loss is now; every ``every``-th time, a dual step."""
        self.measured += 1
        self.slack = self.bound - loss
        self._violations -= self.slack
        if self.measured % self.every == 0:
            self.value = dual_ascent(self.value, self._violations / self.every, self.lr)
            self._violations = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "measured": self.measured, "violations": self._violations}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value, self.measured, self._violations = state["value"], state["measured"], state["violations"]


class PrimalDual(Transform):
    """Minimises the loss subject to bounds on other scalars that the task returns.

    For ``min l_0  s.t.  l_i <= eps_i``: the optimizer steps with the gradient of ``l_0 + sum_i lambda_i l_i``; then
    ``lambda_i = [lambda_i + dual_lr (mean l_i - eps_i)]_+``. A multiplier says what its constraint costs: about how
    much the loss would fall if the bound were looser by 1.

    Args:
        constraints: The bound eps of each constraint, by the name under which ``training_step`` returns it beside the
            loss: ``{fairness: 0.1}``. Such a scalar is differentiable and a mean over the batch. ``loss`` is the loss
            itself; ``inf`` asks nothing.
        dual_lr: Step size of the multipliers, > 0.
        dual_every: Steps from one dual step to the next, >= 1; it takes the mean of ``l_i`` over them.
        multiplier: lambda at the start, >= 0, for all of them.

    Raises:
        ConfigurationError: There are no constraints, or an option is out of range.
        ClosureError: ``training_step`` returns nothing of that name, or it cannot be differentiated.

    Guarantees:
        Multipliers are never negative, and equal on all ranks. While one is 0 its constraint leaves the gradient
        untouched, bit for bit, and is measured by a forward pass alone.

    Cost:
        One evaluation for each constraint: forward and backward while its multiplier is positive, forward while it
        is 0.

    Deviations:
        In the theory a dual step follows a whole minimisation over the parameters; here, as in practice, the two
        alternate.

    Example:
        >>> from lightrail import Closure, TransformedOptimizer
        >>> x = torch.nn.Parameter(torch.tensor(0.0, dtype=torch.float64))
        >>> transform = PrimalDual({"short": 0.0}, dual_lr=0.2)
        >>> optimizer = TransformedOptimizer(torch.optim.SGD([x], lr=0.1), [transform])
        >>> for _ in range(300):  # min x² s.t. 1 - x <= 0
        ...     loss = optimizer.step(Closure(lambda: {"loss": x**2, "short": 1 - x}, [x]))
        >>> round(x.item(), 6), round(transform.logged()["multiplier_short"], 6)
        (1.0, 2.0)

    Reference:
        Chamon and Ribeiro, 2020, "Probably Approximately Correct Constrained Learning", arXiv:2006.05487, Algorithm 1;
        Elenter, Chamon and Ribeiro, 2024, "Near-Optimal Solutions of Constrained Learning Problems",
        arXiv:2403.11844, on the last iterate.
    """

    traits = Traits(
        rule="g = grad l_0 + sum lambda_i grad l_i; lambda_i = [lambda_i + dual_lr (l_i - eps_i)]_+",
        paper=(
            "Elenter, Chamon, Ribeiro, 2024, Near-Optimal Solutions of Constrained Learning Problems, arXiv:2403.11844"
        ),
        state=0,
        extra_evaluations=None,
        needs_closure=True,
        example={"constraints": {"loss": 0.1}, "dual_lr": 0.5},
    )

    @staticmethod
    def traits_under(options: Mapping[str, Any]) -> Traits:
        """One extra evaluation for each constraint."""
        count = len(options.get("constraints") or ())
        return dataclasses.replace(PrimalDual.traits, extra_evaluations=count or None)

    def __init__(
        self,
        constraints: Mapping[str, float] | None = None,
        dual_lr: float = 0.01,
        dual_every: int = 1,
        multiplier: float = 0.0,
    ) -> None:
        if not constraints:
            raise ConfigurationError(
                "primal_dual has no constraint",
                found=f"constraints={constraints}",
                allowed="a bound for each scalar that training_step returns and that is to stay below it",
                remedy="Set transform.primal_dual.constraints={NAME: BOUND}, or leave the method out.",
            )
        for name, bound in constraints.items():
            between(-math.inf, math.inf, closed="right", **{f"constraints.{name}": bound})
        positive(dual_lr=dual_lr)
        at_least(1, dual_every=dual_every)
        non_negative(multiplier=multiplier)
        self.constraints = {
            name: Multiplier(float(bound), dual_lr, dual_every, multiplier) for name, bound in constraints.items()
        }

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        values = [self._descend(closure, name, multiplier) for name, multiplier in self.constraints.items()]
        for multiplier, value in zip(self.constraints.values(), torch.stack(values).tolist(), strict=True):
            if not self.is_repeated:
                multiplier.measure(value)

    def _descend(self, closure: Closure, name: str, multiplier: Multiplier) -> Tensor:
        """Adds one constraint's share to the gradient; its value, in double precision."""
        # The first time it is differentiated at any rate: a scalar that cannot be shall not wait to be found out.
        if multiplier.value == 0 and multiplier.measured > 0:
            return closure.value_of(name).double()
        value, g = closure.gradient_of(name)
        if multiplier.value:
            add_gradient_("primal_dual", closure.params, g, multiplier.value)
        return value.double()

    def state_dict(self) -> dict[str, Any]:
        return {"constraints": {name: multiplier.state_dict() for name, multiplier in self.constraints.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, multiplier in self.constraints.items():
            if name in state["constraints"]:
                multiplier.load_state_dict(state["constraints"][name])

    def logged(self) -> dict[str, float]:
        values = {f"multiplier_{name}": multiplier.value for name, multiplier in self.constraints.items()}
        return values | {f"slack_{name}": multiplier.slack for name, multiplier in self.constraints.items()}
