"""Curvature from Hessian-vector products alone: extreme eigenvalues and the trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["extreme_eigenvalues", "hessian_trace"]

Product = Callable[[list[Tensor]], list[Tensor]]


def extreme_eigenvalues(
    hvp: Product, like: Sequence[Tensor], *, steps: int = 30, tolerance: float = 1e-3, seed: int = 0
) -> tuple[float, float]:
    """The smallest and the largest eigenvalue of a symmetric operator, by Lanczos.

    ``beta_{k+1} q_{k+1} = H q_k - alpha_k q_k - beta_k q_{k-1}``; the extreme eigenvalues of the tridiagonal matrix of
    alpha and beta approach those of H from inside. Only three vectors are kept: lost orthogonality repeats eigenvalues
    that were found and moves none.

    Args:
        hvp: H times a vector, itself a list of tensors; ``closure.hvp`` is one.
        like: Tensors of the shapes, dtypes and devices of such a vector: the parameters.
        steps: Products at most, >= 1.
        tolerance: Ends earlier once both values change by less than this, relative to the larger magnitude.
        seed: Of the vector at the start; torch's global generator is left alone.

    Returns:
        ``(smallest, largest)``; NaN for both where a product is not finite.

    Example:
        >>> diagonal = torch.tensor([1.0, -2.0, 5.0])
        >>> low, high = extreme_eigenvalues(lambda v: [diagonal * v[0]], [diagonal], steps=3)
        >>> round(low, 4), round(high, 4)
        (-2.0, 5.0)

    Reference:
        C. Lanczos, 1950, "An iteration method for the solution of the eigenvalue problem of linear differential and
        integral operators", Journal of Research of the National Bureau of Standards 45(4).
    """
    q = _drawn(like, seed)
    _scale(q, 1 / _norm(q))
    before: list[Tensor] | None = None
    alphas: list[float] = []
    betas: list[float] = []
    low = high = math.nan
    for step in range(min(steps, sum(each.numel() for each in like))):
        w = [each.detach().clone() for each in hvp(q)]
        alphas.append(_dot(w, q))
        if not math.isfinite(alphas[-1]):
            return math.nan, math.nan
        _add(w, q, -alphas[-1])
        if before is not None:
            _add(w, before, -betas[-1])
        values = torch.linalg.eigvalsh(_tridiagonal(alphas, betas))
        found = float(values[0]), float(values[-1])
        size = max(map(abs, found))
        change = max(abs(found[0] - low), abs(found[1] - high)) if step else math.inf
        low, high = found
        beta = _norm(w)
        # A vanishing residual: the subspace is invariant, and there is nothing more to find in it.
        if change <= tolerance * size or beta <= 1e-6 * max(size, 1e-30):
            break
        betas.append(beta)
        _scale(w, 1 / beta)
        before, q = q, w
    return low, high


def hessian_trace(hvp: Product, like: Sequence[Tensor], *, probes: int = 8, seed: int = 0) -> float:
    """The trace by Hutchinson's estimate: the mean of ``vᵀ H v`` over vectors of random signs.

    Args:
        hvp: As for :func:`extreme_eigenvalues`.
        like: As there.
        probes: Vectors, >= 1; the error falls with the square root of their number, and is zero for a diagonal H.
        seed: Of the signs; torch's global generator is left alone.

    Example:
        >>> diagonal = torch.tensor([1.0, -2.0, 5.0])
        >>> hessian_trace(lambda v: [diagonal * v[0]], [diagonal], probes=1)
        4.0

    Reference:
        M. F. Hutchinson, 1989, "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing
        splines", Communications in Statistics 18(3).
    """
    total = 0.0
    for probe in range(probes):
        v = [torch.where(each >= 0, 1.0, -1.0).to(each) for each in _drawn(like, seed + probe)]
        total += _dot(hvp(v), v)
    return total / probes


def _drawn(like: Sequence[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(each.shape, generator=generator).to(each) for each in like]


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    parts = [(x.detach().double() * y.double()).sum().cpu() for x, y in zip(a, b, strict=True)]
    return float(torch.stack(parts).sum())


def _norm(a: Sequence[Tensor]) -> float:
    return math.sqrt(_dot(a, a))


def _scale(a: list[Tensor], by: float) -> None:
    for each in a:
        each.mul_(by)


def _add(a: list[Tensor], b: Sequence[Tensor], by: float) -> None:
    for x, y in zip(a, b, strict=True):
        x.add_(y, alpha=by)


def _tridiagonal(alphas: Sequence[float], betas: Sequence[float]) -> Tensor:
    beside = torch.tensor(betas[: len(alphas) - 1], dtype=torch.float64)
    diagonal = torch.tensor(alphas, dtype=torch.float64)
    return torch.diag(diagonal) + torch.diag(beside, 1) + torch.diag(beside, -1)
