"""Exponential integrators of the probability flow: the linear part exactly, the prediction by a polynomial.

From s to t, with λ = log(α/σ), h = λ_t − λ_s > 0 and u = λ − λ_s, the flow is exactly

- in data form  x_t = (σ_t/σ_s) x_s + α_t ∫₀ʰ e^{u−h} D(λ_s + u) du,
- in noise form x_t = (α_t/α_s) x_s − α_t ρ_s ∫₀ʰ e^{−u} ε(λ_s + u) du,  ρ = σ/α.

A multistep method puts the polynomial through the last predictions in place of D or ε. All here are functions of
numbers in double precision: what they return are the weights of the predictions, newest first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from lightrail.generation import Level, NoisePath
from lightrail.options import one_of

__all__ = [
    "VARIABLES",
    "adams_weights",
    "carried",
    "divided_difference",
    "kernel_moments",
    "lagrange_basis",
    "lagrange_coefficients",
    "lagrange_weights",
    "phi",
    "scale_of",
]

VARIABLES = ("lam", "rho", "t")

# Below it the recursion of φ cancels; the series has all digits there.
SERIES_BELOW = 2.0
SERIES_TERMS = 28
QUADRATURE_NODES = 32


@overload
def phi(k: int, z: float) -> float: ...
@overload
def phi(k: int, z: Tensor) -> Tensor: ...
def phi(k: int, z: float | Tensor) -> float | Tensor:
    """φ_0(z) = e^z, φ_{k+1}(z) = (φ_k(z) − 1/k!)/z, so that φ_k(0) = 1/k!; to full precision everywhere.

    Args:
        k: At least 0.
        z: Any number, or −∞, where φ_k is 0; or a tensor in double precision.

    Example:
        >>> phi(1, 0.0), round(phi(2, 1.0), 6)
        (1.0, 0.718282)
    """
    if isinstance(z, Tensor):
        is_small = z.abs() < SERIES_BELOW
        far = torch.where(is_small, SERIES_BELOW, z)
        near = torch.where(is_small, z, 0.0)
        return torch.where(is_small, _series(k, near), _recursion(k, far, far.exp(), far.expm1()))
    if z == -math.inf:
        return 0.0
    return _series(k, z) if abs(z) < SERIES_BELOW else _recursion(k, z, math.exp(z), math.expm1(z))


def _series(k: int, z: Any) -> Any:
    # Horner's scheme of Σ zⁱ/(i + k)!.
    total = 1 / math.factorial(SERIES_TERMS + k) + 0 * z
    for i in reversed(range(SERIES_TERMS)):
        total = total * z + 1 / math.factorial(i + k)
    return total


def _recursion(k: int, z: Any, exp: Any, expm1: Any) -> Any:
    value = exp
    for i in range(k):
        value = expm1 / z if i == 0 else (value - 1 / math.factorial(i)) / z
    return value


def kernel_moments(h: float, count: int, form: str) -> list[float]:
    """∫₀ʰ e^{u−h} uᵏ du in data form, ∫₀ʰ e^{−u} uᵏ du in noise form, for k from 0 to ``count`` − 1.

    Args:
        h: The step in λ, above 0; ∞ for a step to σ = 0, where the data form has only k = 0.
        count: How many.
        form: ``data`` or ``noise``.
    """
    _check_form(form)
    if math.isinf(h):
        return [1.0 if k == 0 else math.inf if form == "data" else float(math.factorial(k)) for k in range(count)]
    if form == "data":
        return [math.factorial(k) * h ** (k + 1) * phi(k + 1, -h) for k in range(count)]
    if h < SERIES_BELOW:
        return [math.factorial(k) * h ** (k + 1) * math.exp(-h) * phi(k + 1, h) for k in range(count)]
    tails = [math.exp(-h) * math.fsum(h**i / math.factorial(i) for i in range(k + 1)) for k in range(count)]
    return [math.factorial(k) * (1 - tail) for k, tail in enumerate(tails)]


def carried(here: Level, there: Level, form: str) -> float:
    """The share of x_s in x_t: σ_t/σ_s in data form, α_t/α_s in noise form."""
    _check_form(form)
    return there.sigma / here.sigma if form == "data" else there.alpha / here.alpha


def scale_of(here: Level, there: Level, form: str) -> float:
    """What stands before the integral: α_t in data form, −α_t ρ_s in noise form."""
    _check_form(form)
    return there.alpha if form == "data" else -there.alpha * here.rho


def adams_weights(here: Level, there: Level, knots: Sequence[float], form: str) -> list[float]:
    """Weights w with which x_t = c x_s + Σ w_j m_j is exact wherever m is a polynomial in λ through the knots.

    c is :func:`carried`. With knots λ_s, λ_{s−1}, … it is the exponential Adams–Bashforth method, of the order of the
    number of knots; with λ_t among them Adams–Moulton's, of the same order.

    A knot at λ = −∞ (α = 0) says nothing of the slope and gets weight 0, as all but the first do in data form on the
    way to σ = 0, where the polynomial would have no finite integral.

    Args:
        here: The level s, with σ > 0; α > 0 in noise form.
        there: The level t.
        knots: λ of each prediction, all different; the first is s's own.
        form: Of the predictions, ``data`` or ``noise``.

    Example:
        >>> from lightrail.generation import KarrasVE
        >>> path = KarrasVE()
        >>> here, there = path.level(2.0), path.level(1.0)
        >>> [round(w, 4) for w in adams_weights(here, there, [here.lam], "data")]
        [0.5]
    """
    scale, h = scale_of(here, there, form), there.lam - here.lam
    finite = [j for j, knot in enumerate(knots) if math.isfinite(knot)]
    if math.isinf(here.lam) or (form == "data" and math.isinf(h)):
        finite = [0]
    if len(finite) == 1:
        return [scale * kernel_moments(h, 1, form)[0] if j == finite[0] else 0.0 for j in range(len(knots))]
    moments = kernel_moments(h, len(finite), form)
    # In units of the nearest gap, so that powers of small steps do not spoil the coefficients.
    unit = h if math.isfinite(h) else 1.0
    rows = lagrange_coefficients([(knots[j] - here.lam) / unit for j in finite])
    weights = [0.0] * len(knots)
    for j, row in zip(finite, rows, strict=True):
        weights[j] = scale * math.fsum(c * m / unit**k for k, (c, m) in enumerate(zip(row, moments, strict=True)))
    return weights


def lagrange_weights(
    path: NoisePath, here: Level, there: Level, knots: Sequence[Level], variable: str = "t", form: str = "noise"
) -> list[float]:
    """As :func:`adams_weights`, for a polynomial in λ, in ρ = σ/α or in t; by quadrature, but for λ.

    On the way to σ = 0 the data form has only the first weight, as in :func:`adams_weights`.

    Args:
        path: The noise path, for t as a function of λ.
        here: The level s, with σ > 0 and α > 0.
        there: The level t.
        knots: The level of each prediction, all different, α > 0; the first is s.
        variable: ``lam``, ``rho`` or ``t``.
        form: Of the predictions, ``data`` or ``noise``.

    Example:
        >>> from lightrail.generation import KarrasVE
        >>> path = KarrasVE()
        >>> levels = [path.level(t) for t in (1.0, 2.0, 3.0)]
        >>> [round(w, 4) for w in lagrange_weights(path, levels[1], levels[0], levels[1:], "rho")]
        [-1.5, 0.5]
    """
    one_of(VARIABLES, variable=variable)
    if variable == "lam" or len(knots) == 1 or (form == "data" and there.is_clean):
        return adams_weights(here, there, [knot.lam for knot in knots], form)
    nodes, kernel = _quadrature(here, there, form)
    if variable == "rho":
        places, points = [knot.rho for knot in knots], np.exp(-nodes)
    else:
        places, points = [knot.t for knot in knots], path.t_of_lam(torch.from_numpy(nodes)).numpy()
    return [float(kernel @ row) for row in lagrange_basis(places, points)]


def lagrange_basis(knots: Sequence[float], at: np.ndarray | Sequence[float]) -> np.ndarray:
    """L_j(x) = Π_{i≠j} (x − x_i)/(x_j − x_i) at each point, ``[knots, points]``.

    Args:
        knots: x_i, all different.
        at: The points.

    Example:
        >>> lagrange_basis([0.0, 1.0], [0.0, 0.25]).tolist()
        [[1.0, 0.75], [0.0, 0.25]]
    """
    points = np.asarray(at, dtype=np.float64)
    basis = np.ones((len(knots), len(points)))
    for j, own in enumerate(knots):
        for i, other in enumerate(knots):
            if i != j:
                basis[j] *= (points - other) / (own - other)
    return basis


def lagrange_coefficients(knots: Sequence[float]) -> list[list[float]]:
    """L_j(x) = Σ_k c_jk xᵏ: the coefficients, lowest power first, one row a knot.

    Example:
        >>> lagrange_coefficients([0.0, -1.0])
        [[1.0, 1.0], [0.0, -1.0]]
    """
    rows = []
    for j, own in enumerate(knots):
        row = [1.0]
        for i, other in enumerate(knots):
            if i != j:
                gap = own - other
                shifted = [0.0, *row]
                row = [(up - other * low) / gap for up, low in zip(shifted, [*row, 0.0], strict=True)]
        rows.append([c + 0.0 for c in row])
    return rows


def divided_difference(knots: Sequence[float]) -> list[float]:
    """Weights with which f[x_0, …, x_n] = Σ w_j f(x_j); n! of it is the nth derivative of the polynomial through them.

    Example:
        >>> divided_difference([0.0, -1.0, -2.0])
        [0.5, -1.0, 0.5]
    """
    return [1 / math.prod(own - other for i, other in enumerate(knots) if i != j) for j, own in enumerate(knots)]


def _quadrature(here: Level, there: Level, form: str) -> tuple[np.ndarray, np.ndarray]:
    """Nodes in λ and weights, the kernel and what stands before the integral included."""
    nodes, weights = _gauss()
    scale, h = scale_of(here, there, form), there.lam - here.lam
    if math.isinf(h):
        # To σ = 0 in noise form: over ρ from 0 to ρ_s, where the path is smooth.
        return here.lam - np.log(nodes), scale * weights
    steps = h * nodes
    kernel = np.exp(steps - h if form == "data" else -steps)
    return here.lam + steps, scale * h * weights * kernel


@functools.cache
def _gauss() -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = np.polynomial.legendre.leggauss(QUADRATURE_NODES)
    return (nodes + 1) / 2, weights / 2


def _check_form(form: str) -> None:
    one_of(("data", "noise"), form=form)
