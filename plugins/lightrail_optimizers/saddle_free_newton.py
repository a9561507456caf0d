"""Saddle-free Newton: Newton's step with the absolute values of the curvatures, in a Krylov subspace."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightrail.options import at_least, non_negative
from lightrail.step import Closure
from lightrail.traits import Claim, Traits
from lightrail_optimizers.closure_answers import answers_for, gradients, moving, points_of
from lightrail_optimizers.flat_vector import flatten, unflatten
from lightrail_optimizers.tensorwise import MethodOptimizer, require_closure

__all__ = ["SaddleFreeNewton", "krylov_basis", "rounding_of", "saddle_free_step"]


def krylov_basis(multiply: Callable[[Tensor], Tensor], g: Tensor, dimension: int) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the span of ``g, H g, H² g, …``, by Lanczos with full reorthogonalisation.

    Args:
        multiply: ``v -> H v``.
        g: Where it begins.
        dimension: k, how many products are spent at most; fewer where the subspace is invariant.

    Returns:
        V, a row for each direction, and ``T = V H Vᵀ``, symmetric, on the CPU in double precision. No rows where g is
        zero or not finite.
    """
    v = g.new_empty(min(dimension, g.numel()), g.numel())
    t = torch.zeros(len(v), len(v), dtype=torch.float64)
    direction, norm, least, count = g, float(g.norm()), 0.0, 0
    rounding = 10 * g.numel() ** 0.5 * torch.finfo(g.dtype).eps
    while count < len(v) and least < norm < math.inf:
        v[count] = direction / norm
        direction = multiply(v[count])
        height = float(direction.norm())
        if not math.isfinite(height):
            break
        least = max(least, height * rounding)  # a residual below this is rounding: the subspace is invariant
        count += 1
        basis = v[:count]
        along = basis @ direction
        t[:count, count - 1] = along.cpu().double()
        direction = direction - along @ basis
        direction = direction - (basis @ direction) @ basis  # the first pass leaves rounding behind
        norm = float(direction.norm())
    t = t[:count, :count].triu()
    return v[:count], t + t.triu(1).t()


def saddle_free_step(v: Tensor, t: Tensor, g: Tensor, *, damping: float) -> Tensor:
    """``Δ = -Vᵀ (|T| + damping I)⁻¹ V g``, where ``|T|`` has the absolute values of T's eigenvalues.

    Args:
        v: Orthonormal rows.
        t: ``V H Vᵀ``, symmetric, in double precision.
        g: The gradient.
        damping: >= 0. Where 0, directions without curvature are left out.

    Returns:
        A vector like g; zero where V has no rows.
    """
    if not len(v):
        return torch.zeros_like(g)
    eigenvalues, q = torch.linalg.eigh(t)
    magnitudes = eigenvalues.abs() + damping
    inverse = torch.where(magnitudes > rounding_of(t, g), 1 / magnitudes, 0.0)
    coefficients = q @ (inverse * (q.t() @ (v @ g).cpu().double()))
    return -(coefficients.to(v) @ v)


def rounding_of(t: Tensor, g: Tensor) -> float:
    """How large an eigenvalue of T may come of rounding alone, in the precision of g."""
    return float(t.abs().max()) * len(t) * torch.finfo(g.dtype).eps if len(t) else 0.0


