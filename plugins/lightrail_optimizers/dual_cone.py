"""Projection onto the cone of directions in which no objective gets worse."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import scipy.linalg
import scipy.optimize
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["project", "projected_rows"]

Array = NDArray[np.float64]

# Relative to rows of length 1. The first makes the Gramian of dependent rows invertible; a multiplier or a slope
# above minus the second counts as not negative.
_RIDGE, _TOLERANCE = 1e-12, 1e-9
_EXCHANGES = 30


def project(g: Tensor, u: Tensor) -> Tensor:
    """Weights of the direction nearest to ``Jᵀ u`` that conflicts with no row: ``argmin vᵀ G v`` over ``v >= u``.

    Args:
        g: The Gramian ``G = J Jᵀ``, ``[m, m]``, in double precision.
        u: Weights, ``[m]``.

    Returns:
        v, ``[m]``; ``J Jᵀ v >= 0``.

    Example:
        >>> g = torch.tensor([[1.0, -1.0], [-1.0, 4.0]]).double()
        >>> [round(value, 9) for value in project(g, torch.tensor([1.0, 0.0]).double()).tolist()]
        [1.0, 0.25]
    """
    solved, n = _Cone(g), g.diagonal().clamp_min(0).sqrt().numpy()
    v = u.numpy().copy()
    alive = n > 0
    v[alive] += solved.multipliers(solved.normalised @ (v * n)[alive]) / n[alive]
    return torch.from_numpy(v)


def projected_rows(g: Tensor, u: Tensor) -> Tensor:
    """The sum of the projections of every row ``u_i g_i`` by itself: ``Σ_i argmin vᵀ G v`` over ``v >= u_i e_i``.

    The cone does not change when a row is scaled, so the rows are brought to length 1: the result is exact for
    gradients of any size, and scales with each of them.

    Args:
        g: The Gramian ``G = J Jᵀ``, ``[m, m]``, in double precision.
        u: Weights, ``[m]``, >= 0.

    Returns:
        Their sum, ``[m]``.

    Example:
        >>> g = torch.tensor([[18.0, -22.0], [-22.0, 38.0]]).double()
        >>> [round(value, 7) for value in projected_rows(g, torch.tensor([0.5, 0.5]).double()).tolist()]
        [1.1111111, 0.7894737]
    """
    solved, n = _Cone(g), g.diagonal().clamp_min(0).sqrt().numpy()
    alive = n > 0
    weights = u.numpy().copy()
    lengths = (weights * n)[alive]
    added = np.zeros(int(alive.sum()))
    for i in np.flatnonzero((solved.normalised < 0).any(1) & (lengths > 0)):
        added += lengths[i] * solved.multipliers(solved.normalised[i])
    weights[alive] += added / n[alive]
    return torch.from_numpy(weights)


class _Cone:
    """The rows of J that are not zero, at length 1, known by their Gramian."""

    def __init__(self, g: Tensor) -> None:
        whole = g.numpy()
        alive = np.diag(whole) > 0
        n = np.sqrt(np.diag(whole)[alive])
        self.normalised: Array = whole[np.ix_(alive, alive)] / n / n[:, None]
        self._ridged = self.normalised + _RIDGE * np.eye(len(n))

    def multipliers(self, slope: Array) -> Array:
        """z >= 0 with ``G z + slope >= 0`` and ``zᵀ (G z + slope) = 0``: what must be added to leave no conflict.

        Block principal pivoting: all rows on the wrong side change sides at once, and one at a time where that does
        not help. It seldom takes more than five exchanges; rows that point against each other exactly may keep it
        from ending, and then Lawson and Hanson's slower method takes over.
        """
        active = slope < 0
        fewest, patience = len(slope) + 1, 3
        for _ in range(_EXCHANGES):
            z = np.zeros(len(slope))
            where = np.flatnonzero(active)
            if len(where):
                factor = scipy.linalg.cho_factor(self._ridged[np.ix_(where, where)], lower=True, check_finite=False)
                z[where] = scipy.linalg.cho_solve(factor, -slope[where], check_finite=False)
            wrong = np.where(active, z, self._ridged @ z + slope) < -_TOLERANCE
            count = int(np.count_nonzero(wrong))
            if not count:
                return z.clip(0)
            if count < fewest:
                fewest, patience = count, 3
            elif patience:
                patience -= 1
            else:
                wrong[: np.flatnonzero(wrong)[-1]] = False
            active ^= wrong
        return self._by_least_squares(slope)

    def _by_least_squares(self, slope: Array) -> Array:
        """``min ||A z + b||`` over ``z >= 0``, where ``Aᵀ A = G`` and ``Aᵀ b = slope``."""
        root, inverse = self._roots
        return scipy.optimize.nnls(root, -inverse @ slope, maxiter=50 * len(slope))[0]

    @cached_property
    def _roots(self) -> tuple[Array, Array]:
        """A, and the matrix that makes b of the slope."""
        values, vectors = np.linalg.eigh(self.normalised)
        kept = values > _RIDGE * values[-1]
        roots = np.sqrt(values[kept])[:, None]
        return roots * vectors.T[kept], vectors.T[kept] / roots
