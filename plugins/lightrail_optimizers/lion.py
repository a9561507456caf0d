"""Lion: the sign of an interpolation between momentum and gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightrail.options import between, non_negative
from lightrail.traits import Traits
from lightrail_optimizers.tensor_lists import gather, refuse_complex

__all__ = ["Lion", "lion", "lion_by_tensor"]


def lion(x: list[Tensor], g: list[Tensor], m: list[Tensor], *, lr: float, b1: float, b2: float, wd: float) -> None:
    """One update, in place: ``x *= 1 - lr wd``; ``x -= lr sign(b1 m + (1-b1) g)``; ``m = b2 m + (1-b2) g``."""
    if wd:
        # Not `_foreach_mul_(x, 1 - lr * wd)`: on a CPU it rounds the factor to half precision when x is in it.
        torch._foreach_add_(x, x, alpha=-lr * wd)
    u = torch._foreach_lerp(m, g, 1 - b1)
    torch._foreach_sign_(u)
    torch._foreach_add_(x, u, alpha=-lr)
    torch._foreach_lerp_(m, g, 1 - b2)


def lion_by_tensor(
    x: list[Tensor], g: list[Tensor], m: list[Tensor], *, lr: float, b1: float, b2: float, wd: float
) -> None:
    """The same as :func:`lion`, bit for bit, one tensor after the other."""
    for x_i, g_i, m_i in zip(x, g, m, strict=True):
        if wd:
            x_i.add_(x_i, alpha=-lr * wd)
        x_i.add_(m_i.lerp(g_i, 1 - b1).sign_(), alpha=-lr)
        m_i.lerp_(g_i, 1 - b2)


class Lion(Optimizer):
    """Lion: moves every coordinate by the learning rate, in the direction of a two-speed momentum.

    ``x *= 1 - lr wd``; ``x -= lr sign(b1 m + (1-b1) g)``; ``m = b2 m + (1-b2) g``.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, >= 0; three to ten times smaller than AdamW's.
        betas: ``(b1, b2)``, each in [0, 1).
        weight_decay: Decoupled, >= 0; three to ten times larger than AdamW's, for the same strength.
        maximize: Ascend.
        foreach: One call for many tensors; ``False`` is the same bit for bit, tensor by tensor.

    Raises:
        ConfigurationError: An option out of range; a complex parameter or a sparse gradient.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> w.grad = torch.tensor([0.5, -1.0])
        >>> Lion([w], lr=0.1).step()
        >>> w.tolist()
        [0.8999999761581421, -1.899999976158142]

    Reference:
        Chen et al., 2023, "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675, Program 1.
    """

    traits = Traits(
        rule="x -= lr (sign(b1 m + (1-b1) g) + wd x)",
        paper="Chen et al., 2023, Symbolic Discovery of Optimization Algorithms, arXiv:2302.06675",
        state=1,
        example={"lr": 0.01},
    )

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool = True,
    ) -> None:
        non_negative(lr=lr, weight_decay=weight_decay)
        b1, b2 = betas
        between(0.0, 1.0, beta1=b1, beta2=b2)
        super().__init__(
            params,
            {"lr": lr, "betas": (b1, b2), "weight_decay": weight_decay, "maximize": maximize, "foreach": foreach},
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        refuse_complex("Lion", self.param_groups[-1]["params"])

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
            b1, b2 = group["betas"]
            for x, g, m in gather("Lion", group, self.state, ("momentum",)):
                rule = lion if group["foreach"] and len(x) > 1 else lion_by_tensor
                gradients = list(torch._foreach_neg(g)) if group["maximize"] else g
                rule(x, gradients, m, lr=float(group["lr"]), b1=b1, b2=b2, wd=group["weight_decay"])
        return loss
