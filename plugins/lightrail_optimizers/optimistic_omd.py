"""Optimistic online mirror descent in Euclidean space: a step size from how badly gradients were foreseen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightrail.options import positive
from lightrail.traits import Claim, Traits
from lightrail_optimizers.tensor_lists import add_scaled_, gather, global_norm
from lightrail_optimizers.tensorwise import MethodOptimizer

__all__ = ["OptimisticOMD", "optimistic_omd"]


def optimistic_omd(x: list[Tensor], g: list[Tensor], hint: list[Tensor], *, eta: float, eta_next: float) -> None:
    """One update, in place: ``x̂ = x + eta M``; ``x̂ -= eta g``; ``M = g``; ``x = x̂ - eta_next M``.

    Args:
        x: The point that was played, ``x_t``.
        g: The gradient there.
        hint: ``M_t``, the gradient that was foreseen.
        eta: ``η_t``.
        eta_next: ``η_{t+1}``.
    """
    add_scaled_(x, hint, eta)
    add_scaled_(x, g, -(eta + eta_next))
    torch._foreach_copy_(hint, g)


class OptimisticOMD(MethodOptimizer):
    """Optimistic online mirror descent with the Euclidean distance; it sets its own step size.

    ``x_t = x̂_t - η_t M_t`` is where the gradient ``g_t`` is taken; ``x̂_{t+1} = x̂_t - η_t g_t``; ``M_{t+1} = g_t``,
    ``M_1 = 0``. ``η_t = D / sqrt(δ + Σ_{s<t} ||g_s - M_s||²)``: gradients that change slowly keep it large. The
    parameters are at ``x_t``.

    The norm is that of all parameters of a learner. A game has a learner a player, each with a step size of its own:
    the groups that name one ``player`` are one learner, and so are those that name none.

    Args:
        params: Parameters or parameter groups; in a game, a group a player.
        diameter: D, how far the solution may be from the start, > 0.
        delta: δ, > 0; the first step size is ``D / sqrt(δ)``. The paper's bound wants at least 4 G², where G is the
            norm of the largest gradient.
        maximize: Ascend.

    Raises:
        ConfigurationError: An option out of range; a complex or sharded parameter or a sparse gradient.

    Deviations:
        Without a bounded domain, so without projections. The paper writes ``δ + 4 G²`` where this has ``δ``, for G is
        not known ahead. A parameter without gradient stays, and counts for nothing in the norm of that step.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
        >>> optimizer = OptimisticOMD([x], diameter=0.1, delta=1.0)
        >>> for _ in range(2):
        ...     x.grad = torch.tensor([0.6, 0.8], dtype=torch.float64)
        ...     optimizer.step()
        ...     print([round(v, 4) for v in x.tolist()])
        [2.8976, 3.8634]
        [2.8551, 3.8069]

    Reference:
        Chen, Zhang, Tu, Zhao, Zhang, 2023, "Optimistic Online Mirror Descent for Bridging Stochastic and Adversarial
        Online Convex Optimization", arXiv:2302.04552, Section 3 (convex and smooth functions).
    """

    traits = Traits(
        rule="x_t = x̂_t - η_t g_{t-1}; x̂_{t+1} = x̂_t - η_t g_t; η_t = D / sqrt(δ + Σ ||g_s - g_{s-1}||²)",
        paper=(
            "Chen, Zhang, Tu, Zhao, Zhang, 2023, Optimistic Online Mirror Descent for Bridging Stochastic and "
            "Adversarial Online Convex Optimization, arXiv:2302.04552"
        ),
        state=1,
        sets_step_size=True,
        needs_whole_tensors=True,
        example={"diameter": 0.1},
        claim=Claim(
            sentence="reaches the solution that descent and ascent circle", baseline="sgd", problems=("bilinear_game",)
        ),
    )

    def __init__(self, params: Any, diameter: float = 1.0, delta: float = 1.0, maximize: bool = False) -> None:
        positive(diameter=diameter, delta=delta)
        super().__init__(params, {"diameter": diameter, "delta": delta, "maximize": maximize})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        *others, new = self.param_groups
        sums = [each["surprise"] for each in others if each.get("player") == new.get("player")]
        new.setdefault("surprise", sums[0] if sums else 0.0)

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
        learners: dict[Any, list[dict[str, Any]]] = {}
        for group in self.param_groups:
            learners.setdefault(group.get("player"), []).append(group)
        for groups in learners.values():
            self._play(groups)
        return loss

    def step_size(self, group: dict[str, Any]) -> float:
        """``η_t`` of one of the ``param_groups``, for the step to come."""
        return group["diameter"] / (group["delta"] + group["surprise"]) ** 0.5

    def _play(self, groups: list[dict[str, Any]]) -> None:
        """One step of one learner."""
        moves = [(group, *lists) for group in groups for lists in self._lists(group)]
        surprise = sum(float(global_norm(torch._foreach_sub(g, hint))) ** 2 for _, _, g, hint in moves)
        etas = [self.step_size(group) for group in groups]
        for group in groups:
            group["surprise"] += surprise
        before = {id(group): eta for group, eta in zip(groups, etas, strict=True)}
        for group, x, g, hint in moves:
            optimistic_omd(x, g, hint, eta=before[id(group)], eta_next=self.step_size(group))

    def _lists(self, group: dict[str, Any]) -> list[tuple[list[Tensor], ...]]:
        found = gather(type(self).__name__, group, self.state, ("previous_gradient",))
        return [(x, list(torch._foreach_neg(g)) if group["maximize"] else g, hint) for x, g, hint in found]
