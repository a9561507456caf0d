"""Cyclic block descent: one proximal gradient step a block, each at the point that the blocks before it have made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightrail.options import between, non_negative, one_of
from lightrail.step import Closure
from lightrail.traits import Claim, Traits
from lightrail_optimizers.closure_answers import answers_for, moving, points_of
from lightrail_optimizers.named_optimizer import BlockOptimizer
from lightrail_optimizers.sophia_rule import draw_directions
from lightrail_optimizers.tensorwise import require_closure

__all__ = ["CyclicBlock", "VarianceReducedCyclicBlock", "proximal_step_"]

_PAPER = (
    "Cai, Song, Wright, Diakonikolas, 2023, Cyclic Block Coordinate Descent With Variance Reduction for Composite "
    "Nonconvex Optimization, arXiv:2212.05088"
)
Gradients = dict[Tensor, Tensor]


def proximal_step_(x: list[Tensor], g: list[Tensor], *, lr: float, prox: str = "none", strength: float = 0.0) -> None:
    """``x = prox(x - lr g)`` with the proximal operator of ``lr r``, in place.

    Args:
        x: Parameters.
        g: Gradients; they stay as they are.
        lr: Step size.
        prox: Of r: ``none`` for 0, ``l1`` for ``strength ‖x‖₁``, ``l2`` for ``strength ‖x‖²/2``.
        strength: Of r.
    """
    torch._foreach_add_(x, g, alpha=-lr)
    by = lr * strength
    if prox == "l1":
        for p in x:  # towards zero by `by`, and no farther
            p.sub_(p.clamp(-by, by))
    elif prox == "l2":
        torch._foreach_div_(x, 1 + by)


class CyclicBlock(BlockOptimizer):
    """Cyclic block descent: layer after layer takes a proximal gradient step, each at the newest point.

    For blocks i = 1, …, m in order: ``x_i = prox(x_i - lr ∇_i f(x_1, …, x_{i-1}, x_i, …, x_m))``, where the blocks
    before i have moved and the others have not. A step is one such cycle and evaluates m times.

    Args:
        params: ``(name, parameter)`` pairs, or parameter groups whose ``params`` are such pairs. A group may have
            its own ``lr``, ``prox`` and ``strength``.
        lr: Learning rate, >= 0: of the order of 1 over the smoothness of a block, which may be far larger than 1
            over that of all parameters together.
        blocks: ``None`` for one block a layer (parameters whose names agree up to the last dot); a number joins
            consecutive layers into so many blocks, at most as many as there are layers.
        order: ``forward`` as the parameters are given, or ``backward``.
        prox: A term r that is added to the loss: ``none``, ``l1`` (``strength ‖x‖₁``, gives exact zeros) or ``l2``
            (``strength ‖x‖²/2``).
        strength: Of r, >= 0.

    Raises:
        ConfigurationError: An option out of range; parameters without names, complex, or with sparse gradients.
        ClosureError: The closure is not a :class:`lightrail.Closure`.

    Deviations:
        The paper lets each block have its own norm and step size, which groups give here. Which parameters have a
        gradient is told by the first evaluation of a step; the others stay where they are, also under ``prox``.

    Example:
        >>> from lightrail import Closure
        >>> a, b = (torch.nn.Parameter(torch.tensor(v)) for v in (1.0, 1.0))
        >>> optimizer = CyclicBlock([("a.weight", a), ("b.weight", b)], lr=0.5)
        >>> closure = Closure(lambda: (a + b).square() / 2, [a, b])
        >>> optimizer.step(closure).item(), a.item(), b.item(), closure.evaluations
        (2.0, 0.0, 0.5, 2)

    Reference:
        Cai, Song, Wright and Diakonikolas, 2023, arXiv:2212.05088, the method P-CCD.
    """

    traits = Traits(
        scales_with_gradient=True,
        rule="x_i = prox(x_i - lr ∇_i f(x)) for each block in turn, at the newest x",
        paper=_PAPER,
        state=0,
        extra_evaluations=None,  # blocks - 1
        needs_closure=True,
        needs_parameter_names=True,
        example={"lr": 0.1},
        claim=Claim(sentence="a lower loss than SGD's at equal passes", baseline="sgd", problems=("digits",)),
    )
    _own = (*BlockOptimizer._own, "order")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        blocks: int | None = None,
        order: str = "forward",
        prox: str = "none",
        strength: float = 0.0,
    ) -> None:
        non_negative(lr=lr, strength=strength)
        one_of(("forward", "backward"), order=order)
        one_of(("none", "l1", "l2"), prox=prox)
        self.order = order
        super().__init__(params, {"lr": lr, "prox": prox, "strength": strength}, blocks)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One cycle over the blocks.

        Args:
            closure: A :class:`lightrail.Closure`.

        Returns:
            The loss at the point where the step began.

        Raises:
            ClosureError: It is another closure, or none.
        """
        oracle = require_closure(self, closure, "evaluates the gradient anew for each block")
        loss = oracle()
        moving(self, oracle)
        blocks = [block for block in self.moving_blocks() if block]
        self._cycle(oracle, blocks if self.order == "forward" else blocks[::-1])
        return loss

    def _cycle(self, oracle: Closure, blocks: list[list[Tensor]]) -> None:
        for _, gradient in self._gradients(oracle, blocks):
            self._move(gradient)

    def _gradients(self, oracle: Closure, blocks: list[list[Tensor]]) -> Iterator[tuple[list[Tensor], Gradients]]:
        """Each block with its gradient where the parameters are by then; that of the first is known."""
        for index, block in enumerate(blocks):
            if index == 0:
                yield block, {p: p.grad for p in block if p.grad is not None}
            else:
                yield block, _gradient_of(block, oracle)

    def _move(self, gradient: Gradients) -> None:
        for group in self.param_groups:
            x = [p for p in group["params"] if p in gradient]
            if x:
                g = [gradient[p] for p in x]
                proximal_step_(x, g, lr=float(group["lr"]), prox=group["prox"], strength=group["strength"])


