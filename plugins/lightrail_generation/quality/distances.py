"""Distances between two sets of points: how far samples are from data."""

from __future__ import annotations

import torch
from torch import Tensor

from lightrail.errors import DataError

__all__ = ["frechet_distance", "kernel_distance", "sliced_wasserstein"]

ROWS = 1024  # of a matrix of kernel values, held at once


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """‖m_x − m_y‖² + tr(C_x + C_y − 2 (C_x C_y)^{1/2}): between the Gaussians with the sets' means and covariances.

    Of two sets from one distribution it is above 0, and falls with the size of the sets: compare only sets of one size.

    Args:
        x: ``[N, d]``, N at least 2.
        y: ``[M, d]``, M at least 2.

    Returns:
        At least 0, worked out in double precision.

    Example:
        >>> x = torch.tensor([[0.0], [2.0]])
        >>> frechet_distance(x, x + 3)
        9.0

    Reference:
        M. Heusel, H. Ramsauer, T. Unterthiner, B. Nessler and S. Hochreiter (2017), GANs Trained by a Two Time-Scale
        Update Rule Converge to a Local Nash Equilibrium, arXiv 1706.08500, equation 6.
    """
    x, y = _paired(x, y)
    mean = (x.mean(0) - y.mean(0)).square().sum()
    first, second = _covariance(x), _covariance(y)
    # (C_x C_y)^{1/2} has the trace of the root of the symmetric matrix R C_y R with R the root of C_x.
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float(mean + first.trace() + second.trace() - 2 * cross))


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """The squared maximum mean discrepancy for the kernel k(a, b) = (aᵀb/d + 1)³, without bias (KID).

    Σ_{i≠j} k(x_i, x_j) / (N (N − 1)) + Σ_{i≠j} k(y_i, y_j) / (M (M − 1)) − 2 Σ_{ij} k(x_i, y_j) / (N M)

    Its expectation for two sets from one distribution is 0, whatever their sizes, so it may be negative.

    Args:
        x: ``[N, d]``, N at least 2.
        y: ``[M, d]``, M at least 2.

    Deviations:
        Published code averages over random subsets; all pairs are used here, which has the same expectation and less
        variance.

    Example:
        >>> x, y = torch.tensor([[0.0], [0.0]]), torch.tensor([[1.0], [1.0]])
        >>> kernel_distance(x, y)
        7.0

    Reference:
        M. Bińkowski, D. J. Sutherland, M. Arbel and A. Gretton (2018), Demystifying MMD GANs, arXiv 1801.01401,
        section 4, with equation 4 for the estimate.
    """
    x, y = _paired(x, y)
    n, m = len(x), len(y)
    within_x = (_kernel_sum(x, x) - _diagonal_sum(x)) / (n * (n - 1))
    within_y = (_kernel_sum(y, y) - _diagonal_sum(y)) / (m * (m - 1))
    return within_x + within_y - 2 * _kernel_sum(x, y) / (n * m)


def sliced_wasserstein(x: Tensor, y: Tensor, directions: int = 128, seed: int = 0) -> float:
    """√(mean over directions θ of W₂²(θᵀx, θᵀy)), where W₂ in one dimension is exact.

    Args:
        x: ``[N, …]``; what follows the first axis is flattened.
        y: ``[M, …]``; N and M may differ.
        directions: Unit vectors that are drawn, the same for the same seed and dimension.
        seed: Of the directions.

    Returns:
        In the units of the points, worked out in double precision.

    Example:
        >>> sliced_wasserstein(torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]]))
        2.0

    Reference:
        N. Bonneel, J. Rabin, G. Peyré and H. Pfister (2015), Sliced and Radon Wasserstein Barycenters of Measures,
        Journal of Mathematical Imaging and Vision 51.
    """
    x, y = _paired(x.flatten(1), y.flatten(1))
    drawn = torch.randn(x.shape[1], directions, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    drawn = drawn / drawn.norm(dim=0)
    along_x, along_y = (x @ drawn).sort(dim=0).values, (y @ drawn).sort(dim=0).values
    # Both quantile functions are constant between these shares of the mass.
    n, m = len(x), len(y)
    # Whole numbers, for shares that are equal must not become two.
    ends = torch.cat((m * torch.arange(1, n + 1), n * torch.arange(1, m + 1))).unique()
    masses = torch.diff(ends, prepend=ends.new_zeros(1)).double() / (n * m)
    gaps = along_x[(ends - 1) // m] - along_y[(ends - 1) // n]
    return float((masses @ gaps.square()).mean().sqrt())


def _paired(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both in double precision on the CPU, where equal sets are measured equally."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1:] != y.shape[1:] or min(len(x), len(y)) < 2:
        raise DataError(
            "two sets of points cannot be compared",
            found=f"{tuple(x.shape)} and {tuple(y.shape)}",
            allowed="two sets of at least two points each, of one dimension",
            remedy="Draw at least two samples, of the shape of the data.",
        )
    return x.detach().cpu().double(), y.detach().cpu().double()


def _covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)


def _kernel(products: Tensor, dimension: int) -> Tensor:
    return (products / dimension + 1) ** 3


def _kernel_sum(x: Tensor, y: Tensor) -> float:
    return sum(float(_kernel(rows @ y.T, x.shape[1]).sum()) for rows in x.split(ROWS))


def _diagonal_sum(x: Tensor) -> float:
    return float(_kernel(x.square().sum(1), x.shape[1]).sum())
