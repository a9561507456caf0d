"""Riemannian Adam and AMSGrad: one adaptive step size for each factor of a product of manifolds."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightrail.options import between, non_negative
from lightrail.traits import Claim, Traits
from lightrail_optimizers.adam_rule import adam_direction, adam_moments_, adamw_
from lightrail_optimizers.riemannian_base import (
    Manifold,
    RiemannianOptimizer,
    component_norm2,
    moved,
    riemannian_gradient,
)
from lightrail_optimizers.tensor_lists import add_scaled_

__all__ = ["RiemannianAMSGrad", "RiemannianAdam", "euclidean_adam", "euclidean_amsgrad", "riemannian_adam"]

_PAPER = "Bécigneul, Ganea, 2019, Riemannian Adaptive Optimization Methods, arXiv:1810.00760"


def riemannian_adam(
    manifold: Manifold,
    x: Tensor,
    g: Tensor,
    tau: Tensor,
    v: Tensor,
    v_hat: Tensor | None = None,
    *,
    lr: float,
    t: int,
    b1: float,
    b2: float,
    eps: float,
    wd: float,
    bias_correction: bool,
    retraction: bool,
) -> tuple[Tensor, ...]:
    """One update of a point.

    ``m = b1 τ + (1-b1) grad``; ``v = b2 v + (1-b2) ||grad||²_x``, a number a factor; ``v̂ = max(v̂, v)`` where it is
    given, else v; ``x' = Exp_x(-lr m / (sqrt(v̂) + eps))``; ``τ = transport of m from x to x'``.

    Returns:
        x', τ, v, and v̂ where it was given.
    """
    grad = riemannian_gradient(manifold, x, g, wd)
    m = torch.lerp(tau, grad, 1 - b1)
    v = torch.lerp(v, component_norm2(manifold, x, grad), 1 - b2)
    largest = () if v_hat is None else (torch.maximum(v_hat, v),)
    age = _age(t, bias_correction)
    root = (largest or (v,))[0].sqrt() / (1 - b2**age) ** 0.5 + eps
    # A point that had zero gradients only has m = 0 as well; with eps = 0 it must stay rather than become 0/0.
    u = m * (-lr / (1 - b1**age)) / root.clamp_min(torch.finfo(root.dtype).tiny)
    x, tau = moved(manifold, x, u, m, retraction)
    return x, tau, v, *largest


def euclidean_adam(
    x: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    *,
    lr: float | Tensor,
    t: int | Tensor,
    b1: float,
    b2: float,
    eps: float,
    wd: float,
    bias_correction: bool,
) -> None:
    """:func:`riemannian_adam` where every coordinate is a factor ℝ, over lists and in place: Adam."""
    adamw_(x, _with_penalty(x, g, wd), m, v, lr=lr, t=_age(t, bias_correction), b1=b1, b2=b2, eps=eps, wd=0.0)


def euclidean_amsgrad(
    x: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    v_hat: list[Tensor],
    *,
    lr: float | Tensor,
    t: int | Tensor,
    b1: float,
    b2: float,
    eps: float,
    wd: float,
    bias_correction: bool,
) -> None:
    """:func:`riemannian_adam` with ``v̂`` where every coordinate is a factor ℝ, over lists and in place: AMSGrad."""
    adam_moments_(_with_penalty(x, g, wd), m, v, b1=b1, b2=b2)
    torch._foreach_maximum_(v_hat, v)
    add_scaled_(x, adam_direction(m, v_hat, t=_age(t, bias_correction), b1=b1, b2=b2, eps=eps), -lr)


def _age(t: int | Tensor, bias_correction: bool) -> Any:
    """The step that bias corrections count; at infinity they are 1."""
    return t if bias_correction else math.inf


def _with_penalty(x: list[Tensor], g: list[Tensor], wd: float) -> list[Tensor]:
    return list(torch._foreach_add(g, x, alpha=wd)) if wd else g


class RiemannianAdam(RiemannianOptimizer):
    """Riemannian Adam: Adam for points of manifolds, with one second moment for each factor of a product.

    ``m = b1 τ + (1-b1) grad``; ``v = b2 v + (1-b2) ||grad||²_x``, a number a factor;
    ``x' = Exp_x(-lr m̂ / (sqrt(v̂) + eps))``, hats for the bias correction; ``τ``: m, carried from x to x'.

    A ``geoopt.ManifoldParameter`` is a point of its manifold: an embedding in the Poincaré ball has a factor a row.
    Every other parameter is Euclidean, a factor a coordinate, so that this is Adam. Both may be in one model.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, >= 0: about how far a point moves in a step, in the metric of its manifold.
        betas: ``(b1, b2)``, each in [0, 1).
        eps: Added to the root of the second moment, >= 0.
        weight_decay: Of the penalty ``wd/2 ||x||²``, >= 0; its gradient joins the loss's, as in Adam. On a manifold
            where the Euclidean norm is constant, such as a sphere, it changes nothing.
        bias_correction: Whether both moments are corrected.
        retraction: Move by the manifold's retraction, which is cheaper, in place of the exponential map.
        stabilize_every: Put points back on their manifold, and τ into the tangent space, every so many steps, >= 1:
            rounding takes them off. ``None`` never does.
        maximize: Ascend.
        foreach: One call for many Euclidean tensors; ``False`` is the same, tensor by tensor, with less memory.
        compile: Compile the update of Euclidean tensors.

    Raises:
        ConfigurationError: An option out of range; a complex or sharded parameter or a sparse gradient; a manifold
            without exponential map, unless ``retraction=True``.

    Deviations:
        The paper has neither bias correction nor eps: ``bias_correction=False, eps=0``. τ is carried by the
        manifold's own transport, parallel on the Poincaré ball, a projection on spheres and Stiefel manifolds.
        geoopt's optimizer of this name moves by retraction, adds its weight decay into ``.grad``, keeps v as large as
        the parameter, and never stabilizes by default; ``retraction=True, stabilize_every=None`` takes its path.

    Example:
        >>> import geoopt
        >>> x = geoopt.ManifoldParameter(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), geoopt.Sphere())
        >>> x.grad = torch.tensor([5.0, 0.3, -0.4], dtype=torch.float64)
        >>> RiemannianAdam([x], lr=0.1).step()
        >>> [round(v, 6) for v in x.tolist()]
        [0.995004, -0.0599, 0.079867]

    Reference:
        Bécigneul, Ganea, 2019, "Riemannian Adaptive Optimization Methods", arXiv:1810.00760, Section 3.
    """

    traits = Traits(
        rule="m = b1 τ + (1-b1) grad; v = b2 v + (1-b2) ||grad||²; x' = Exp_x(-lr m / (sqrt(v) + eps)); τ: m at x'",
        paper=_PAPER,
        state=2,  # for points 1, and a number a factor
        needs_whole_tensors=True,
        example={"lr": 0.01},
        claim=Claim(
            sentence="a lower loss than Riemannian SGD's", baseline="riemannian_sgd", problems=("tree_embedding",)
        ),
    )
    state_names = ("momentum", "second_moment")
    tangent_names = ("momentum",)
    rule = staticmethod(euclidean_adam)
    point_rule = staticmethod(riemannian_adam)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        retraction: bool = False,
        stabilize_every: int | None = 10,
        maximize: bool = False,
        foreach: bool = True,
        compile: bool = False,
    ) -> None:
        non_negative(lr=lr, weight_decay=weight_decay, eps=eps)
        b1, b2 = betas
        between(0.0, 1.0, beta1=b1, beta2=b2)
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": (b1, b2),
                "eps": eps,
                "weight_decay": weight_decay,
                "bias_correction": bias_correction,
                "retraction": retraction,
                "stabilize_every": stabilize_every,
                "maximize": maximize,
                "foreach": foreach,
                "compile": compile,
            },
        )

    def scalars(self, group: dict[str, Any], t: int) -> dict[str, Any]:
        b1, b2 = group["betas"]
        return {
            "lr": group["lr"],
            "t": t,
            "b1": b1,
            "b2": b2,
            "eps": group["eps"],
            "wd": group["weight_decay"],
            "bias_correction": group["bias_correction"],
        }


class RiemannianAMSGrad(RiemannianAdam):
    """Riemannian AMSGrad: Riemannian Adam whose second moment never shrinks, the variant with a regret bound.

    As :class:`RiemannianAdam`, with ``v̂ = max(v̂, v)`` in place of v in the step.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, >= 0.
        betas: ``(b1, b2)``, each in [0, 1).
        eps: Added to the root of the second moment, >= 0.
        weight_decay: Of the penalty ``wd/2 ||x||²``, >= 0, as in :class:`RiemannianAdam`.
        bias_correction: Whether both moments are corrected; v̂ is the largest v before its correction.
        retraction: Move by the manifold's retraction in place of the exponential map.
        stabilize_every: Put points back on their manifold every so many steps, >= 1; ``None`` never does.
        maximize: Ascend.
        foreach: One call for many Euclidean tensors; ``False`` is the same, tensor by tensor, with less memory.
        compile: Compile the update of Euclidean tensors.

    Raises:
        ConfigurationError: As :class:`RiemannianAdam`.

    Deviations:
        The paper has neither bias correction nor eps: ``bias_correction=False, eps=0``.

    Example:
        >>> import geoopt
        >>> ball = geoopt.PoincareBall()
        >>> x = geoopt.ManifoldParameter(torch.tensor([0.0, 0.5]), ball)
        >>> optimizer = RiemannianAMSGrad([x], lr=0.1)
        >>> for _ in range(16):
        ...     optimizer.zero_grad()
        ...     distance = ball.dist(x, torch.tensor([0.3, 0.0]))
        ...     (distance**2).backward()
        ...     optimizer.step()
        >>> distance.item() < 0.1
        True

    Reference:
        Bécigneul, Ganea, 2019, arXiv:1810.00760, Figure 1 and Theorem 1.
    """

    traits = Traits(
        rule="Riemannian Adam with v̂ = max(v̂, v) in place of v",
        paper=_PAPER,
        state=3,  # for points 1, and two numbers a factor
        needs_whole_tensors=True,
        example={"lr": 0.01},
        claim=Claim(
            sentence="a lower loss than Riemannian SGD's", baseline="riemannian_sgd", problems=("tree_embedding",)
        ),
    )
    state_names = ("momentum", "second_moment", "largest_second_moment")
    rule = staticmethod(euclidean_amsgrad)
