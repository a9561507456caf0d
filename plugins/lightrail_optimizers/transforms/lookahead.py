"""Lookahead: k steps forward, one step back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightrail.errors import CompositionError
from lightrail.options import at_least, between, one_of
from lightrail.step import Closure, Transform
from lightrail.step.sharded import copy_tensors
from lightrail.step.transform import has_evaluation_point
from lightrail.traits import Traits
from lightrail_optimizers.iterate_average import require_training_point
from lightrail_optimizers.tensor_lists import global_norm

__all__ = ["Lookahead", "synchronize_"]


def synchronize_(slow: list[Tensor], fast: list[Tensor], alpha: float) -> None:
    """``slow += alpha (fast - slow)``; ``fast = slow``, both in place; with ``alpha = 1`` the fast weights stay.

    Example:
        >>> slow, fast = [torch.tensor([1.0])], [torch.tensor([3.0])]
        >>> synchronize_(slow, fast, 0.25)
        >>> slow[0].item(), fast[0].item()
        (1.5, 1.5)
    """
    torch._foreach_lerp_(slow, fast, alpha)
    copy_tensors(fast, slow)


class Lookahead(Transform):
    """Goes k steps with any optimizer, then part of the way from where it set out to where it got.

    After every k-th step ``slow += alpha (fast - slow)``; ``fast = slow``. The optimizer moves the fast weights; the
    slow weights are what is evaluated and what a checkpoint holds.

    Args:
        k: Optimizer steps from one synchronization to the next, at least 1.
        alpha: Share of the way that the slow weights go, in (0, 1]; 1 trains as the optimizer alone does, bit for bit.
        momentum: What becomes of the optimizer's state at a synchronization: ``keep`` it, as the paper's runs do, or
            ``reset`` it: the optimizer goes on as though it were new, its counts of steps included.

    Raises:
        ConfigurationError: An option out of range.
        CompositionError: The optimizer is itself evaluated at another point than it trains.
        UserError: A step at the evaluation point.

    Guarantees:
        ``eval`` goes to the slow weights and ``train`` back to the fast ones, bit for bit; a state that is saved at
        either point goes on from there. Before the first step both are the same. One copy of the parameters is kept.

    Deviations:
        The paper also interpolates the momentum as it does the weights; that is not offered. BatchNorm statistics are
        those of the fast weights. It belongs behind other transforms that edit the update, since those behind it would
        edit the synchronization too.

    Example:
        >>> from lightrail import Closure, TransformedOptimizer
        >>> w = torch.nn.Parameter(torch.tensor([8.0]))
        >>> optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=0.5), [Lookahead(k=2, alpha=0.5)])
        >>> for _ in range(3):
        ...     loss = optimizer.step(Closure(lambda: (w**2).sum() / 2, [w]))
        ...     w.item()
        4.0
        5.0
        2.5
        >>> optimizer.eval()
        >>> w.item()
        5.0

    Reference:
        Zhang, Lucas, Hinton and Ba, 2019, "Lookahead Optimizer: k steps forward, 1 step back", arXiv:1907.08610,
        Algorithm 1.
    """

    traits = Traits(
        rule="every k steps: slow += alpha (fast - slow); fast = slow; evaluated at slow",
        paper=("Zhang, Lucas, Hinton, Ba, 2019, Lookahead Optimizer: k steps forward, 1 step back, arXiv:1907.08610"),
        state=1,
        has_evaluation_point=True,
        example={"k": 2},
    )

    def __init__(self, k: int = 5, alpha: float = 0.5, momentum: str = "keep") -> None:
        at_least(1, k=k)
        between(0.0, 1.0, closed="right", alpha=alpha)
        one_of(("keep", "reset"), momentum=momentum)
        self.k = k
        self.alpha = alpha
        self.momentum = momentum
        self._t = 0
        self._slow: list[Tensor] = []
        # The fast weights, while the slow ones stand in the parameters.
        self._fast: list[Tensor] = []
        self._distance: Tensor | None = None

    def prepare(self, optimizer: Optimizer) -> None:
        if has_evaluation_point(optimizer):
            raise CompositionError(
                "two methods each want the parameters evaluated at a point of their own",
                found=f"lookahead around {type(optimizer).__name__}",
                allowed="an optimizer that is evaluated where it trains",
                remedy="Leave out lookahead, or choose another optimizer.",
            )
        self._optimizer = optimizer

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        require_training_point(self, bool(self._fast))  # type: ignore[arg-type]

    def after_step(self, params: list[Tensor], previous: list[Tensor]) -> None:
        # All of them at the first step; later those of a group that was added since.
        self._slow += [x.clone() for x in previous[len(self._slow) :]]
        self._t += 1
        if self._t % self.k:
            return
        self._slow = [slow.to(p) for slow, p in zip(self._slow, params, strict=True)]  # a checkpoint's device is any
        self._distance = global_norm(torch._foreach_sub(params, self._slow)) if params else None
        synchronize_(self._slow, params, self.alpha)
        if self.momentum == "reset":
            self._optimizer.state.clear()

    @torch.no_grad()
    def eval(self, params: list[Tensor]) -> None:
        if not self._fast and self._slow:
            self._fast = [p.detach().clone() for p in params[: len(self._slow)]]
            copy_tensors(params[: len(self._slow)], self._slow)

    @torch.no_grad()
    def train(self, params: list[Tensor]) -> None:
        if self._fast:
            copy_tensors(params[: len(self._fast)], self._fast)
            self._fast = []

    def state_dict(self) -> dict[str, Any]:
        return {"t": self._t, "slow": list(self._slow), "fast": list(self._fast)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._t = state["t"]
        self._slow = [slow.clone() for slow in state["slow"]]
        self._fast = [fast.clone() for fast in state["fast"]]

    def logged(self) -> dict[str, float]:
        """How far the fast weights had gone at the last synchronization."""
        return {} if self._distance is None else {"distance": float(self._distance)}
