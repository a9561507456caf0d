"""What the two kinds of Sophia share: the update, the counting of steps, and the average of the estimates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightrail.errors import ClosureError
from lightrail.options import at_least, between, non_negative, positive
from lightrail.step import Closure
from lightrail_optimizers.sophia_rule import sophia
from lightrail_optimizers.tensor_lists import gather
from lightrail_optimizers.tensorwise import TensorwiseOptimizer, require_closure

__all__ = ["Sophia"]


class Sophia(TensorwiseOptimizer):
    """An optimizer that divides momentum by an estimate of curvature; its subclasses say how to estimate."""

    state_names = ("momentum", "hessian")
    rule = staticmethod(sophia)
    # Options that belong to the loop rather than to a group: a checkpoint does not bring them back, a copy keeps them.
    _own: ClassVar[tuple[str, ...]] = ()
    _form = "paper"

    def __init__(self, params: Any, options: dict[str, Any]) -> None:
        non_negative(lr=options["lr"], gamma=options["gamma"], weight_decay=options["weight_decay"])
        b1, b2 = options["betas"]
        between(0.0, 1.0, beta1=b1, beta2=b2)
        positive(eps=options["eps"])
        at_least(1, update_every=options["update_every"])
        super().__init__(params, {**options, "betas": (b1, b2)})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._own}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        # One count for all: a group that joins later is estimated together with the others.
        self.param_groups[-1]["step"] = self.param_groups[0].get("step", 0)

    def scalars(self, group: dict[str, Any], t: int) -> dict[str, Any]:
        return {
            "lr": group["lr"],
            "b1": group["betas"][0],
            "gamma": group["gamma"],
            "eps": group["eps"],
            "wd": group["weight_decay"],
            "form": self._form,
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step.

        Args:
            closure: A :class:`lightrail.Closure`. Steps at which no estimate is due take torch's own closure, or
                ``None`` with gradients in ``.grad``.

        Returns:
            The loss at the point where the step began; ``None`` without a closure.

        Raises:
            ClosureError: An estimate is due, and the closure cannot give it.
        """
        counts = 0 if self._form == "paper" else 1  # the estimate precedes the update of step 1, or follows that of k
        due = [group for group in self.param_groups if (group["step"] + counts) % group["update_every"] == 0]
        oracle = require_closure(self, closure, "estimates the Hessian at this step") if due else None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if oracle is not None and self._form == "paper":
            self._average_estimate(oracle, due)
        self.update()
        for group in self.param_groups:
            group["step"] += 1
        if oracle is not None and self._form != "paper":
            self._average_estimate(oracle, due)
        return loss

    def _average_estimate(self, closure: Closure, groups: list[dict[str, Any]]) -> None:
        """``h = b2 h + (1-b2) ĥ`` in the groups whose turn it is."""
        estimates = dict(zip(closure.params, self._estimate(closure), strict=True))
        for group in groups:
            for x, _, _, h in gather(type(self).__name__, group, self.state, self.state_names):
                torch._foreach_lerp_(h, [self._of(estimates, p, group) for p in x], 1 - group["betas"][1])

    def _of(self, estimates: Mapping[Tensor, Tensor], p: Tensor, group: Mapping[str, Any]) -> Tensor:
        if p not in estimates:
            raise ClosureError(
                f"the closure does not know a parameter of {type(self).__name__}",
                found=f"a parameter of shape {tuple(p.shape)} that is not among closure.params",
                allowed="lightrail.Closure over every parameter of the optimizer",
                remedy="Pass the same parameters to lightrail.Closure and to the optimizer.",
            )
        return estimates[p]

    def _estimate(self, closure: Closure) -> list[Tensor]:
        raise NotImplementedError  # pragma: no cover

    @torch.no_grad()
    def win_rate(self) -> float:
        """The fraction of coordinates that the last step did not clip; the paper finds 0.1 to 0.5 healthy."""
        unclipped, total = 0, 0
        for group in self.param_groups:
            for p in group["params"]:
                if kept := self.state.get(p):
                    curvature = kept["hessian"] * group["gamma"]
                    bound = curvature.clamp_(min=group["eps"]) if self._form == "paper" else curvature + group["eps"]
                    unclipped += int((kept["momentum"].abs() < bound).sum())
                    total += p.numel()
        return unclipped / total if total else 0.0

    def logged(self) -> dict[str, float]:
        """Figures of the last step that are worth a curve."""
        return {"win_rate": self.win_rate()}
