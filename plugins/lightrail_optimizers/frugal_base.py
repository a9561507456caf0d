"""What the three kinds of FRUGAL share: the split of a gradient, the choice of subspaces, and their state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightrail.options import at_least, between, non_negative, one_of
from lightrail.traits import Traits
from lightrail_optimizers.hidden_matrices import HiddenMatrixOptimizer
from lightrail_optimizers.inner_rules import InnerRule
from lightrail_optimizers.subspaces import (
    SELECTIONS,
    Entries,
    Lines,
    LowRank,
    draw,
    how_many,
    random_subset,
    subspace,
)
from lightrail_optimizers.tensor_lists import add_scaled_, count_step, gather, refuse_sharded, shrink_

__all__ = ["PAPER", "Frugal", "block_order", "frugal", "state_free_"]

PAPER = (
    "Zmushko, Beznosikov, Takáč, Horváth, 2024, FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for "
    "Scalable Training, arXiv:2411.07837"
)
BLOCK_ORDERS = ("random", "ascending", "descending", "mirror")


def state_free_(x: list[Tensor], g: list[Tensor], *, lr: float, rule: str) -> None:
    """``x -= lr sign(g)`` (``sign``), ``x -= lr g`` (``sgd``) or nothing (``none``), in place."""
    if rule == "sign":
        add_scaled_(x, list(torch._foreach_sign(g)), -lr)
    elif rule == "sgd":
        add_scaled_(x, g, -lr)


def frugal(
    x: Tensor,
    g: Tensor,
    space: Lines | Entries | LowRank,
    stateful: Callable[[Tensor], Tensor],
    *,
    lr: float,
    free_lr: float,
    wd: float,
    state_free: str,
) -> None:
    """One update, in place: ``x *= 1 - lr wd``; ``r = down(g)``; ``x += up(stateful(r))``; the rest without state.

    Args:
        x: A matrix.
        g: Its gradient.
        space: The subspace with ``down`` and ``up``.
        stateful: The step of a method with state, learning rate and sign included, for a gradient in the subspace.
        lr: The learning rate, for the decay.
        free_lr: The learning rate of the rest, ``g - up(down(g))``.
        wd: Decoupled weight decay.
        state_free: The rule of the rest, as for :func:`state_free_`.
    """
    shrink_([x], lr * wd)
    r = space.down(g)
    if state_free != "none":
        state_free_([x], [space.rest(g, r)], lr=free_lr, rule=state_free)
    space.add_(x, stateful(r))


def block_order(order: str, size: int) -> list[int]:
    """The tensors of a group in the order in which they are taken.

    Example:
        >>> block_order("mirror", 5)
        [0, 4, 1, 3, 2]
    """
    if order == "ascending":
        return list(range(size))
    if order == "descending":
        return list(range(size - 1, -1, -1))
    return [i // 2 if i % 2 == 0 else size - 1 - i // 2 for i in range(size)]


class Frugal(HiddenMatrixOptimizer):
    """FRUGAL around one method with state, which its subclasses name."""

    traits: ClassVar[Traits]
    inner: ClassVar[InnerRule]

    def __init__(self, params: Iterable[Any], options: dict[str, Any], adamw_names: list[str] | None) -> None:
        super().__init__(params, {**options, "updates": 0, "blocks": [], "next_block": 0}, adamw_names)

    @classmethod
    def traits_under(cls, options: Mapping[str, Any]) -> Traits:
        """What it needs depends on how it chooses its subspaces."""
        selection = options.get("selection", "block")
        is_drawn = selection != "svd" and (selection != "block" or options.get("block_order", "random") == "random")
        return replace(cls.traits, needs_whole_tensors=selection != "block", is_stochastic=is_drawn)

    def check(self, options: dict[str, Any]) -> None:
        super().check(options)
        between(0.0, 1.0, closed="both", density=options["density"])
        at_least(1, update_gap=options["update_gap"])
        one_of(("block", *SELECTIONS), selection=options["selection"])
        one_of(BLOCK_ORDERS, block_order=options["block_order"])
        one_of(("sign", "sgd", "none"), state_free=options["state_free"])
        non_negative(state_free_scale=options["state_free_scale"], scale=options["scale"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for group in self.param_groups:
            if group["hidden"] and group["selection"] != "block":
                refuse_sharded(type(self).__name__, group["params"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torch casts all state to the dtype of its parameter; in half precision the numbers of lines do not survive it.
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(keys, params, strict=True):
            description = state_dict["state"].get(key, {}).get("subspace")
            if description is not None:
                self.state[p]["subspace"] = description.to(p.device, copy=True)

    def update_hidden(self, group: dict[str, Any]) -> None:
        if group["selection"] == "block" or group["density"] == 0:
            self._update_blocks(group)
        else:
            for x, g in self.gradients(group):
                self._update_in_subspace(group, x, g)

    # Whole tensors with state, and whole tensors without.

    def _update_blocks(self, group: dict[str, Any]) -> None:
        if all(p.grad is None for p in group["params"]):
            return
        if group["updates"] % group["update_gap"] == 0:
            self._choose_blocks(group)
        group["updates"] += 1
        chosen = set(group["blocks"])
        with_state = [p for i, p in enumerate(group["params"]) if i in chosen]
        without = [p for i, p in enumerate(group["params"]) if i not in chosen]
        name, lr, wd = type(self).__name__, float(group["lr"]), group["weight_decay"]
        states = self.inner.state_names
        for x, g, *kept in gather(name, {"params": with_state}, self.state, states, count_step):
            shrink_(x, lr * wd)
            t = self.state[x[0]]["step"]
            self.inner.update(group, t, x, self._downhill(group, g), *kept, lr=lr * group["scale"], wd=0.0)
        for x, g in gather(name, {"params": without}, self.state, ()):
            shrink_(x, lr * wd)
            free_lr = lr * group["scale"] * group["state_free_scale"]
            state_free_(x, self._downhill(group, g), lr=free_lr, rule=group["state_free"])

    @staticmethod
    def _downhill(group: dict[str, Any], g: list[Tensor]) -> list[Tensor]:
        return list(torch._foreach_neg(g)) if group["maximize"] else g

    def _choose_blocks(self, group: dict[str, Any]) -> None:
        params = group["params"]
        size, count = len(params), how_many(len(params), group["density"])
        if group["block_order"] == "random":
            group["blocks"] = random_subset(size, count, params[0].device).tolist() if count else []
        else:
            order, start = block_order(group["block_order"], size), group["next_block"]
            group["blocks"] = [order[(start + i) % size] for i in range(count)]
            group["next_block"] = (start + count) % size
        for i, p in enumerate(params):
            if group["reset"] or i not in group["blocks"]:
                self.state.pop(p, None)

    # A part of each tensor.

    def _update_in_subspace(self, group: dict[str, Any], x: Tensor, g: Tensor) -> None:
        kept = self.state[x]
        if kept.get("updates", 0) % group["update_gap"] == 0:
            self._choose_subspace(group, kept, g)
        kept["updates"] += 1
        kept["step"] += 1
        lr = float(group["lr"])
        active_lr = lr * group["scale"]

        def stateful(r: Tensor) -> Tensor:
            u = torch.zeros_like(r)
            states = [[kept[key]] for key in self.inner.state_names]
            self.inner.update(group, kept["step"], [u], [r], *states, lr=active_lr, wd=0.0)
            return u

        frugal(
            x,
            g,
            subspace(group["selection"], kept["subspace"]),
            stateful,
            lr=lr,
            free_lr=active_lr * group["state_free_scale"],
            wd=group["weight_decay"],
            state_free=group["state_free"],
        )

    def _choose_subspace(self, group: dict[str, Any], kept: dict[str, Any], g: Tensor) -> None:
        first = not kept
        kept["subspace"] = draw(group["selection"], g, group["density"])
        if first or group["reset"]:
            r = subspace(group["selection"], kept["subspace"]).down(g)
            for key in self.inner.state_names:
                kept[key] = torch.zeros_like(r, memory_format=torch.contiguous_format)
            kept["step"] = 0
        kept.setdefault("updates", 0)
