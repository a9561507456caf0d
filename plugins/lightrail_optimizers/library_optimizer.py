"""What optimizers of other libraries lack of torch's conventions, for the adapters that subclass them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from lightrail.errors import PluginError
from lightrail_optimizers.tensor_lists import refuse_sparse
from lightrail_optimizers.tensorwise import MethodOptimizer

__all__ = ["LibraryOptimizer", "missing_library"]


def missing_library(plugin: str, error: ModuleNotFoundError, extra: str = "optimizers") -> PluginError:
    """The error for a library of an extra that is not installed.

    Args:
        plugin: Who needs it, in the user's words, such as ``optimizer 'soap'``.
        error: What importing it raised.
        extra: The extra that brings it.
    """
    return PluginError(
        f"{plugin} needs an extra that is not installed",
        found=f"no module named '{error.name}'",
        allowed=f"lightrail with the extra {extra}",
        remedy=f"Run `pip install 'lightrail[{extra}]'`.",
    )


class LibraryOptimizer(MethodOptimizer):
    """The first base of an adapter, before the library's class, whose update it surrounds.

    The closure is evaluated once, before the update. Sparse and complex gradients are refused by name. A 0-d tensor for
    ``lr`` is read and left as it is, and so is ``.grad``.
    """

    _edits_gradients: ClassVar[bool] = False

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
        params = [p for group in self.param_groups for p in group["params"]]
        gradients = [p.grad for p in params]
        for gradient in gradients:
            if gradient is not None and gradient.is_sparse:
                refuse_sparse(type(self).__name__, gradient)
        rates = [group["lr"] for group in self.param_groups]
        try:
            for group in self.param_groups:
                group["lr"] = float(group["lr"])
            if self._edits_gradients:
                for p, gradient in zip(params, gradients, strict=True):
                    p.grad = None if gradient is None else gradient.clone()
            super().step()
        finally:
            for group, lr in zip(self.param_groups, rates, strict=True):
                group["lr"] = lr
            if self._edits_gradients:
                for p, gradient in zip(params, gradients, strict=True):
                    p.grad = gradient
        return loss
