"""Riemannian AdaGrad: steps shrink with the sum of squared gradient norms, for each factor of a product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightrail.options import non_negative, positive
from lightrail.traits import Claim, Traits
from lightrail_optimizers.riemannian_base import (
    Manifold,
    RiemannianOptimizer,
    component_norm2,
    moved,
    riemannian_gradient,
)
from lightrail_optimizers.tensor_lists import add_scaled_

__all__ = ["RiemannianAdagrad", "euclidean_adagrad", "riemannian_adagrad"]


def riemannian_adagrad(
    manifold: Manifold, x: Tensor, g: Tensor, v: Tensor, *, lr: float, eps: float, wd: float, retraction: bool
) -> tuple[Tensor, ...]:
    """One update of a point: ``v += ||grad||²_x``, a number a factor; ``x' = Exp_x(-lr grad / (sqrt(v) + eps))``.

    Returns:
        x' and v.
    """
    grad = riemannian_gradient(manifold, x, g, wd)
    v = v + component_norm2(manifold, x, grad)
    return *moved(manifold, x, grad * -lr / (v.sqrt() + eps), None, retraction), v


def euclidean_adagrad(
    x: list[Tensor], g: list[Tensor], v: list[Tensor], *, lr: float | Tensor, eps: float, wd: float
) -> None:
    """:func:`riemannian_adagrad` where every coordinate is a factor ℝ, over lists and in place: AdaGrad."""
    if wd:
        g = list(torch._foreach_add(g, x, alpha=wd))
    torch._foreach_addcmul_(v, g, g)
    u = list(torch._foreach_sqrt(v))
    torch._foreach_add_(u, eps)
    torch._foreach_reciprocal_(u)
    torch._foreach_mul_(u, g)
    add_scaled_(x, u, -lr)


class RiemannianAdagrad(RiemannianOptimizer):
    """Riemannian AdaGrad: AdaGrad for points of manifolds, with one sum for each factor of a product.

    ``v += ||grad||²_x``, a number a factor; ``x' = Exp_x(-lr grad / (sqrt(v) + eps))``.

    A ``geoopt.ManifoldParameter`` is a point of its manifold: an embedding in the Poincaré ball has a factor a row.
    Every other parameter is Euclidean, a factor a coordinate, so that this is AdaGrad. Both may be in one model.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, >= 0: how far a point moves in the first step, in the metric of its manifold.
        eps: Added to the root of the sum, > 0.
        weight_decay: Of the penalty ``wd/2 ||x||²``, >= 0; its gradient joins the loss's. On a manifold where the
            Euclidean norm is constant, such as a sphere, it changes nothing.
        retraction: Move by the manifold's retraction, which is cheaper, in place of the exponential map.
        stabilize_every: Put points back on their manifold every so many steps, >= 1; ``None`` never does.
        maximize: Ascend.
        foreach: One call for many Euclidean tensors; ``False`` is the same, tensor by tensor, with less memory.
        compile: Compile the update of Euclidean tensors.

    Raises:
        ConfigurationError: An option out of range; a complex or sharded parameter or a sparse gradient; a manifold
            without exponential map, unless ``retraction=True``.

    Deviations:
        The paper has no eps, and projects onto a set that is to contain the points; here nothing bounds them.

    Example:
        >>> import geoopt
        >>> x = geoopt.ManifoldParameter(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), geoopt.Sphere())
        >>> x.grad = torch.tensor([5.0, 0.3, -0.4], dtype=torch.float64)
        >>> RiemannianAdagrad([x], lr=0.1).step()
        >>> [round(v, 6) for v in x.tolist()]
        [0.995004, -0.0599, 0.079867]

    Reference:
        Bécigneul, Ganea, 2019, "Riemannian Adaptive Optimization Methods", arXiv:1810.00760, Section 3.
    """

    traits = Traits(
        rule="v += ||grad||²; x' = Exp_x(-lr grad / (sqrt(v) + eps))",
        paper="Bécigneul, Ganea, 2019, Riemannian Adaptive Optimization Methods, arXiv:1810.00760",
        state=1,  # for points a number a factor
        needs_whole_tensors=True,
        example={"lr": 0.1},
        claim=Claim(
            sentence="a lower loss than Riemannian SGD's", baseline="riemannian_sgd", problems=("tree_embedding",)
        ),
    )
    state_names = ("sum",)
    rule = staticmethod(euclidean_adagrad)
    point_rule = staticmethod(riemannian_adagrad)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        retraction: bool = False,
        stabilize_every: int | None = 10,
        maximize: bool = False,
        foreach: bool = True,
        compile: bool = False,
    ) -> None:
        non_negative(lr=lr, weight_decay=weight_decay)
        positive(eps=eps)
        super().__init__(
            params,
            {
                "lr": lr,
                "eps": eps,
                "weight_decay": weight_decay,
                "retraction": retraction,
                "stabilize_every": stabilize_every,
                "maximize": maximize,
                "foreach": foreach,
                "compile": compile,
            },
        )

    def scalars(self, group: dict[str, Any], t: int) -> dict[str, Any]:
        return {"lr": group["lr"], "eps": group["eps"], "wd": group["weight_decay"]}
