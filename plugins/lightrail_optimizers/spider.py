"""SPIDER: a gradient estimate that follows the iterates by differences, restarted from larger batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightrail.options import at_least, non_negative
from lightrail.step import Closure
from lightrail.traits import Claim, Traits
from lightrail_optimizers.closure_answers import answers_for, moving
from lightrail_optimizers.normalized_gd import normalized_step
from lightrail_optimizers.tensor_lists import gather, global_norm
from lightrail_optimizers.tensorwise import MethodOptimizer, require_closure

__all__ = ["Spider", "spider_"]


def spider_(v: list[Tensor], g: list[Tensor], g_previous: list[Tensor]) -> None:
    """``v += g - g_previous``, in place: the gradients of one batch, at this point and at the previous one."""
    torch._foreach_add_(v, g)
    torch._foreach_sub_(v, g_previous)


class Spider(MethodOptimizer):
    """SPIDER: steps of fixed length along a gradient estimate whose noise does not grow with batches, but with steps.

    Every ``restart_every`` moves, ``v = `` the mean gradient of ``anchor_batches`` successive batches at one point. At
    the others, ``v += ∇f_B(x_t) - ∇f_B(x_{t-1})``, both on the current batch. Then ``x -= lr v / ||v||``, one norm over
    all parameters.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, >= 0: the distance that all parameters move together in a step.
        restart_every: Moves from one restart to the next, >= 1; about the square root of the samples of an anchor is
            what the paper's rate asks for. 1 is normalized gradient descent on anchors.
        anchor_batches: How many batches the gradient of a restart is averaged over, >= 1; nothing moves at all of
            them but the last. The paper's anchors are the largest batches that can be had: at 1, a restart is as noisy
            as the gradient of a batch.

    Raises:
        ConfigurationError: An option out of range; a complex parameter or a sparse gradient.
        ClosureError: The closure is not a :class:`lightrail.Closure`.

    Guarantees:
        Both gradients of a step see the same micro-batches and the same dropout masks; BatchNorm statistics move once.

    Deviations:
        The paper draws one large batch for a restart; here it is made of the loop's own, one after the other. A
        parameter that gets its first gradient between restarts begins with that gradient.

    Example:
        >>> from lightrail import Closure
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = Spider([w], lr=0.5, restart_every=2)
        >>> for _ in range(2):
        ...     loss = optimizer.step(Closure(lambda: (w**2).sum() / 2, [w]))
        >>> [round(value, 4) for value in w.tolist()]
        [2.4, 3.2]

    Reference:
        Fang, Li, Lin and Zhang, 2018, "SPIDER: Near-Optimal Non-Convex Optimization via Stochastic Path-Integrated
        Differential Estimator", arXiv:1807.01695, Algorithm 1; for losses whose curvature grows with the gradient,
        Chen, Zhou, Liang and Lu, 2023, arXiv:2303.02854.
    """

    traits = Traits(
        rule="x -= lr v / ||v||, v += g_B(x_t) - g_B(x_t-1), restarted from anchor gradients",
        paper=(
            "Fang, Li, Lin, Zhang, 2018, SPIDER: Near-Optimal Non-Convex Optimization via Stochastic Path-Integrated "
            "Differential Estimator, arXiv:1807.01695"
        ),
        state=2,
        extra_evaluations=0.9,
        needs_closure=True,
        needs_whole_tensors=True,
        example={"lr": 0.01, "restart_every": 3},
        claim=Claim(sentence="a lower loss than SGD's at equal gradients", baseline="sgd"),
    )

    def __init__(self, params: Any, lr: float = 0.01, restart_every: int = 10, anchor_batches: int = 1) -> None:
        non_negative(lr=lr)
        at_least(1, restart_every=restart_every, anchor_batches=anchor_batches)
        self.restart_every = restart_every
        self.anchor_batches = anchor_batches
        super().__init__(params, {"lr": lr})

    def __getstate__(self) -> dict[str, Any]:
        own = {"restart_every": self.restart_every, "anchor_batches": self.anchor_batches}
        return {**super().__getstate__(), **own}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        # One count for all: there is one estimate of one gradient.
        self.param_groups[-1]["batches_seen"] = self.param_groups[0].get("batches_seen", 0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One batch: a move, or a part of an anchor.

        Args:
            closure: A :class:`lightrail.Closure`.

        Returns:
            The loss at the point where the step began.

        Raises:
            ClosureError: It is another closure, or none.
        """
        oracle = require_closure(self, closure, "takes each batch's gradient at this point and at the previous one")
        loss = oracle()
        moving(self, oracle)  # refuses what the closure does not know, before anything moves
        place = self.param_groups[0]["batches_seen"] % (self.anchor_batches + self.restart_every - 1)
        if place < self.anchor_batches:
            self._average_anchor(place)
        else:
            self._follow(oracle)
        if place >= self.anchor_batches - 1:
            self._move()
        for group in self.param_groups:
            group["batches_seen"] += 1
        return loss

    def _lists(self) -> Iterator[tuple[dict[str, Any], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]]:
        """``(group, x, g, v, x_previous)``."""
        name = type(self).__name__
        for group in self.param_groups:
            for lists in gather(name, group, self.state, ("estimate", "previous"), _has_estimate):
                yield (group, *lists)  # type: ignore[misc]

    def _average_anchor(self, place: int) -> None:
        for _, x, g, v, _ in self._lists():
            torch._foreach_lerp_(v, g, 1 / (place + 1) if self._follows(x) else 1.0)

    def _follow(self, closure: Closure) -> None:
        points = [self.state[p]["previous"] if p in self.state else p for p in closure.params]
        with closure.at(points):
            _, found = closure.gradient()
        for _, x, g, v, _ in self._lists():
            if self._follows(x):
                spider_(v, g, answers_for(x, closure, found))
            else:
                torch._foreach_copy_(v, g)

    def _follows(self, x: list[Tensor]) -> bool:
        """Whether these parameters have an estimate that goes on; they have one from here on."""
        has_estimate = self.state[x[0]]["has_estimate"]
        for p in x:
            self.state[p]["has_estimate"] = True
        return has_estimate

    def _move(self) -> None:
        lists = list(self._lists())
        norm = global_norm([v_i for _, _, _, v, _ in lists for v_i in v])
        for group, x, _, v, previous in lists:
            torch._foreach_copy_(previous, x)
            normalized_step(x, v, norm, lr=float(group["lr"]))


def _has_estimate(kept: dict[str, Any]) -> int:
    return int(kept.setdefault("has_estimate", False))
