"""What the methods of error-feedback compressed preconditioning share: compress, keep, precondition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightrail.options import between, one_of
from lightrail_optimizers.compressed_window import TopKWindow
from lightrail_optimizers.error_feedback import feed_back_
from lightrail_optimizers.flat_vector import state_holder
from lightrail_optimizers.gradient_window import DenseWindow, Window, insert
from lightrail_optimizers.tensor_lists import shrink_
from lightrail_optimizers.window_optimizer import WindowOptimizer, add_decay_, without_missing

__all__ = ["EFCP", "EFCP_PAPER", "check_top_k", "top_k_window"]

EFCP_PAPER = (
    "Modoranu, Kalinov, Kurtic, Frantar, Alistarh, 2023, Error Feedback Can Accurately Compress Preconditioners, "
    "arXiv:2306.06098"
)


class EFCP(WindowOptimizer):
    """An optimizer whose window holds compressed gradients; subclasses say how it compresses and what it inverts.

    Beside those of :class:`WindowOptimizer`, its groups hold ``precondition`` and ``decay_form``.
    """

    def __init__(self, params: Any, options: dict[str, Any]) -> None:
        one_of(("compressed", "gradient"), precondition=options["precondition"])
        one_of(("decoupled", "preconditioned"), decay_form=options["decay_form"])
        super().__init__(params, options)

    def window(self, group: dict[str, Any], kept: dict[str, Any], params: Sequence[Tensor], g: Tensor) -> Window:
        """The window in the state of a group, allocated if it is not there yet."""
        raise NotImplementedError

    def preconditioned(self, group: dict[str, Any], kept: dict[str, Any], window: Window, x: Tensor | None) -> Tensor:
        """The direction from the newest row of the window, or from another vector x."""
        raise NotImplementedError

    def direction(self, group: dict[str, Any], kept: dict[str, Any], params: Sequence[Tensor], g: Tensor) -> Tensor:
        if "error" not in kept:
            kept["error"] = torch.zeros_like(g, dtype=state_holder(params).dtype)
        window = self.window(group, kept, params, g)

        def compress(a: Tensor) -> Tensor:
            # What a parameter without gradient owes waits: it does not move in this step.
            return insert(window, kept, group["window"], without_missing(a, params))

        c = feed_back_(kept["error"], g, compress)
        x = g if group["precondition"] == "gradient" else None
        if wd := group["weight_decay"]:
            if group["decay_form"] == "preconditioned":
                x = add_decay_(c.clone() if x is None else x, params, wd)
            else:
                shrink_([p for p in params if p.grad is not None], float(group["lr"]) * wd)
        return self.preconditioned(group, kept, window, x)


def check_top_k(options: dict[str, Any]) -> None:
    """Raises where the options of a top-k window are out of range."""
    between(0.0, 1.0, closed="right", density=options["density"])
    one_of(("global", "tensor"), selection=options["selection"])


def top_k_window(group: dict[str, Any], kept: dict[str, Any], params: Sequence[Tensor], g: Tensor) -> Window:
    """The window of largest entries in the state of a group; one of whole gradients where the density is 1."""
    m, dtype = group["window"], state_holder(params).dtype
    if group["density"] == 1:
        if "window" not in kept:
            kept["window"] = torch.zeros(m, len(g), dtype=dtype, device=g.device)
        return DenseWindow(kept["window"])
    lengths = [p.numel() for p in params] if group["selection"] == "tensor" else [len(g)]
    return TopKWindow.of(kept, m, lengths, group["density"], g, dtype)
