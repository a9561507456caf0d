"""OASIS: gradient descent scaled by the Hessian's diagonal, with a step size from local smoothness."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightrail.options import at_least, between, non_negative, positive
from lightrail.step import Closure
from lightrail.traits import Claim, Traits
from lightrail_optimizers.closure_answers import (
    Moving,
    answers_for,
    average_curvature_,
    gradients,
    inner,
    moving,
    points_of,
    truncated,
    wide,
)
from lightrail_optimizers.tensor_lists import add_scaled_
from lightrail_optimizers.tensorwise import MethodOptimizer, require_closure

__all__ = ["OASIS", "oasis", "oasis_step_size"]


def oasis(x: list[Tensor], g: Sequence[Tensor], d_hat: Sequence[Tensor], *, lr: float) -> None:
    """One update, in place: ``x -= lr g / D̂``."""
    u = torch._foreach_div(wide(g), list(d_hat))
    add_scaled_(x, [each.to(p.dtype) for each, p in zip(u, x, strict=True)], -lr)


def oasis_step_size(
    dx: Sequence[Tensor], dg: Sequence[Tensor], d_hat: Sequence[Tensor], *, eta: float, theta: float
) -> float:
    """``min(sqrt(1 + theta) eta, ½ ||Δx||_D̂ / ||Δg||_D̂⁻¹)``; ``eta`` where that is no positive number.

    Args:
        dx: The last move.
        dg: The change of the gradient along it, on one batch.
        d_hat: The scaling, positive.
        eta: The last step size.
        theta: The last step size over the one before; ``math.inf`` at first.
    """
    moved = inner(torch._foreach_mul(wide(dx), list(d_hat)), dx)
    turned = inner(torch._foreach_div(wide(dg), list(d_hat)), dg)
    if moved == 0:
        return eta
    bound = 0.5 * math.sqrt(moved / turned) if turned > 0 else math.inf
    found = min(math.sqrt(1 + theta) * eta, bound)
    return found if 0 < found < math.inf else eta


class OASIS(MethodOptimizer):
    """OASIS: finds both the scaling of each coordinate and the step size by itself, from curvature.

    ``D = b2 D + (1-b2) z ⊙ (H z)``, z of random signs; ``D̂ = max(|D|, alpha)``;
    ``eta = min(sqrt(1 + eta₁/eta₂) eta₁, ½ ||Δx||_D̂ / ||Δg||_D̂⁻¹)`` with eta₁ and eta₂ the last step sizes, Δx the last
    move and Δg the difference of the gradients at its two ends, both on this step's batch; ``x -= eta g / D̂``.

    Args:
        params: Parameters or parameter groups. One step size serves all.
        lr: Of the first step, > 0; the first group's counts. Small is safe: the second step is free of it. With
            ``adaptive=False`` it is the learning rate of every step, each group's own, and takes a schedule.
        beta2: b2, in [0, 1).
        alpha: The least curvature, > 0. No coordinate is scaled up by more than its inverse.
        warm_up: Estimates whose mean is the first D, >= 1; each costs a Hessian-vector product, once.
        adaptive: Whether the step size follows the rule above.
        beta1: In [0, 1); above 0 the step follows ``m = b1 m + (1-b1) g`` in place of g.

    Raises:
        ConfigurationError: An option out of range; a complex parameter or a sparse gradient.
        ClosureError: The closure is not a :class:`lightrail.Closure`, or the loss has no second derivative.

    Guarantees:
        z comes from torch's global generator, so an exact resume repeats it, and is the same on all ranks.

    Deviations:
        Where the last move was nothing, or the gradient did not change along it before there was a step size to grow
        from, the rule has no value, and the step size stays. The paper gives the rule for gradients; that ``beta1``
        and ``adaptive`` combine is ours.

    Example:
        >>> import torch
        >>> from lightrail import Closure
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> curvature = torch.tensor([1.0, 100.0])
        >>> optimizer = OASIS([x], lr=1e-3)
        >>> for _ in range(2):
        ...     loss = optimizer.step(Closure(lambda: (curvature * x**2).sum() / 2, [x]))
        >>> round(optimizer.logged()["step_size"], 3), [round(v, 4) for v in x.tolist()]
        (0.5, [0.4995, 0.4995])

    Reference:
        Jahani et al., 2021, "Doubly Adaptive Scaled Algorithm for Machine Learning Using Second-Order Information",
        arXiv:2109.05198, Algorithm 1.
    """

    traits = Traits(
        rule="x -= eta g / max(|D|, alpha), D the average of z⊙Hz, eta = ½||Δx||_D / ||Δg||_D⁻¹ or less",
        paper=(
            "Jahani, Rusakov, Shi, Richtárik, Mahoney, Takáč, 2021, Doubly Adaptive Scaled Algorithm for Machine "
            "Learning Using Second-Order Information, arXiv:2109.05198"
        ),
        state=2,
        extra_evaluations=2,
        needs_closure=True,
        needs_second_derivatives=True,
        needs_whole_tensors=True,
        sets_step_size=True,
        is_stochastic=True,
        example={"warm_up": 4},
        claim=Claim(
            sentence="better than tuned SGD on badly scaled problems, with no rate",
            baseline="sgd",
            problems=("scaled_logistic", "digits"),
            options={"warm_up": 10},
        ),
    )

    @staticmethod
    def traits_under(options: Mapping[str, Any]) -> Traits:
        """As ``traits``; a fixed learning rate needs no second gradient and takes a schedule."""
        adaptive = options.get("adaptive", True)
        state = 1 + bool(adaptive) + bool(options.get("beta1", 0.0))
        if adaptive:
            return dataclasses.replace(OASIS.traits, state=state)
        return dataclasses.replace(
            OASIS.traits, state=state, extra_evaluations=1, needs_closure=False, sets_step_size=False
        )

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        beta2: float = 0.99,
        alpha: float = 1e-2,
        warm_up: int = 100,
        adaptive: bool = True,
        beta1: float = 0.0,
    ) -> None:
        if adaptive:
            positive(lr=lr)
        non_negative(lr=lr)
        between(0.0, 1.0, beta1=beta1, beta2=beta2)
        positive(alpha=alpha)
        at_least(1, warm_up=warm_up)
        defaults = {"lr": lr, "beta2": beta2, "alpha": alpha, "warm_up": warm_up, "adaptive": adaptive, "beta1": beta1}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step.

        Args:
            closure: A :class:`lightrail.Closure`.

        Returns:
            The loss at the point where the step began.
        """
        oracle = require_closure(self, closure, "estimates the Hessian at every step")
        loss = oracle()
        groups = moving(self, oracle)
        if not groups:
            return loss
        curvature = average_curvature_(self, oracle, groups, self.param_groups[0]["warm_up"])
        d_hat = [truncated(d, group["alpha"]) for (group, _), d in zip(groups, curvature, strict=True)]
        eta = self._step_size(oracle, groups, d_hat) if self.param_groups[0]["adaptive"] else None
        for (group, x), scale in zip(groups, d_hat, strict=True):
            oasis(x, self._direction(group, x), scale, lr=float(group["lr"]) if eta is None else eta)
        return loss

    def _direction(self, group: dict[str, Any], x: list[Tensor]) -> list[Tensor]:
        """The gradient, or its moving average."""
        if not group["beta1"]:
            return gradients(x)
        for p in x:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        momentum = [self.state[p]["momentum"] for p in x]
        torch._foreach_lerp_(momentum, gradients(x), 1 - group["beta1"])
        return momentum

    def _step_size(self, closure: Closure, groups: Moving, d_hat: list[list[Tensor]]) -> float:
        """This step's, from the last move and the gradient at its two ends; keeps the point where this step begins."""
        kept = self.param_groups[0]
        x = [p for _, each in groups for p in each]
        eta = kept.get("step_size")
        if eta is None:
            eta, theta = float(kept["lr"]), math.inf
        else:
            dx, dg = self._last_move(closure, x)
            last = eta
            eta = oasis_step_size(dx, dg, [d for each in d_hat for d in each], eta=last, theta=kept["growth"])
            theta = eta / last
        kept["step_size"], kept["growth"] = eta, theta
        for p in x:
            self.state[p].setdefault("previous", torch.empty_like(p, memory_format=torch.preserve_format))
        for p in self._that_moved():
            self.state[p]["previous"].copy_(p)
        return eta

    def _that_moved(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if "previous" in self.state.get(p, {})]

    def _last_move(self, closure: Closure, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """``x - x₁`` and ``∇F(x) - ∇F(x₁)``, with x₁ where the last step began."""
        everywhere = self._that_moved()
        with closure.at(points_of(closure, everywhere, [self.state[p]["previous"] for p in everywhere])):
            _, answers = closure.gradient()
        before = [self.state[p].get("previous", p) for p in x]
        dx = torch._foreach_sub(wide(x), wide(before))
        dg = torch._foreach_sub(wide(gradients(x)), wide(answers_for(x, closure, answers)))
        return list(dx), list(dg)

    def logged(self) -> dict[str, float]:
        """Figures of the last step that are worth a curve."""
        return {"step_size": self.param_groups[0]["step_size"]} if "step_size" in self.param_groups[0] else {}
