"""Statistics of a model over λ, and the integrals over one step that a solver makes of them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightrail.generation import weighted_sum
from lightrail_generation.samplers.exponential import divided_difference, lagrange_coefficients

__all__ = ["ModelStatistics", "StepWeights", "step_weights", "weighted_states"]

NODES = 6
# Between two values of the statistics they are linear in λ; parts this short leave the quadrature nothing to lose.
LONGEST_PART = 0.25


@dataclass(frozen=True, eq=False)
class ModelStatistics:
    """l, s and b over λ: linear between the values given, constant beyond them.

    Args:
        lam: Rising, ``[M]``.
        l: ``[M]`` for all elements alike, or ``[M, *shape]``.
        s: As ``l``.
        b: As ``l``.
    """

    lam: np.ndarray
    l: np.ndarray  # noqa: E741
    s: np.ndarray
    b: np.ndarray

    @classmethod
    def constant(cls, l: float, s: float = 0.0, b: float = 0.0) -> ModelStatistics:  # noqa: E741
        """The same at every λ: (1, 0, 0) makes a data solver, (0, −1, 0) a noise solver."""
        return cls(np.zeros(1), *(np.full(1, value) for value in (l, s, b)))

    def at(self, lam: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(l, s, b) at each λ, ``[N]`` or ``[N, *shape]``."""
        if len(self.lam) == 1:
            return tuple(np.repeat(each, len(lam), axis=0) for each in (self.l, self.s, self.b))  # type: ignore[return-value]
        place = np.clip(np.searchsorted(self.lam, lam, side="right") - 1, 0, len(self.lam) - 2)
        share = np.clip((lam - self.lam[place]) / (self.lam[place + 1] - self.lam[place]), 0, 1)
        share = share.reshape(-1, *[1] * (self.l.ndim - 1))
        return tuple(each[place] * (1 - share) + each[place + 1] * share for each in (self.l, self.s, self.b))  # type: ignore[return-value]

    def parts(self, low: float, high: float) -> np.ndarray:
        """The ends of short parts of an interval, within each of which the statistics are linear."""
        count = max(1, math.ceil((high - low) / LONGEST_PART))
        within = self.lam[(self.lam > low) & (self.lam < high)]
        ends = np.unique(np.concatenate((np.linspace(low, high, count + 1), within)))
        # Two ends that differ by rounding alone would make an empty part.
        return ends[np.concatenate(([True], np.diff(ends) > 1e-12))]


@functools.cache
def _rule() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gauss–Legendre nodes and weights on [0, 1], and the matrix of integrals from 0 to each node."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    nodes, weights = (nodes + 1) / 2, weights / 2
    powers = nodes[:, None] ** np.arange(NODES)
    integrals = nodes[:, None] ** np.arange(1, NODES + 1) / np.arange(1, NODES + 1)
    return nodes, weights, integrals @ np.linalg.inv(powers)


