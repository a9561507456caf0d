"""What PSPS and its kinds with slack share: the preconditioners, and one step length for all parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightrail.errors import ClosureError
from lightrail.options import at_least, between, non_negative, one_of, positive
from lightrail.step import Closure
from lightrail.traits import Claim, Traits
from lightrail_optimizers.closure_answers import average_curvature_, gradients, inner, moving, truncated, wide
from lightrail_optimizers.psps_rule import adagrad_scale, adam_scale
from lightrail_optimizers.tensor_lists import add_scaled_, count_step, gather
from lightrail_optimizers.tensorwise import MethodOptimizer, require_closure

__all__ = ["TRAITS", "PolyakStep", "PolyakStepWithSlack"]

TRAITS = Traits(
    paper=(
        "Abdukhakimov, Xiang, Kamzolov, Takáč, 2023, Stochastic Gradient Descent with Preconditioned Polyak Step-size, "
        "arXiv:2310.02093"
    ),
    state=1,
    extra_evaluations=0,
    needs_closure=True,
    needs_whole_tensors=True,
    sets_step_size=True,
    claim=Claim(
        sentence="better than tuned SGD on badly scaled problems, with no rate",
        baseline="sgd",
        problems=("scaled_logistic", "digits"),
    ),
)
_PRECONDITIONERS = ("adagrad", "adam", "hutchinson", "none")
_Scaled = tuple[list[Tensor], list[Tensor], list[Tensor]]


class PolyakStep(MethodOptimizer):
    """An optimizer that takes one step length from the loss; its subclasses say how."""

    traits = TRAITS

    @classmethod
    def traits_under(cls, options: Mapping[str, Any]) -> Traits:
        """As ``traits``; Hutchinson's preconditioner multiplies by the Hessian once a step, ``none`` keeps nothing."""
        preconditioner = options.get("preconditioner", "adam")
        if preconditioner == "hutchinson":
            return dataclasses.replace(
                cls.traits, extra_evaluations=1, needs_second_derivatives=True, is_stochastic=True
            )
        return dataclasses.replace(cls.traits, state=0) if preconditioner == "none" else cls.traits

    def __init__(self, params: Any, options: dict[str, Any]) -> None:
        one_of(_PRECONDITIONERS, preconditioner=options["preconditioner"])
        between(-math.inf, math.inf, closed="neither", f_star=options["f_star"])
        between(0.0, 1.0, beta2=options["beta2"])
        positive(eps=options["eps"], alpha=options["alpha"])
        at_least(1, warm_up=options["warm_up"])
        super().__init__(params, options)

    def _length(self, f: float, n: float, kept: dict[str, Any]) -> float:
        """tau, from the loss above its bound and the squared norm; ``kept`` has the options, and keeps the slack."""
        raise NotImplementedError  # pragma: no cover

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step.

        Args:
            closure: Evaluates the loss and its gradient; a :class:`lightrail.Closure` where the preconditioner is
                Hutchinson's.

        Returns:
            The loss at the point where the step began.
        """
        if closure is None:
            raise ClosureError(
                f"{type(self).__name__} takes its step size from the loss and needs a closure",
                found="step() without a closure",
                allowed="a lightrail.Closure, or torch's own closure",
                remedy="Pass optimizer.step(lightrail.Closure(loss_fn, params, batch)).",
            )
        estimates = any(group["preconditioner"] == "hutchinson" for group in self.param_groups)
        oracle = require_closure(self, closure, "estimates the Hessian at every step") if estimates else None
        with torch.enable_grad():
            loss = closure()
        scaled = self._scaled(oracle)
        steps = [(x, torch._foreach_div(wide(g), b)) for x, g, b in scaled]
        n = sum(inner(g, u) for (_, g, _), (_, u) in zip(scaled, steps, strict=True))
        kept = self.param_groups[0]
        kept["step_size"] = self._length(float(loss) - kept["f_star"], n, kept)
        for x, u in steps:
            add_scaled_(x, [each.to(p.dtype) for each, p in zip(u, x, strict=True)], -kept["step_size"])
        return loss

    def _scaled(self, closure: Closure | None) -> list[_Scaled]:
        """``(x, g, B)`` of all parameters that have a gradient; B in single precision at least."""
        groups = moving(self, closure)
        scaled: list[_Scaled] = []
        of_hessian = [(group, x) for group, x in groups if group["preconditioner"] == "hutchinson"]
        if closure is not None and of_hessian:
            averages = average_curvature_(self, closure, of_hessian, of_hessian[0][0]["warm_up"])
            for (group, x), d in zip(of_hessian, averages, strict=True):
                scaled.append((x, gradients(x), truncated(d, group["alpha"])))
        for group, x in groups:
            if group["preconditioner"] == "none":
                scaled.append((x, gradients(x), wide([torch.ones_like(p) for p in x])))
            elif group["preconditioner"] != "hutchinson":
                for each, g, v in gather(type(self).__name__, group, self.state, ("square",), count_step):
                    scaled.append((each, g, wide(self._scale(group, self.state[each[0]]["step"], g, v))))
        return scaled

    def _scale(self, group: dict[str, Any], t: int, g: list[Tensor], v: list[Tensor]) -> list[Tensor]:
        if group["preconditioner"] == "adagrad":
            return adagrad_scale(g, v, eps=group["eps"])
        return adam_scale(g, v, t=t, b2=group["beta2"], eps=group["eps"])

    def logged(self) -> dict[str, float]:
        """Figures of the last step that are worth a curve."""
        kept = self.param_groups[0]
        return {name: kept[name] for name in ("step_size", "slack") if name in kept}


class PolyakStepWithSlack(PolyakStep):
    """A bound on the loss that gives way: ``f + gᵀΔ <= s`` in place of ``f + gᵀΔ = 0``."""

    def __init__(
        self,
        params: Any,
        lam: float = 0.1,
        mu: float = 1.0,
        preconditioner: str = "adam",
        f_star: float = 0.0,
        beta2: float = 0.999,
        eps: float = 1e-8,
        alpha: float = 1e-2,
        warm_up: int = 100,
    ) -> None:
        non_negative(lam=lam)
        positive(mu=mu)
        super().__init__(
            params,
            {
                "lam": lam,
                "mu": mu,
                "preconditioner": preconditioner,
                "f_star": f_star,
                "beta2": beta2,
                "eps": eps,
                "alpha": alpha,
                "warm_up": warm_up,
            },
        )

    def _length(self, f: float, n: float, kept: dict[str, Any]) -> float:
        tau, kept["slack"] = self._solve(f, n, kept.get("slack", 0.0), lam=kept["lam"], mu=kept["mu"])
        return tau

    def _solve(self, f: float, n: float, s: float, *, lam: float, mu: float) -> tuple[float, float]:
        raise NotImplementedError  # pragma: no cover
