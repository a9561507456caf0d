"""The base of methods for hidden matrices, which leave every other parameter to AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lightrail.errors import ConfigurationError
from lightrail_optimizers.inner_rules import ADAMW, check_inner_options
from lightrail_optimizers.named_parameters import EMBEDDING_AND_OUTPUT_NAMES, is_hidden_matrix, named_groups
from lightrail_optimizers.tensor_lists import count_step, gather, refuse_sparse
from lightrail_optimizers.tensorwise import MethodOptimizer

__all__ = ["HiddenMatrixOptimizer"]

_ADAMW_OPTIONS = ("lr", "betas", "eps", "weight_decay", "maximize")


class HiddenMatrixOptimizer(MethodOptimizer):
    """An optimizer of named parameters: each group is split into its hidden matrices and all else.

    A subclass writes ``update_hidden(group)`` and may extend ``check(options)``. Options whose name begins with
    ``adamw_`` are AdamW's; where there is none, AdamW takes that of the method.

    Args:
        params: ``(name, parameter)`` pairs, or groups of them.
        options: By name; a group may bring its own.
        adamw_names: Patterns of names that stay with AdamW; ``None`` for embeddings and output layers.
    """

    def __init__(self, params: Iterable[Any], options: dict[str, Any], adamw_names: list[str] | None) -> None:
        self._options = options
        self._names = EMBEDDING_AND_OUTPUT_NAMES if adamw_names is None else tuple(adamw_names)
        super().__init__(params, {"lr": options["lr"]})
        if not any(group["hidden"] for group in self.param_groups):
            name = type(self).__name__
            raise ConfigurationError(
                f"{name} found no hidden matrix to work on",
                found="no two-dimensional parameter outside embeddings and output layers",
                allowed="a model with at least one hidden linear layer",
                remedy="Choose optimizer=adamw, or narrow optimizer.adamw_names.",
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_options": self._options, "_names": self._names}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of ``(name, parameter)`` pairs, as one group of hidden matrices and one of the rest."""
        (group,) = named_groups(type(self).__name__, [param_group])
        pairs: list[tuple[str, Tensor]] = group.pop("params")
        options = {**self._options, **group}
        self.check(options)
        hidden = [p for name, p in pairs if is_hidden_matrix(name, p, self._names)]
        rest = [p for name, p in pairs if not is_hidden_matrix(name, p, self._names)]
        if hidden:
            own = {k: v for k, v in options.items() if not k.startswith("adamw_")}
            super().add_param_group({"params": hidden, "hidden": True, **own})
        if rest:
            own = {k: options.get(f"adamw_{k}", options.get(k)) for k in _ADAMW_OPTIONS}
            super().add_param_group({"params": rest, "hidden": False, **own})

    def check(self, options: dict[str, Any]) -> None:
        """Raises where an option is out of range."""
        check_inner_options(options)

    def update_hidden(self, group: dict[str, Any]) -> None:
        """One update of a group of hidden matrices."""
        raise NotImplementedError  # pragma: no cover

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
        for group in self.param_groups:
            if group["hidden"]:
                self.update_hidden(group)
            else:
                self._update_rest(group)
        return loss

    def gradients(self, group: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """``(x, g)`` of every parameter that has entries and a gradient; ``g`` points uphill for a descent."""
        found = []
        for p in group["params"]:
            if p.grad is None or p.numel() == 0:
                continue
            if p.grad.is_sparse:
                refuse_sparse(type(self).__name__, p.grad)
            found.append((p, -p.grad if group["maximize"] else p.grad))
        return found

    def _update_rest(self, group: dict[str, Any]) -> None:
        lr, wd = float(group["lr"]), group["weight_decay"]
        for x, g, *states in gather(type(self).__name__, group, self.state, ADAMW.state_names, count_step):
            if group["maximize"]:
                g = list(torch._foreach_neg(g))
            ADAMW.update(group, self.state[x[0]]["step"], x, g, *states, lr=lr, wd=wd)