class SaddleFreeNewton(MethodOptimizer):
    """Saddle-free Newton: descends along negative curvature too, as far as its magnitude says.

    ``x -= lr Vᵀ (|V H Vᵀ| + damping I)⁻¹ V g``; V is an orthonormal basis of the Krylov subspace
    ``g, H g, …, H^(k-1) g``, and ``|·|`` takes the absolute values of eigenvalues. On a convex quadratic of at most k
    different curvatures, without damping, it is Newton's method; where Newton's would climb to a saddle, it goes down
    from it.

    Args:
        params: Parameters or parameter groups; the curvature is that of all together.
        lr: Learning rate, >= 0; 1 is the whole step.
        krylov_dimension: k, >= 1: Hessian-vector products a step, and copies of the parameters held during it.
        damping: >= 0, added to each magnitude: no direction is scaled up by more than its inverse. Of several, as in
            ``[1.0, 0.1, 0.01]``, each step takes the one that leads to the lowest loss on its batch, at one evaluation
            of the loss each. That wants large batches; on small ones a single large value is safer.

    Raises:
        ConfigurationError: An option out of range; a complex parameter or a sparse gradient.
        ClosureError: The closure is not a :class:`lightrail.Closure`, or the loss has no second derivative.

    Deviations:
        The paper searches the damping at every step, which takes several values here, and moves a few times inside one
        subspace, where this moves once.

    Example:
        >>> import torch
        >>> from lightrail import Closure
        >>> x = torch.nn.Parameter(torch.tensor([0.5, -0.25]))
        >>> optimizer = SaddleFreeNewton([x], damping=0.0)
        >>> loss = optimizer.step(Closure(lambda: x[0] ** 2 - 2 * x[1] ** 2, [x]))
        >>> [round(v, 4) for v in x.tolist()], optimizer.logged()["negative_curvatures"]  # Newton would go to 0, 0
        ([0.0, -0.5], 1.0)

    Reference:
        Dauphin et al., 2014, "Identifying and attacking the saddle point problem in high-dimensional non-convex
        optimization", arXiv:1406.2572, Algorithm 1.
    """

    traits = Traits(
        rule="x -= lr Vᵀ(|VHVᵀ| + damping I)⁻¹ V g, V from Lanczos at g",
        paper=(
            "Dauphin, Pascanu, Gulcehre, Cho, Ganguli, Bengio, 2014, Identifying and attacking the saddle point "
            "problem in high-dimensional non-convex optimization, arXiv:1406.2572"
        ),
        state=0,
        extra_evaluations=20,
        needs_second_derivatives=True,
        needs_whole_tensors=True,
        example={"krylov_dimension": 4},
        claim=Claim(
            sentence="leaves a saddle that holds SGD",
            baseline="sgd",
            problems=("saddle",),
            options={"krylov_dimension": 10, "damping": [1e-3, 1e-2, 1e-1, 1.0]},
        ),
    )

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        krylov_dimension: int = 20,
        damping: float | Sequence[float] = 1.0,
    ) -> None:
        non_negative(lr=lr)
        at_least(1, krylov_dimension=krylov_dimension)
        dampings = list(damping) if isinstance(damping, Sequence) else [damping]
        at_least(1, number_of_dampings=len(dampings))
        for each in dampings:
            non_negative(damping=each)
        super().__init__(params, {"lr": lr, "krylov_dimension": krylov_dimension, "damping": dampings})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step.

        Args:
            closure: A :class:`lightrail.Closure`.

        Returns:
            The loss at the point where the step began.
        """
        oracle = require_closure(self, closure, "multiplies by the Hessian")
        loss = oracle()
        groups = moving(self, oracle)
        x = [p for _, each in groups for p in each if p.numel()]
        if not x:
            return loss
        kept = self.param_groups[0]

        def multiply(vector: Tensor) -> Tensor:
            by_parameter = dict(zip(x, unflatten(vector, x), strict=True))
            vectors = [by_parameter[p] if p in by_parameter else torch.zeros_like(p) for p in oracle.params]
            return flatten(answers_for(x, oracle, oracle.hvp(vectors))).to(vector.dtype)

        g = flatten(gradients(x))
        v, t = krylov_basis(multiply, g, kept["krylov_dimension"])
        kept["negative_curvatures"] = float((torch.linalg.eigvalsh(t) < -rounding_of(t, g)).sum())
        rates = [float(group["lr"]) for group, each in groups for p in each if p.numel()]
        steps = [
            [u * rate for u, rate in zip(unflatten(saddle_free_step(v, t, g, damping=each), x), rates, strict=True)]
            for each in kept["damping"]
        ]
        best = self._lowest(oracle, x, steps) if len(steps) > 1 else 0
        kept["chosen_damping"] = float(kept["damping"][best])
        torch._foreach_add_(x, steps[best])
        return loss

    def _lowest(self, closure: Closure, x: list[Tensor], steps: list[list[Tensor]]) -> int:
        """Which of the steps leads to the lowest loss."""
        losses = []
        for step in steps:
            with closure.at(points_of(closure, x, torch._foreach_add(x, step))):
                found = float(closure.loss())
            losses.append(found if math.isfinite(found) else math.inf)
        return losses.index(min(losses))

    def logged(self) -> dict[str, float]:
        """Figures of the last step that are worth a curve."""
        names = ("negative_curvatures", "chosen_damping")
        return {name: self.param_groups[0][name] for name in names if name in self.param_groups[0]}