class VarianceReducedCyclicBlock(CyclicBlock):
    """Cyclic block descent along a recursive estimate of each block's gradient, as in PAGE.

    Each block has an estimate v_i. With ``probability``, ``v_i = ∇_i f_B(x)``; otherwise
    ``v_i += ∇_i f_B(x) - ∇_i f_B(y)``, both on the batch of the step, where y is the point at which v_i was estimated
    the last time, in the cycle before. Then ``x_i = prox(x_i - lr v_i)``.

    A step evaluates ``m (2 - probability)`` times for m blocks.

    Args:
        params: As for :class:`CyclicBlock`.
        lr: Learning rate, >= 0.
        probability: Of a fresh gradient, in (0, 1], for each block by itself. The paper's choice for b samples in a
            fresh gradient and b' in a difference is ``b' / (b + b')``: a half where the two are alike.
        blocks: As for :class:`CyclicBlock`.
        order: As for :class:`CyclicBlock`.
        prox: As for :class:`CyclicBlock`.
        strength: As for :class:`CyclicBlock`.

    Raises:
        ConfigurationError: An option out of range; parameters without names, complex, or with sparse gradients.
        ClosureError: The closure is not a :class:`lightrail.Closure`.

    Deviations:
        A fresh gradient is of the step's batch, as large as that of a difference; the paper takes a larger batch, or
        all samples. With batches of one size an estimate keeps the noise of its last fresh gradient: less noise than
        :class:`CyclicBlock` has takes windows (``trainer.accumulate_grad_batches``) that are nearly all of the data. A
        parameter that had no gradient in the last step starts with a fresh one.

    Example:
        >>> from lightrail import Closure
        >>> a = torch.nn.Parameter(torch.tensor(1.0))
        >>> optimizer = VarianceReducedCyclicBlock([("a", a)], lr=0.5, probability=1.0)
        >>> optimizer.step(Closure(lambda: a.square(), [a])).item(), a.item()
        (1.0, 0.0)

    Reference:
        Cai, Song, Wright and Diakonikolas, 2023, arXiv:2212.05088, the method VR-CCD; Li, Bao, Zhang and Richtárik,
        2021, "PAGE: A Simple and Optimal Probabilistic Gradient Estimator for Nonconvex Optimization",
        arXiv:2008.10898 (the estimator).
    """

    traits = Traits(
        scales_with_gradient=True,
        rule="x_i = prox(x_i - lr v_i) for each block in turn, v_i += ∇_i f_B(x) - ∇_i f_B(y), now and then ∇_i f_B(x)",
        paper=_PAPER,
        state=2,
        extra_evaluations=None,  # blocks (2 - probability) - 1
        needs_closure=True,
        needs_parameter_names=True,
        is_stochastic=True,
        example={"lr": 0.05},
        claim=Claim(sentence="a lower loss than SGD's at equal passes", baseline="sgd", problems=("digits",)),
    )
    _own = (*CyclicBlock._own, "probability")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        probability: float = 0.5,
        blocks: int | None = None,
        order: str = "forward",
        prox: str = "none",
        strength: float = 0.0,
    ) -> None:
        between(0.0, 1.0, closed="right", probability=probability)
        self.probability = probability
        super().__init__(params, lr, blocks, order, prox, strength)

    def _cycle(self, oracle: Closure, blocks: list[list[Tensor]]) -> None:
        start = {p: p.detach().clone() for block in blocks for p in block}
        # Where the estimates of the cycle before were taken: blocks that had moved by then, and blocks that had not.
        before = {p: kept["previous"] for p, kept in self.state.items() if "previous" in kept}
        for fresh, (block, gradient) in zip(self._coins(blocks), self._gradients(oracle, blocks), strict=True):
            self._move(self._estimate(block, gradient, fresh, oracle, before))
            before.update((p, start[p]) for p in block)
        for p in [p for p in self.state if p not in start]:
            del self.state[p]
        for p, point in start.items():
            self.state[p]["previous"] = point

    def _coins(self, blocks: list[list[Tensor]]) -> list[bool]:
        """For each block whether its gradient is fresh; the same on every rank."""
        if not blocks:
            return []
        (normal,) = draw_directions([torch.empty(len(blocks), device=blocks[0][0].device)], "gaussian")
        return (torch.special.ndtr(normal) < self.probability).tolist()

    def _estimate(
        self, block: list[Tensor], gradient: Gradients, fresh: bool, oracle: Closure, before: Gradients
    ) -> Gradients:
        """The new v of a block."""
        known = [] if fresh else [p for p in block if "estimate" in self.state[p]]
        if known:
            with oracle.at(points_of(oracle, list(before), list(before.values()))):
                old = _gradient_of(known, oracle)
            for p in known:
                self.state[p]["estimate"].add_(gradient[p] - old[p])
        for p in set(block).difference(known):
            self.state[p]["estimate"] = gradient[p].clone()
        return {p: self.state[p]["estimate"] for p in block}


def _gradient_of(params: list[Tensor], oracle: Closure) -> Gradients:
    return dict(zip(params, answers_for(params, oracle, oracle.gradient()[1]), strict=True))
