"""What the kinds of MARS share: which tensors are corrected, and where the earlier gradient comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightrail.errors import ConfigurationError
from lightrail.options import between, non_negative, one_of, positive
from lightrail.step import Closure
from lightrail.traits import Traits
from lightrail_optimizers.adam_rule import adamw_
from lightrail_optimizers.mars_rule import mars_adamw, mars_lion, mars_shampoo
from lightrail_optimizers.tensor_lists import count_step, gather
from lightrail_optimizers.tensorwise import TensorwiseOptimizer, require_closure

__all__ = ["CorrectedOptimizer"]


class _Update(NamedTuple):
    """One way to treat a tensor: the rule, its state after the previous gradient, and its keyword arguments."""

    rule: Callable[..., None]
    states: tuple[str, ...]
    takes: tuple[str, ...]


_ADAMW = ("lr", "t", "b1", "b2", "eps", "wd")
_UPDATES = {
    "adamw": _Update(adamw_, ("momentum", "second_moment"), _ADAMW),
    "mars_adamw": _Update(mars_adamw, ("momentum", "second_moment"), ("gamma", *_ADAMW)),
    "mars_lion": _Update(mars_lion, ("momentum",), ("gamma", "lr", "b1", "wd")),
    "mars_shampoo": _Update(mars_shampoo, ("momentum",), ("gamma", "lr", "b1", "eps", "wd")),
}


def _by_name(x: list[Tensor], g: list[Tensor], *states: list[Tensor], update: str, **scalars: Any) -> None:
    _UPDATES[update].rule(x, g, *states, **scalars)


class CorrectedOptimizer(TensorwiseOptimizer):
    """MARS: a gradient that is corrected by its change since the last step, in one of several updates.

    Each group that it is given becomes two, matrices and the rest, so that a schedule scales both learning rates.
    """

    rule = staticmethod(_by_name)
    # How matrices are updated, and tensors of fewer dimensions where these are corrected too.
    _of_matrices: ClassVar[str]
    _of_vectors: ClassVar[str]

    def __init__(self, params: Any, options: dict[str, Any]) -> None:
        non_negative(
            lr=options["lr"],
            gamma=options["gamma"],
            weight_decay=options["weight_decay"],
            lr_1d=options["lr_1d"],
            weight_decay_1d=options["weight_decay_1d"],
        )
        pairs = {name: tuple(options[name]) for name in ("betas", "betas_1d") if name in options}
        for name, pair in pairs.items():
            for beta in pair:
                between(0.0, 1.0, **{name: beta})
        between(0.0, 1.0, beta=options.get("beta", 0.0))
        positive(eps=options["eps"])
        one_of(("default", "official"), form=options["form"])
        self._at_previous: Mapping[Tensor, Tensor] = {}
        super().__init__(params, {**options, **pairs})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._at_previous = {}

    @classmethod
    def traits_under(cls, options: Mapping[str, Any]) -> Traits:
        """The exact form evaluates twice."""
        traits: Traits = cls.traits  # type: ignore[attr-defined]
        return dataclasses.replace(traits, needs_closure=True, extra_evaluations=1) if options.get("exact") else traits

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as one of matrices and one of all else; a group without tensors stays one."""
        given = {**self.defaults, **param_group}
        if given["exact"] != self.defaults["exact"]:
            raise ConfigurationError(
                "exact holds for all groups or for none",
                found=f"a group with exact={given['exact']}",
                allowed=f"exact={self.defaults['exact']}, as the optimizer was built",
                remedy="Leave exact out of the group.",
            )
        items = param_group["params"]
        items = [items] if isinstance(items, Tensor) else list(items)
        dims = [(item[1] if isinstance(item, tuple) else item).ndim for item in items]
        matrices = [n == 2 if given["form"] == "official" else n >= 2 for n in dims]
        whole = [item for item, is_matrix in zip(items, matrices, strict=True) if is_matrix]
        rest = [item for item, is_matrix in zip(items, matrices, strict=True) if not is_matrix]
        if whole or not rest:
            super().add_param_group({**param_group, "params": whole, "update": self._of_matrices})
        if rest:
            own = {"update": self._of_vectors} if given["optimize_1d"] else self._options_of_adamw(param_group)
            super().add_param_group({**param_group, "params": rest, **own})

    def _options_of_adamw(self, param_group: Mapping[str, Any]) -> dict[str, Any]:
        # What a group says for itself holds for all of its tensors: weight_decay=0 for norms and biases means them.
        own = {"update": "adamw"}
        for name in ("lr", "betas", "weight_decay"):
            own[name] = param_group.get(f"{name}_1d", param_group.get(name, self.defaults[f"{name}_1d"]))
        return own

    def scalars(self, group: dict[str, Any], t: int) -> dict[str, Any]:
        b1, b2 = group["betas"] if "betas" in group else (group["beta"], None)
        known = {
            "lr": group["lr"],
            "gamma": group["gamma"],
            "t": t,
            "b1": b1,
            "b2": b2,
            "eps": group["eps"],
            "wd": group["weight_decay"],
        }
        return {"update": group["update"], **{name: known[name] for name in _UPDATES[group["update"]].takes}}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step.

        Args:
            closure: Evaluates the loss and its gradient; ``None`` with gradients in ``.grad``. A
                :class:`lightrail.Closure` where ``exact`` is set.

        Returns:
            The loss at the point where the step began; ``None`` without a closure.

        Raises:
            ClosureError: ``exact`` is set, and the closure answers at one point only.
        """
        if not self.defaults["exact"]:
            return super().step(closure)
        oracle = require_closure(self, closure, "evaluates the gradient at the previous parameters too (exact=True)")
        loss = oracle()
        self._at_previous = self._gradients_at_previous(oracle)
        try:
            self.update()
        finally:
            self._at_previous = {}
        return loss

    def _gradients_at_previous(self, closure: Closure) -> dict[Tensor, Tensor]:
        """The gradient of this step's batch where the last step began; empty at the first step."""
        kept = {p: self.state[p]["previous"] for p in closure.params if "previous" in self.state.get(p, {})}
        if not kept:
            return {}
        with closure.at([kept.get(p, p) for p in closure.params]):
            _, gradients = closure.gradient()
        for p, previous in kept.items():
            previous.copy_(p)
        return {p: gradient for p, gradient in zip(closure.params, gradients, strict=True) if p in kept}

    def lists(self, group: dict[str, Any]) -> Iterator[tuple[list[Tensor], ...]]:
        name = type(self).__name__
        states, corrects, exact = _UPDATES[group["update"]].states, group["update"] != "adamw", self.defaults["exact"]
        keys = (*(["previous"] if exact else ["previous_gradient"] if corrects else []), *states)
        for x, g, *held in gather(name, group, self.state, keys, count_step, cached=not group["compile"]):
            if exact:
                g_prev = self._exchange_previous(x, g, held[0])
                if group["maximize"]:
                    g_prev = list(torch._foreach_neg(g_prev))
                held = [g_prev, *held[1:]] if corrects else held[1:]
            yield x, g, *held

    def _exchange_previous(self, x: list[Tensor], g: list[Tensor], previous: list[Tensor]) -> list[Tensor]:
        """The gradients at the previous parameters; keeps the parameters of those that are at their first step."""
        g_prev = []
        for p, gradient, kept in zip(x, g, previous, strict=True):
            found = self._at_previous.get(p)
            if found is None:
                kept.copy_(p)
                found = gradient.clone()
            g_prev.append(found)
        return g_prev
