"""A penalty on the norm of the gradient, by a difference of two gradients or by differentiating twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightrail.options import non_negative, one_of, positive
from lightrail.step import Closure, Transform
from lightrail.traits import Claim, Traits
from lightrail_optimizers.closure_answers import answers_for, gradients, wide
from lightrail_optimizers.nearby_gradients import dot, gradient_at, put_gradients, with_gradient
from lightrail_optimizers.tensor_lists import global_norm
from lightrail_optimizers.transforms.sam import moved

__all__ = ["GradientRegularization", "regularized_by_difference"]

_SIGN = {"forward": 1.0, "backward": -1.0}


def regularized_by_difference(g: list[Tensor], moved_g: list[Tensor], gamma: float, epsilon: float) -> list[Tensor]:
    """``g + gamma/epsilon (moved_g - g)``, which is ``g + gamma H g`` to first order.

    Args:
        g: The gradient at x, at least in single precision as are all.
        moved_g: The gradient at ``x + epsilon g``.
        gamma: Strength, >= 0.
        epsilon: How far x was moved, in gradients; below 0 for a backward difference.

    Returns:
        New tensors; ``moved_g`` itself, bit for bit, for ``gamma = epsilon``.

    Example:
        >>> regularized_by_difference([torch.tensor([1.0, 4.0])], [torch.tensor([1.5, 6.0])], gamma=0.5, epsilon=0.5)
        [tensor([1.5000, 6.0000])]
    """
    return list(torch._foreach_lerp(g, moved_g, gamma / epsilon)) if g else []


class GradientRegularization(Transform):
    """Descends on ``L + gamma/2 ||∇L||²``: flat directions are preferred, since gradients are small there.

    With ``g = ∇L(x)``, not normalized, the gradient becomes

    - forward: ``g + gamma/epsilon (∇L(x + epsilon g) - g)``,
    - backward: ``g + gamma/epsilon (g - ∇L(x - epsilon g))``,
    - exact: ``g + gamma H g``, by differentiating twice, which both of them approximate for small epsilon.

    Args:
        gamma: Strength, >= 0, in units of a learning rate; 0 is the optimizer alone, bit for bit, at the price of one
            evaluation.
        epsilon: How far the gradient is followed, > 0, in the same units. In the paper a forward difference with a
            rather large epsilon generalizes better than the exact gradient.
        difference: ``forward``, ``backward`` or ``exact``.

    Raises:
        ConfigurationError: An option out of range, a sparse gradient or a complex parameter.
        ClosureError: The closure cannot evaluate elsewhere, or, for ``exact``, the loss cannot be differentiated
            twice.

    Guarantees:
        On a quadratic all three agree, for any epsilon. A forward difference with ``epsilon = gamma`` is SAM with the
        unnormalized step ``gamma g``, bit for bit. Both evaluations see the same micro-batches and the same dropout
        masks; BatchNorm statistics move once. Logged are the norm of the gradient, the penalty ``gamma/2 ||g||²`` and
        the curvature along the gradient ``gᵀHg / ||g||²``, by the same difference.

    Deviations:
        In half precision ``epsilon g`` may be less than the spacing of the numbers around x: choose epsilon so that
        ``epsilon ||g||`` is more than a thousandth of ``||x||`` there. In a chain, ``exact`` multiplies by the Hessian
        of the loss itself, without what the transforms before it made of its gradient; the differences include it.

    Example:
        >>> from lightrail import Closure, TransformedOptimizer
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> rule = GradientRegularization(gamma=0.5, epsilon=0.1)
        >>> optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [rule])
        >>> loss = optimizer.step(Closure(lambda: (w[0] ** 2 + 4 * w[1] ** 2) / 2, [w]))
        >>> [round(value, 4) for value in w.tolist()]
        [0.85, -0.2]

    Reference:
        Karakida, Takase, Hayase and Osawa, 2023, "Understanding Gradient Regularization in Deep Learning: Efficient
        Finite-Difference Computation and Implicit Bias", arXiv:2210.02720, the section on finite differences.
    """

    traits = Traits(
        rule="g = g + gamma/epsilon (gradient at x + epsilon g - g)",
        paper=(
            "Karakida, Takase, Hayase, Osawa, 2023, Understanding Gradient Regularization in Deep Learning: Efficient "
            "Finite-Difference Computation and Implicit Bias, arXiv:2210.02720"
        ),
        state=0,
        claim=Claim(
            sentence="a lower top Hessian eigenvalue than the optimizer alone, at the same learning rate",
            baseline_options={"lr": 0.01},
            problems=("sharpness",),
            options={"gamma": 0.2, "epsilon": 0.2},
            tuned=False,
        ),
        extra_evaluations=1,
        needs_closure=True,
    )

    @staticmethod
    def traits_under(options: Mapping[str, Any]) -> Traits:
        """The exact gradient differentiates twice in place of evaluating elsewhere; without strength it does neither.

        A Hessian-vector product counts as one evaluation and takes as long as two.
        """
        own = GradientRegularization.traits
        if options.get("gamma", 0.05) == 0:
            return replace(own, extra_evaluations=0, needs_closure=False)
        if options.get("difference", "forward") == "exact":
            return replace(own, rule="g = g + gamma H g", needs_second_derivatives=True)
        return own

    def __init__(self, gamma: float = 0.05, epsilon: float = 0.05, difference: str = "forward") -> None:
        non_negative(gamma=gamma)
        positive(epsilon=epsilon)
        one_of(("forward", "backward", "exact"), difference=difference)
        self.gamma = gamma
        self.epsilon = epsilon
        self.difference = difference
        self._figures: dict[str, Tensor] = {}

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        if self.gamma == 0:
            return
        x = with_gradient("gradient_regularization", closure)
        g = wide(gradients(x))
        norm = global_norm(g)
        if self.difference == "exact":
            result = self._exactly(closure, x, g)
        else:
            epsilon = self.epsilon * _SIGN[self.difference]
            points = moved(x, torch._foreach_mul(g, epsilon) if g else [])
            result = regularized_by_difference(g, gradient_at(closure, x, points), self.gamma, epsilon)
        put_gradients(x, result)
        square = norm.square()
        bend = dot(result, g) / square - 1
        self._figures = {
            "gradient_norm": norm,
            "penalty": self.gamma / 2 * square,
            "curvature": torch.where(square > 0, bend / self.gamma, 0.0),
        }

    def _exactly(self, closure: Closure, x: list[Tensor], g: list[Tensor]) -> list[Tensor]:
        by_parameter = dict(zip(x, g, strict=True))
        vectors = [by_parameter[p] if p in by_parameter else torch.zeros_like(p) for p in closure.params]
        product = wide(answers_for(x, closure, closure.hvp(vectors)))
        return list(torch._foreach_add(g, product, alpha=self.gamma)) if g else []

    def logged(self) -> dict[str, float]:
        return {name: float(value) for name, value in self._figures.items()}