class _Interval:
    """Quadrature over an interval of λ in parts: integrals up to every node, and over all of it."""

    def __init__(self, ends: np.ndarray) -> None:
        nodes, self.weights, self.upto = _rule()
        self.lengths = np.diff(ends)
        self.lam = ends[:-1, None] + self.lengths[:, None] * nodes  # [parts, nodes]

    def cumulative(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """∫ from the start to each node, ``[parts, nodes, …]``, and ∫ over all."""
        lengths = self.lengths.reshape(-1, 1, *[1] * (values.ndim - 2))
        inner = np.einsum("ij,pj...->pi...", self.upto, values) * lengths
        whole = np.einsum("j,pj...->p...", self.weights, values) * lengths[:, 0]
        sums = np.cumsum(whole, axis=0)
        before = np.concatenate((np.zeros_like(sums[:1]), sums[:-1]))
        return inner + before[:, None], sums[-1]

    def total(self, values: np.ndarray) -> np.ndarray:
        lengths = self.lengths.reshape(-1, *[1] * (values.ndim - 2))
        return (np.einsum("j,pj...->p...", self.weights, values) * lengths).sum(0)


@dataclass(frozen=True)
class StepWeights:
    """x_t/α_t = e^{−L} (x_s/α_s − Σ_j w_j f_j − c), with f_j = (σ ε − l x)/α at each point.

    Args:
        decay: e^{−L}, over the step.
        of_f: w_j, one a point.
        constant: c.
    """

    decay: Any
    of_f: tuple[Any, ...]
    constant: Any


@functools.lru_cache(maxsize=256)
def step_weights(
    statistics: ModelStatistics, here: float, there: float, points: tuple[float, ...], pseudo: bool = False
) -> StepWeights:
    """The weights of one step from λ_s to λ_t, of the order of the number of points.

    With L = ∫ l, S = ∫ s, B = ∫ e^{−S} b from λ_s and g = e^{−S} f − B,
    x_t/α_t = e^{−L} (x_s/α_s − ∫ e^{L+S} B dλ − ∫ e^{L+S} g dλ), with g a polynomial in λ through the points.

    Args:
        statistics: l, s and b.
        here: λ_s, finite.
        there: λ_t, finite.
        points: λ of each remainder, all different; the first is λ_s.
        pseudo: Whether the ith derivative of g is i! times its divided difference over the first i + 1 points, rather
            than that of the polynomial.

    Returns:
        Numbers, or tensors of a state's shape where the statistics have one.
    """
    interval = _Interval(statistics.parts(here, there))
    shape = (*interval.lam.shape, *statistics.l.shape[1:])
    l, s, b = (each.reshape(shape) for each in statistics.at(interval.lam.ravel()))  # noqa: E741
    big_l, all_l = interval.cumulative(l)
    big_s, _ = interval.cumulative(s)
    big_b, _ = interval.cumulative(np.exp(-big_s) * b)
    kernel = np.exp(big_l + big_s)
    offset = interval.lam.reshape(*interval.lam.shape, *[1] * (l.ndim - 2)) - here
    moments = np.stack([interval.total(kernel * offset**k) for k in range(len(points))])
    constant = interval.total(kernel * big_b)
    of_g = _of_values(np.array(points) - here, moments, pseudo)
    weights = []
    for weight, point in zip(of_g, points, strict=True):
        s_to, b_to = _transported(statistics, here, point)
        weights.append(weight * np.exp(-s_to))
        constant = constant - weight * b_to
    return StepWeights(*map(_plain, (np.exp(-all_l), weights, constant)))


def _of_values(offsets: np.ndarray, moments: np.ndarray, pseudo: bool) -> list[np.ndarray]:
    """Weights of the values at points from the moments ∫ e^{L+S} (λ − λ_s)^k."""
    places = [float(each) for each in offsets]
    if pseudo:
        rows = np.zeros((len(places), len(places)))
        for k in range(len(places)):
            rows[: k + 1, k] = divided_difference(places[: k + 1])
    else:
        rows = np.array(lagrange_coefficients(places))
    return list(np.tensordot(rows, moments, axes=1))


def _transported(statistics: ModelStatistics, here: float, point: float) -> tuple[np.ndarray, np.ndarray]:
    """S and B at a point on either side of λ_s."""
    zero = np.zeros(statistics.l.shape[1:])
    if point == here:
        return zero, zero
    interval = _Interval(statistics.parts(min(here, point), max(here, point)))
    shape = (*interval.lam.shape, *zero.shape)
    _, s, b = (each.reshape(shape) for each in statistics.at(interval.lam.ravel()))
    big_s, all_s = interval.cumulative(s)
    if point > here:
        return all_s, interval.total(np.exp(-big_s) * b)
    # S and B count from λ_s, which is the far end here.
    return -all_s, -interval.total(np.exp(all_s - big_s) * b)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_plain, value))
    return float(value) if np.ndim(value) == 0 else torch.from_numpy(np.ascontiguousarray(value))


def weighted_states(*terms: tuple[Any, Tensor | None], like: Tensor) -> Tensor:
    """Σ w x over pairs (w, x), where a weight may be a number or a tensor of a state's shape; ``None`` stands for 1."""
    numbers = [(weight, x) for weight, x in terms if not isinstance(weight, Tensor) and x is not None]
    total = weighted_sum(*numbers) if numbers else torch.zeros_like(like)
    for weight, x in terms:
        if isinstance(weight, Tensor):
            known = weight.to(like)
            total = total + known if x is None else torch.addcmul(total, x, known)
        elif x is None and weight != 0:
            total = total + weight
    return total
