"""Riemannian stochastic gradient descent, with momentum that is carried along."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightrail.errors import ConfigurationError
from lightrail.options import between, non_negative
from lightrail.traits import Traits
from lightrail_optimizers.riemannian_base import Manifold, RiemannianOptimizer, moved, riemannian_gradient
from lightrail_optimizers.tensor_lists import add_scaled_

__all__ = ["RiemannianSGD", "euclidean_sgd", "riemannian_sgd"]


def riemannian_sgd(
    manifold: Manifold,
    x: Tensor,
    g: Tensor,
    tau: Tensor | None = None,
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    wd: float,
    retraction: bool,
) -> tuple[Tensor, ...]:
    """One update of a point: ``b = momentum τ + grad``; ``x' = Exp_x(-lr b)``; ``τ = transport of b from x to x'``.

    With ``nesterov`` the step is ``-lr (grad + momentum b)``; without momentum it is ``-lr grad``.

    Returns:
        x', and τ where it was given.
    """
    grad = riemannian_gradient(manifold, x, g, wd)
    if tau is None:
        return moved(manifold, x, grad * -lr, None, retraction)
    b = grad + momentum * tau
    return moved(manifold, x, (grad + momentum * b if nesterov else b) * -lr, b, retraction)


def euclidean_sgd(
    x: list[Tensor],
    g: list[Tensor],
    b: list[Tensor] | None = None,
    *,
    lr: float | Tensor,
    momentum: float,
    nesterov: bool,
    wd: float,
) -> None:
    """:func:`riemannian_sgd` where every coordinate is a factor ℝ, over lists and in place: SGD."""
    if wd:
        g = list(torch._foreach_add(g, x, alpha=wd))
    if b is not None:
        torch._foreach_mul_(b, momentum)
        torch._foreach_add_(b, g)
        g = list(torch._foreach_add(g, b, alpha=momentum)) if nesterov else b
    add_scaled_(x, g, -lr)


class RiemannianSGD(RiemannianOptimizer):
    """Riemannian stochastic gradient descent: along geodesics, with momentum that is carried from point to point.

    ``b = momentum τ + grad``; ``x' = Exp_x(-lr b)``; ``τ``: b, carried from x to x'.

    A ``geoopt.ManifoldParameter`` is a point of its manifold. Every other parameter is Euclidean, so that this is SGD.
    Both may be in one model.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, >= 0.
        momentum: In [0, 1).
        nesterov: Whether the momentum looks ahead.
        weight_decay: Of the penalty ``wd/2 ||x||²``, >= 0; its gradient joins the loss's. On a manifold where the
            Euclidean norm is constant, such as a sphere, it changes nothing.
        retraction: Move by the manifold's retraction, which is cheaper, in place of the exponential map.
        stabilize_every: Put points back on their manifold, and τ into the tangent space, every so many steps, >= 1;
            ``None`` never does.
        maximize: Ascend.
        foreach: One call for many Euclidean tensors; ``False`` is the same, tensor by tensor, with less memory.
        compile: Compile the update of Euclidean tensors.

    Raises:
        ConfigurationError: An option out of range; nesterov without momentum; a complex or sharded parameter or a
            sparse gradient; a manifold without exponential map, unless ``retraction=True``.

    Deviations:
        Momentum is not in the paper. geoopt's optimizer of this name moves by retraction and begins its momentum with
        the Euclidean gradient, counted on top of the Riemannian one; without momentum,
        ``retraction=True, stabilize_every=None`` takes its path.

    Example:
        >>> import geoopt
        >>> x = geoopt.ManifoldParameter(torch.tensor([1.0, 0.0], dtype=torch.float64), geoopt.Sphere())
        >>> x.grad = torch.tensor([5.0, -1.0], dtype=torch.float64)
        >>> RiemannianSGD([x], lr=0.1).step()
        >>> [round(v, 6) for v in x.tolist()]
        [0.995004, 0.099833]

    Reference:
        Bonnabel, 2013, "Stochastic Gradient Descent on Riemannian Manifolds", arXiv:1111.5280, Section 2.
    """

    traits = Traits(
        rule="b = momentum τ + grad; x' = Exp_x(-lr b); τ carries b to x'",
        paper="Bonnabel, 2013, Stochastic Gradient Descent on Riemannian Manifolds, arXiv:1111.5280",
        state=0,
        needs_whole_tensors=True,
        example={"lr": 0.01, "momentum": 0.9},
    )
    state_names = ("momentum",)
    tangent_names = ("momentum",)
    rule = staticmethod(euclidean_sgd)
    point_rule = staticmethod(riemannian_sgd)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        retraction: bool = False,
        stabilize_every: int | None = 10,
        maximize: bool = False,
        foreach: bool = True,
        compile: bool = False,
    ) -> None:
        non_negative(lr=lr, weight_decay=weight_decay)
        between(0.0, 1.0, momentum=momentum)
        if nesterov and not momentum:
            raise ConfigurationError(
                "nesterov looks ahead along the momentum, and there is none",
                found=f"nesterov={nesterov}, momentum={momentum}",
                allowed="nesterov with a momentum between 0 and 1",
                remedy="Set momentum, or leave nesterov out.",
            )
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "nesterov": nesterov,
                "weight_decay": weight_decay,
                "retraction": retraction,
                "stabilize_every": stabilize_every,
                "maximize": maximize,
                "foreach": foreach,
                "compile": compile,
            },
        )

    def names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.state_names if group["momentum"] else ()

    def scalars(self, group: dict[str, Any], t: int) -> dict[str, Any]:
        return {
            "lr": group["lr"],
            "momentum": group["momentum"],
            "nesterov": group["nesterov"],
            "wd": group["weight_decay"],
        }
